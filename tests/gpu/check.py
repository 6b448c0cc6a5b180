"""`make gpu-check`: all that only a GPU can show, in one visit of under 8 minutes.

    python -m tests.gpu.check                        # a machine with one GPU of about 80 GB
    python -m tests.gpu.check --device cpu --tiny    # the same steps on small shapes without a GPU

Every part (a file of tests, a table of figures) is a process of its own: one that fails, hangs or dies is reported,
and the rest goes on. What is known is written to gpu_check.md and gpu_check.json after every part. Nothing here
imports torch, and a package that is missing costs only the parts that need it.

Exit codes: 0 where nothing failed, 1 where a part did, 2 where nothing could be tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from metatt_scale.gpus import showing, visible_gpus
from metatt_scale.process import set_process_defaults
from metatt_scale.versions import git_commit
from tests.gpu.text import as_markdown

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 470.0
"""Seconds in all: under 8 minutes with what a machine needs besides."""
_LEAST = 20.0
"""Seconds without which a part is not begun: its imports alone take that."""
_TAIL_LINES = 60

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "rich": "rich",
    "filelock": "filelock",
}
"""What every part needs: module, and name of the package."""
MORE = {"pytest": "pytest", "peft": "peft", "bitsandbytes": "bitsandbytes", "flash_attn": "flash-attn"}
"""What some need; tests of flash-attn and of 4-bit weights among other tests are skipped where it is missing."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process that shows something."""

    name: str
    shows: str
    arguments: tuple[str, ...]
    """Of python."""
    seconds: float
    """That it may take."""
    kept: float = 0.0
    """Seconds that parts before it leave it, whatever they still have to do."""
    needs: tuple[str, ...] = ()
    """Modules of MORE without which it has nothing to do."""

    @property
    def has_tests(self) -> bool:
        """Whether it writes a line per test; otherwise a table."""
        return "pytest" in self.needs


def parts_of(device: str, tiny: bool) -> list[Part]:
    """Return all parts; what may be missed comes last."""

    def tests(name: str, shows: str, seconds: float, *needs: str) -> Part:
        # Warnings are not errors here: another version of a library may have new ones.
        options = ("-o", "filterwarnings=default", "-p", "no:cacheprovider", "-q", "-rs", "--tb=short")
        arguments = ("-m", "pytest", f"tests/gpu/test_{name}.py", "--device", device, *options)
        return Part(name=name, shows=shows, arguments=arguments, seconds=seconds, needs=("pytest", *needs))

    def figures(quantization: str, shows: str, *needs: str) -> Part:
        options = ("--quantization", quantization, "--device", device, *(["--tiny"] if tiny else []))
        arguments = ("-m", "tests.gpu.figures", *options)
        return Part(
            name=f"figures {quantization}", shows=shows, arguments=arguments, seconds=150, kept=60, needs=needs
        )

    return [
        tests("gradients", "loss and gradients are those of a CPU", 120),
        tests("waits", "a step waits for nothing", 90),
        tests("training", "runs go on to the same bits; sweeps; optimizer state on the device", 120),
        tests("quantised", "4-bit kernels against the weights they stand for", 90, "bitsandbytes"),
        tests("memory", "a step takes what plan says", 90, "bitsandbytes"),
        tests("export", "a run reopened, in PEFT, merged", 90, "peft"),
        figures("none", "a step at 7B shapes in bf16", "peft"),
        figures("nf4", "a step at 7B shapes in NF4", "peft", "bitsandbytes"),
        tests("compile", "compiled layers compute the same", 150),
    ]


# ---- one part


