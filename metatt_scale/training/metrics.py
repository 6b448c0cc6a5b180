"""Where numbers go while a run trains: metrics.jsonl, experiment trackers, and the terminal."""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from metatt_scale.files import naming, write_text
from metatt_scale.json_files import Form, parse_object
from metatt_scale.recipe import Recipe, task_headline
from metatt_scale.run_files import Step


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with its `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open the file, without the lines behind a step, which will be written again, and those that are none.

        Args:
            path: of the file, which may be there.
            resume_step: of the checkpoint from which the run goes on.
        """
        self._path = path
        self.left_out: list[int] = []
        """Numbers of the lines that could not be read; the last line of a killed run is not among them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            write_text(path, self._kept(path.read_bytes(), resume_step))
        self._file = path.open("a", encoding="utf-8")

    def _kept(self, content: bytes, resume_step: int) -> str:
        kept = []
        lines = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                # NaN and Infinity: of versions that wrote them.
                step = parse_object(line, _LineForm, parse_constant=lambda _: None)["step"]
            except ValueError:
                if line.strip() and number < len(lines):
                    self.left_out.append(number)
                continue
            if step <= resume_step:
                kept.append(line.decode("utf-8") + "\n")
        return "".join(kept)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):  # what could not be written is tried once more
            self._file.close()


def left_out(metrics: MetricsFile) -> str:
    """Return what to say of the lines that were left out."""
    numbers = ", ".join(map(str, metrics.left_out[:10])) + (", ..." if len(metrics.left_out) > 10 else "")
    return (
        f"metrics.jsonl: left out {len(metrics.left_out)} lines that could not be read (line {numbers}); all others "
        "were kept"
    )


class _LineForm(Form):
    step: Step


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers whose packages are missing, before anything is loaded or written.

    Raises:
        ValueError: one is not installed.
    """
    if not recipe.logging.trackers:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in recipe.logging.trackers if name not in available]
    if missing:
        raise ValueError(
            f"logging.trackers names {', '.join(missing)}, but that package is not installed; "
            f"run `pip install {' '.join(missing)}` or remove it from the list"
        )


class Trackers:
    """Experiment trackers of accelerate (TensorBoard, Weights & Biases, MLflow, trackio), if the recipe names any.

    Only rank 0 makes them. A tracker that fails is reported once and gets no more numbers; training goes on, and
    metrics.jsonl has all of them.
    """

    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        """Start the trackers and give them the recipe.

        Args:
            recipe: names them in `logging.trackers`.
            folder: the run directory, for those that write files.
            console: told of a tracker that fails.
        """
        self._console = console
        self._running: dict[str, Any] = {}
        if not recipe.logging.trackers:
            return
        from accelerate import tracking

        # Its classes ask PartialState for the rank before every call and every line they log. To make one is to start
        # a process group, choose a device or set the number of threads, which `join` and the launcher have done.
        tracking.logger = _TrackerLog(logging.getLogger(tracking.__name__), {})  # type: ignore[assignment]
        settings = _flat(recipe.model_dump(mode="json"))
        for name in dict.fromkeys(recipe.logging.trackers):
            kind: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
            tracker = kind(recipe.logging.project, *([folder] if kind.requires_logging_directory else []))
            tracker.main_process_only = False
            self._running[name] = tracker
        self._each(lambda tracker: tracker.start())
        self._each(lambda tracker: tracker.store_init_configuration(settings))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers among `values`."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def close(self) -> None:
        """Finish all trackers."""
        self._each(lambda tracker: tracker.finish())
        self._running.clear()

    def _each(self, act: Callable[[Any], object]) -> None:
        """Do something with every tracker; drop those that fail, so that none delays training again and again."""
        for name, tracker in list(self._running.items()):
            try:
                act(tracker)
            except Exception as error:  # of any class: each package has its own
                del self._running[name]
                reason = (str(error).strip().splitlines() or ["no message"])[0]
                self._console.print(
                    f"logging.trackers: {name} failed ({type(error).__name__}: {reason}) and gets no more numbers; "
                    "training goes on, and metrics.jsonl has all of them",
                    style="yellow",
                    highlight=False,
                    soft_wrap=True,
                )


class _TrackerLog(logging.LoggerAdapter):
    """A plain log with the one method that accelerate's has besides."""

    def warning_once(self, message: str) -> None:
        self.warning(message)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return result


def shown(recipe: Recipe, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of a step that a person follows while waiting; of several tasks their headlines."""
    numbers = {
        "loss": "not finite, skipped" if report["loss"] is None else f"{report['loss']:.4f}",
        "lr": f"{report['learning_rate']:.2e}",
        "tok/s": f"{report['tokens_per_second']:.0f}",
        **({"ranks": ",".join(map(str, report["ranks"]))} if "ranks" in report else {}),  # of a chain
        "mem": f"{report['memory_gib']:.1f}G",
    }
    headlines = [task_headline(recipe.label_sets, task) for task in recipe.tasks]
    for name in ("eval_loss", recipe.headline, *headlines) if recipe.tasks else recipe.evaluation_keys:
        if name in report:
            label = "eval" if name == "eval_loss" else name.removeprefix("eval_")
            numbers[label] = "not finite" if report[name] is None else f"{report[name]:.4f}"
    return numbers


class ProgressBar:
    """A live bar on a terminal; elsewhere a line for the first step, every `every` steps, and each evaluation."""

    def __init__(self, console: Console, total: int, done: int, every: int) -> None:
        self._console, self._every, self._total, self._first = console, every, total, done + 1
        self._live: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._live = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._live.add_task("train", total=total, completed=done, numbers="")
            self._live.start()

    def update(self, step: int, numbers: Mapping[str, Any], seconds_left: float) -> None:
        """Show a step's numbers."""
        text = "  ".join(f"{key} {value}" for key, value in numbers.items())
        if self._live is not None:
            self._live.update(self._task, completed=step, numbers=text)
        elif step % self._every == 0 or step in (self._first, self._total) or "eval" in numbers:
            minutes, seconds = divmod(round(seconds_left), 60)
            line = f"step {step}/{self._total}  {text}  left {minutes}:{seconds:02d}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: of the allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
