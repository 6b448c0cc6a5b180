"""From a YAML file and command-line overrides to a `Recipe`, or to one readable message."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from metatt_scale.recipe.schema import Recipe

_MAX_BYTES = 1 << 20  # a recipe has a few hundred lines at most; whoever passes a model or a data set hears so
_MAX_PROBLEMS = 10


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names file, key, value received, rule and remedy."""


# YAML 1.2 numbers: 1e-3 is a number; 010 and 1:30 are text and not, as in YAML 1.1, the numbers 8 and 90.
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^([-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` for plain values: no tags, no aliases, no dates, no duplicate keys, YAML 1.2 numbers.

    A few aliases of aliases stand for billions of values and a tag may ask for an object; a recipe needs neither.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            problem = f"alias *{event.anchor} is not supported; write the value out"
        elif tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"tag {shown} is not supported; a recipe holds text, numbers, lists and sections"
        else:
            return super().compose_node(parent, index)
        raise yaml.MarkedYAMLError(None, None, problem, mark)


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that quotes whatever text `_Loader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":bool", ":null"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _regexp in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _regexp, list("-+0123456789."))
    _Dumper.add_implicit_resolver(_tag, _regexp, list("-+0123456789."))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            problem = f"key {_show(key)} is not text; put it in quotes if it is meant"
            raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
        if key in mapping:
            problem = f"key `{key}` appears twice; keep one of them"
            raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > 1000:  # Python reads no more than 4300 digits, and that slowly
        problem = f"a whole number of {len(node.value)} digits; give a shorter one"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    return int(node.value.replace("_", ""))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML with no tag that could build an object; `source` names it in the error message."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_message(error, source)) from None
    except RecursionError:
        raise RecipeError(f"{source}: lists or sections are nested too deeply") from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, apply `dotted.key=value` overrides and check the result.

    Raises:
        RecipeError: unreadable file, unknown key, wrong type or contradiction.
    """
    path = Path(path)
    data = parse_yaml(_read(path), str(path))
    if not isinstance(data, dict):
        kind = "empty" if data is None else _kind(data)
        raise RecipeError(f"{path}: the file is {kind}; a recipe is a mapping of keys such as `backbone:`")
    for override in overrides:
        _apply_override(data, override)
    changed = " with " + " ".join(map(_shortened, overrides)) if overrides else ""
    return validate(data, f"{path}{changed}")


def validate(data: dict[str, Any], source: str) -> Recipe:
    """Check a plain mapping against the schema; `source` names it in error messages."""
    _refuse_unusable(data, source, ())
    try:
        # The JSON route lets strict mode accept YAML lists where the schema says tuple.
        return Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError(_message(error, source)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load_recipe` gives the same recipe back."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" The folder holds: {', '.join(near)}." if near else ""
        raise RecipeError(f"{path}: no such recipe.{hint}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; give the path of a recipe file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > _MAX_BYTES:
        raise RecipeError(f"{path}: is longer than {_MAX_BYTES >> 20} MiB, so it is not a recipe")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None


def _yaml_message(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{source}, line {mark.line + 1}" if mark else source
    parts = [getattr(error, name, None) for name in ("context", "problem", "reason")]
    problem = ", ".join(part for part in parts if part) or "unreadable"
    if r"'\t'" in problem:
        problem += "; indent with spaces, not tabs"
    elif "cannot start any token" in problem:
        problem += "; put text that begins so in quotes"
    elif "mapping values are not allowed" in problem:
        problem += "; check the indentation, and put text that holds ': ' in quotes"
    return f"{where}: not valid YAML: {problem}"


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"override {_shortened(override)}: expected dotted.key=value, for example training.max_steps=100"
        )
    node = data
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            above = ".".join(keys[:depth])
            remedy = f"; give the whole list, for example '{above}=[...]'" if isinstance(child, list) else ""
            problem = f"`{above}` is {_show(child)}, not a section with keys of its own{remedy}"
            raise RecipeError(f"override {_shortened(override)}: {problem}")
        node = child
    node[keys[-1]] = parse_yaml(text, f"override {_shortened(override)}")


def _refuse_unusable(value: Any, source: str, keys: tuple[str, ...]) -> None:
    """Refuse what JSON or the consumers of a recipe cannot carry: nan, inf, giant integers, half characters."""
    where = f"{source}: `{'.'.join(keys)}`"
    if isinstance(value, dict):
        for key, child in value.items():
            _refuse_unusable(key, source, (*keys, ascii(key)))
            _refuse_unusable(child, source, (*keys, key))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            _refuse_unusable(child, source, (*keys, str(i)))
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where} is {value}; numbers must be finite")
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise RecipeError(f"{where} is {_show(value)}; whole numbers must be below 2**63")
    elif isinstance(value, str) and not _is_unicode(value):
        raise RecipeError(f"{where} is {value!a}; it holds half of a surrogate pair, which is no character")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _message(error: ValidationError, source: str) -> str:
    # A union (a whole number or a list) reports a problem per member: join them to one line per key, and where a
    # list was given speak of its wrong entry only.
    problems: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_keys(problem), []).append(problem)
    lines = [
        _explain(keys, same_key)
        for keys, same_key in problems.items()
        if not any(len(other) > len(keys) and other[: len(keys)] == keys for other in problems)
    ]
    if len(lines) > _MAX_PROBLEMS:
        lines[_MAX_PROBLEMS:] = [f"and {len(lines) - _MAX_PROBLEMS} more problems"]
    return f"{source}: " + "\n".join(lines)


def _keys(problem: Any) -> tuple[str, ...]:
    keys = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":  # the last part is what the user wrote, whatever it looks like
        return (*(key for key in keys[:-1] if not _is_union_tag(key)), keys[-1])
    return tuple(key for key in keys if not _is_union_tag(key))


def _is_union_tag(part: str) -> bool:
    return part in ("int", "str", "float") or part.startswith(("literal[", "tuple[", "constrained-"))


def _explain(keys: tuple[str, ...], problems: list[Any]) -> str:
    dotted, kind, received = ".".join(keys), problems[0]["type"], problems[0].get("input")
    if kind == "extra_forbidden":
        return f"unknown key `{dotted}` (value {_show(received)}); {_nearest_key(keys)}"
    if kind == "missing" and not keys[-1].isdigit():
        return f"key `{dotted}` is missing ({_description(keys)})"
    if kind == "value_error":
        where = f"in `{dotted}`: " if keys else ""
        return where + problems[0]["msg"].removeprefix("Value error, ")
    if kind == "missing":  # an entry of a list of fixed length
        return f"`{'.'.join(keys[:-1])}` has too few entries ({_description(keys)})"
    rule = " or ".join(dict.fromkeys(_rule(problem) for problem in problems))
    rule = rule if rule.startswith("it must") else f"give {rule}"
    return f"`{dotted}` is {_show(received)}; {rule} ({_description(keys)})"


def _rule(problem: Any) -> str:
    bounds = problem.get("ctx", {})
    match problem["type"]:
        case "int_type" | "int_from_float":
            return "a whole number"
        case "float_type":
            return "a number"
        case "bool_type":
            return "true or false"
        case "string_type":
            return "text"
        case "tuple_type":
            return "a list"
        case "model_type":
            return "keys and values"
        case "literal_error":
            return bounds["expected"]
        case "greater_than":
            return f"it must be greater than {bounds['gt']:g}"
        case "greater_than_equal":
            return f"it must be at least {bounds['ge']:g}"
        case "less_than":
            return f"it must be less than {bounds['lt']:g}"
        case "string_too_short" | "too_short":
            return "it must not be empty"
        case "too_long":
            return f"it must have {bounds['max_length']} entries"
        case _:
            return problem["msg"].replace("Input should", "it must")


def _nearest_key(keys: tuple[str, ...]) -> str:
    known = _known_keys(keys[:-1])
    near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{'.'.join((*keys[:-1], near[0]))}`?"
    elsewhere = [f"{section}.{key}" for section in Recipe.model_fields for key in _known_keys((section,))]
    elsewhere = [dotted for dotted in [*Recipe.model_fields, *elsewhere] if dotted.split(".")[-1] == keys[-1]]
    return f"did you mean `{elsewhere[0]}`?" if elsewhere else "known keys: " + ", ".join(known)


def _section(keys: tuple[str, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] = Recipe
    for key in keys:
        if key.isdigit():
            continue
        field = section.model_fields.get(key)
        if field is None:
            return None
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return None
        section = models[0]
    return section


def _known_keys(keys: tuple[str, ...]) -> list[str]:
    section = _section(keys)
    return list(section.model_fields) if section else []


def _description(keys: tuple[str, ...]) -> str:
    while keys and keys[-1].isdigit():  # an entry is described by its list
        keys = keys[:-1]
    section = _section(keys[:-1])
    field = section.model_fields.get(keys[-1]) if section and keys else None
    itself = _section(keys)
    text = (field.description if field else None) or (itself.__doc__ if itself else None)
    return " ".join((text or "see recipes/recipe.schema.json").split())


def _show(value: Any) -> str:
    """Return a value as it would stand in the recipe, shortened; text in quotes."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) < 80 else shown[:77] + "..."


def _shortened(override: str) -> str:
    return repr(override if len(override) < 200 else override[:197] + "...")


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number")
