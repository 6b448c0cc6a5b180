"""The runner of the GPU tests: a dry run on the CPU, and parts that fail, hang, or are not begun."""

import json
import sys
import time
from dataclasses import replace

import pytest

from tests.benchmark import PEFT_WARNINGS
from tests.gpu import check, figures, machine
from tests.gpu.check import Part, exit_code, main, parts_of, run_part
from tests.toy import CPU

pytestmark = PEFT_WARNINGS
TEST = '{"test": "a", "outcome": "passed", "seconds": 0.1, "said": "", "reason": ""}'
WRITES = f"import os; open(os.environ['GPU_CHECK_RESULTS'], 'w').write({TEST!r})"


def part(name, code, **changes):
    """A part that runs some code."""
    stub = Part(name=name, shows="something", arguments=("-c", code), seconds=30, needs=("pytest",))
    return replace(stub, **changes)


@pytest.fixture
def at_once(monkeypatch):
    """Parts need no time to import libraries."""
    monkeypatch.setattr(check, "_LEAST", 0.0)


def in_this_process(command, seconds, environment):
    """Do what a child would do, without its imports."""
    module, *arguments = command[2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_CHECK_RESULTS", environment["GPU_CHECK_RESULTS"])
        return int(pytest.main(arguments) if module == "pytest" else figures.main(arguments) or 0), ""


def test_a_dry_run_writes_tests_and_figures(tmp_path, monkeypatch, capsys):
    """A few tests and one table stand for all: `make gpu-check ARGS='--device cpu --tiny'` runs the others."""
    every = {part.name: part for part in parts_of("cpu", tiny=True)}
    few = replace(every["waits"], arguments=(*every["waits"].arguments, "-k", "[packed] or are_seen"))
    monkeypatch.setattr(check, "parts_of", lambda device, tiny: [few, every["figures none"]])
    monkeypatch.setattr(check, "run_child", in_this_process)
    monkeypatch.setattr(check, "describe_machine", lambda *_: machine.describe(CPU))
    monkeypatch.chdir(check.ROOT)
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    waits, table = report["parts"]
    assert {test["test"].partition("::")[2]: test["outcome"] for test in waits["tests"]} == {
        "test_a_step_waits_for_nothing[packed]": "passed",
        "test_waits_are_seen": "skipped",
    }
    rows = table["table"]["rows"]
    assert [row["arm"] for row in rows] == ["frozen", "MetaTT-4D r=4", "LoRA r=8", "LoRA r=8 in bfloat16"]
    assert all(len(row["seconds"]) == 2 and row["peak_in_all"] > row["peak_bytes"] > 0 for row in rows)
    assert rows[1]["planned"] > 0 and [row["waits"] for row in rows] == [0] * 4
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| MetaTT-4D r=4 |" in text and "test_waits_are_seen was skipped" in text
    assert f"- torch: {report['machine']['torch']}" in text


def test_every_file_of_gpu_tests_is_a_part():
    files = {path.name for path in (check.ROOT / "tests" / "gpu").glob("test_*.py")}
    named = {argument for part in parts_of("cuda", tiny=False) for argument in part.arguments}
    assert {f"tests/gpu/{name}" for name in files} <= named


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, at_once):
    parts = [
        part("dies", "import os; print('last words', flush=True); os.abort()"),
        part("hangs", "import time; print('begins', flush=True); time.sleep(60)", seconds=1),
        part("works", WRITES),
    ]
    started = time.monotonic()
    assert check.check(parts, {"device": "test"}, tmp_path, started + 60) == 1 and time.monotonic() < started + 50
    dies, hangs, works = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert (dies["outcome"], hangs["outcome"], works["outcome"]) == ("failed", "failed", "passed")
    assert "last words" in dies["output"] and "1 s" in hangs["reason"] and works["tests"] == [json.loads(TEST)]
    text = (tmp_path / "gpu_check.md").read_text()
    assert "last words" in text and "begins" in text


def test_parts_without_time_are_skipped_with_a_reason(tmp_path, capsys):
    assert check.check([part("late", WRITES)], {}, tmp_path, time.monotonic()) == 2
    (late,) = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert late["outcome"] == "skipped" and late["reason"] in capsys.readouterr().out


def test_tests_leave_time_for_figures(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        check, "run_part", lambda part, seconds, *_: given.append(seconds) or check.skipped(part, "-")
    )
    parts = [part("tests", ""), part("figures", "", kept=60.0), part("last", "")]
    check.check(parts, {}, tmp_path, time.monotonic() + 100)
    assert [round(seconds) for seconds in given] == [40, 100, 100]


def test_a_missing_package_costs_the_parts_that_need_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "installed", lambda module: module != "bitsandbytes")
    for one in parts_of("cuda", tiny=False):
        if "bitsandbytes" in one.needs:
            assert "pip install bitsandbytes" in run_part(one, 100, tmp_path, {})["reason"]
    monkeypatch.setattr(check, "installed", lambda module: module != "pydantic")
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 2
    assert "missing: pydantic" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "describe_machine", lambda *_: (_ for _ in ()).throw(ValueError("finds no GPU")))
    assert main(["--out", str(tmp_path)]) == 2 and "finds no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "outcomes, tests, code",
    [
        (["passed", "failed"], ["passed"], 1),
        (["passed", "skipped"], ["passed", "skipped"], 0),
        (["passed"], ["skipped"], 2),
        (["skipped"], [], 2),
    ],
)
def test_exit_codes(outcomes, tests, code):
    results = [{"outcome": outcome, "tests": [{"outcome": test} for test in tests]} for outcome in outcomes]
    assert exit_code(results) == code


def test_the_runner_needs_no_torch():
    code = "import sys, tests.gpu.check; sys.exit('torch' in sys.modules)"
    assert check.run_child([sys.executable, "-c", code], 60, {"PYTHONPATH": str(check.ROOT)})[0] == 0