def run_part(part: Part, seconds: float, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a part for so long at most and return what came of it: outcome, reason, tests or a table."""
    if missing := [MORE[name] for name in part.needs if not installed(name)]:
        return skipped(part, f"{', '.join(missing)} is not installed (pip install {' '.join(missing)})")
    if seconds < _LEAST:
        return skipped(part, f"the time that is left, {max(0.0, seconds):.0f} s, is not enough")
    limit, file = min(part.seconds, seconds), folder / f"{part.name.replace(' ', '_')}.out"
    command = [sys.executable, *part.arguments, *([] if part.has_tests else [str(file)])]
    started = time.monotonic()
    code, tail = run_child(command, limit, {**environment, "GPU_CHECK_RESULTS": str(file)})
    found = {"part": part.name, "shows": part.shows, "seconds": round(time.monotonic() - started, 1)}
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    if part.has_tests:
        found["tests"] = [json.loads(line) for line in written.splitlines()]
    elif written:
        found["table"] = json.loads(written)
    if code == 0:
        return {**found, "outcome": "passed", "reason": ""}
    if code is None:
        why = f"stopped after {limit:.0f} s"
    else:
        why = "tests failed" if part.has_tests and code == 1 else f"ended with code {code}"
    return {**found, "outcome": "failed", "reason": why, "output": tail}


def skipped(part: Part, reason: str) -> dict[str, Any]:
    """Return the result of a part that was not begun."""
    return {"part": part.name, "shows": part.shows, "seconds": 0.0, "outcome": "skipped", "reason": reason}


def run_child(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Run a process and repeat what it prints; return its exit code (None where it was stopped) and last lines."""
    lines: deque[str] = deque(maxlen=_TAIL_LINES)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it has started can be ended with it
    )
    assert process.stdout is not None

    def repeat(stream: Iterator[str]) -> None:
        for line in stream:
            lines.append(line)
            print(line, end="", flush=True)

    reader = threading.Thread(target=repeat, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(5)
        if not reader.is_alive():
            process.stdout.close()
    return code, "".join(lines)


def installed(module: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(module) is not None


# ---- all of them


def check(parts: Sequence[Part], machine: dict[str, Any], out: Path, deadline: float) -> int:
    """Run parts until the deadline (a time of time.monotonic) and write what they show; return the exit code."""
    environment = showing(os.environ, next(iter(visible_gpus(os.environ)), None))
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    # Plugins that happen to be installed import other frameworks, which take GPU memory.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    set_process_defaults(environment)  # as in the commands whose figures these are
    report: dict[str, Any] = {"machine": machine, "parts": []}
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(parts):
            left = deadline - time.monotonic() - sum(later.kept for later in parts[i + 1 :])
            print(f"\n== {part.name}: {part.shows}; {max(0.0, left):.0f} s left", flush=True)
            report["parts"].append(run_part(part, left, Path(folder), environment))
            print(f"== {part.name}: {report['parts'][-1]['outcome']} {report['parts'][-1]['reason']}", flush=True)
            write(report, out)
    return exit_code(report["parts"])


def exit_code(results: Sequence[Mapping[str, Any]]) -> int:
    """Return 1 where a part failed, else 2 where no test has passed, else 0."""
    if any(result["outcome"] == "failed" for result in results):
        return 1
    return 0 if any(test["outcome"] == "passed" for result in results for test in result.get("tests", ())) else 2


def write(report: Mapping[str, Any], out: Path) -> None:
    """Write what is known so far."""
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (out / "gpu_check.md").write_text(as_markdown(report), encoding="utf-8")


def describe_machine(device: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return versions and hardware, with the commit, from a process that imports torch.

    Raises:
        ValueError: there is no GPU, or something cannot be imported.
    """
    command = [sys.executable, "-m", "tests.gpu.machine", device]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip()[-3000:])
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "commit": git_commit(),
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that it ends its children."""

    def handler(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this machine; return the exit code."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="figures of a tiny model, not of 7B shapes")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="for gpu_check.md and .json (here)")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device is cpu, where 7B shapes take hours; add --tiny")
    for name, package in {**PACKAGES, **MORE}.items():
        if not installed(name):
            print(f"missing: {package} ({'every part needs it' if name in PACKAGES else 'some parts need it'})")
    if any(not installed(name) for name in PACKAGES):
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        machine = describe_machine(options.device, {**os.environ, "PYTHONPATH": str(ROOT)})
    except ValueError as error:
        print(f"nothing can be checked: {error}")
        return 2
    print(json.dumps(machine, indent=1), flush=True)
    with ended_in_order():
        code = check(parts_of(options.device, options.tiny), machine, options.out.resolve(), started + BUDGET)
    print((options.out / "gpu_check.md").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
