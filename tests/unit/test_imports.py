"""The floors of the house, read from the imports themselves: each floor stands on those below it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "metatt_scale"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LAUNCHERS = sorted((ROOT / "launch").glob("*.py"))

FLOORS = [
    {"metatt_scale", "paths", "strict_json", "json_files", "run_files", "tensor_files", "heads", "files", "hashes"}
    | {"record_files", "device", "determinism", "gpus", "libraries", "process", "shapes", "versions"},
    {"tensor", "recipe", "hardware"},
    {"adapter", "data", "backbone", "parallel"},
    {"methods", "ending"},
    {"training", "evaluation", "report"},
    {"plan"},
    {"reopen", "benchmark"},
    {"export", "scoring", "study"},
    {"quickstart", "doctor"},
    {"cli"},
]
"""Rooms, from the ground up, as in CONTRIBUTING.md."""
KEPT_APART = ({"tensor", "recipe"}, {"adapter", "data"}, {"data", "backbone"}, {"adapter", "backbone"})
"""Rooms of one floor that do not know of each other."""
MAY_IMPORT = {
    "tensor": {"torch"},
    "recipe": {"pydantic", "yaml"},
}
"""Third-party packages of the ground floor; the other floors are free."""
MAX_LINES, MAX_FUNCTION_LINES, MAX_LAUNCHER_LINES = 450, 50, 60


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def floor_of(module):
    room = room_of(module)
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise AssertionError(f"{module} stands on no floor: add `{room}` to FLOORS where CONTRIBUTING.md has it")


def imports_of(path, *, at_run_time=False, when_loaded=False):
    """Full names a file imports; `at_run_time` leaves out TYPE_CHECKING blocks, `when_loaded` also functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {id(inner) for child in node.body for inner in ast.walk(child)}
        if when_loaded and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def own_imports(path, **options):
    return {name for name in imports_of(path, **options) if name.split(".")[0] == "metatt_scale"}


@pytest.mark.parametrize("module", MODULES)
def test_a_floor_imports_only_floors_below(module):
    for imported in own_imports(MODULES[module]):
        assert imported in MODULES, f"{module} imports {imported}, which is no module"
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported} from a floor above"
        rooms = {room_of(module), room_of(imported)}
        assert rooms not in KEPT_APART, f"{module} imports {imported}; these two do not know of each other"


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in MAY_IMPORT])
def test_the_ground_floor_imports_nothing_heavy(module):
    others = {name.split(".")[0] for name in imports_of(MODULES[module])} - set(sys.stdlib_module_names)
    assert others - {"metatt_scale"} <= MAY_IMPORT[room_of(module)]


def test_the_rooms_of_the_house_are_those_of_this_test():
    rooms = {room_of(module) for module in MODULES}
    assert {floor_of(module) for module in MODULES} == set(range(len(FLOORS)))
    assert {"tensor", "recipe", "adapter", "data", "backbone", "training", "evaluation", "cli"} <= rooms


def test_there_is_no_cycle_between_modules():
    graph = {
        # A package's __init__ gathers its modules; what they import is what counts.
        module: {name for name in own_imports(path, at_run_time=True) if name != module}
        for module, path in MODULES.items()
    }
    done, path = set(), []

    def visit(module):
        if module in path:
            raise AssertionError("cycle: " + " -> ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        path.append(module)
        for imported in sorted(graph[module]):
            visit(imported)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_the_command_line_starts_without_heavy_libraries():
    """`--help` stays fast, and `doctor` runs where torch, numpy or scipy are broken."""
    waiting, seen, others = ["metatt_scale.cli"], set(), set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for imported in imports_of(MODULES[module], at_run_time=True, when_loaded=True):
            parts = imported.split(".")
            if parts[0] != "metatt_scale":
                others.add(parts[0])
                continue
            # Python runs the __init__ of every package on the way.
            waiting += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    assert others - set(sys.stdlib_module_names) == {"filelock", "pydantic", "rich", "yaml"}


def test_files_and_functions_are_short():
    offenders = []
    for path in [*SOURCES, *LAUNCHERS]:
        text = path.read_text(encoding="utf-8")
        name, lines = path.relative_to(ROOT), len(text.splitlines())
        if lines >= MAX_LINES:
            offenders.append(f"{name}: {lines} lines, fewer than {MAX_LINES} allowed")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length >= MAX_FUNCTION_LINES:
                    offenders.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    assert not offenders, "too long:\n" + "\n".join(offenders)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_are_doors_to_the_command_line(path):
    others = {name for name in imports_of(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert others == {"metatt_scale.cli"}
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LAUNCHER_LINES


def test_nothing_that_is_loaded_can_run_code():
    """Safetensors and JSON only."""
    forbidden = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imports_of(path)} & forbidden, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec"), f"{path}:{node.lineno}: {called}"
