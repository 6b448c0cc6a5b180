"""The results file of a study: one JSON object a line, appended when a run is finished, kept in git."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from metatt_scale.files import fsync_folder, naming, write_text
from metatt_scale.json_files import Count, Form, Size, parse_object, problem_of
from metatt_scale.study.contents import changed_files
from metatt_scale.study.runs import Run

Line = dict[str, Any]
Key = tuple[str, int, str | None]


# Sums and squares of these, which tables are made of, are finite.
_Number = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]


class _ScoreForm(Form):
    last: _Number | None
    best: _Number | None
    per_epoch: list[_Number | None]


class _RunForm(Form):
    arm: str
    seed: int
    tried: str | None
    digest: str
    overrides: list[str]
    scores: dict[str, _ScoreForm]
    seconds: Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
    trainable_parameters: Count
    head_parameters: Count = 0
    ranks: list[Size]
    data: dict[str, str] = Field(default={})
    device: str | None = None
    torch: str | None = None
    metatt_scale: str | None = None
    git_commit: str | None = None


class _ChoiceForm(Form):
    arm: str
    chosen: str
    by: str
    means: dict[str, _Number | None]


class Results:
    """What is known of a study: its finished runs and the choices made from them."""

    def __init__(self, path: Path) -> None:
        """Read the file where there is one.

        Raises:
            ValueError: a line other than the last is not one of ours.
        """
        self.path = path
        self.cut_short: str | None = None
        """What stands after the last whole line: a crash cut it short."""
        self._runs: dict[Key, Line] = {}
        self._choices: dict[str, Line] = {}
        *lines, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
        self._must_repair = bool(last)
        self._whole: list[str] = []
        for number, line in enumerate([*lines, last], start=1):
            if not line.strip():
                continue
            try:
                self._take(parse_object(line, Form))
            except ValueError as error:
                if number > len(lines):
                    self.cut_short = line.decode("utf-8", errors="replace")
                    break
                raise ValueError(
                    f"{path}, line {number}: not a line of results ({problem_of(error)}); fix it, or take the file "
                    "from git"
                ) from None
            self._whole.append(line.decode("utf-8"))

    def of(self, run: Run) -> Line | None:
        """Return the line of a finished run.

        Raises:
            ValueError: the line was made by another definition of the run, or with other records.
        """
        line = self._runs.get(run.key)
        if line is not None and line["digest"] != run.digest:
            changed = f"the overrides are the same, so the recipe has changed ({run.recipe})"
            if line["overrides"] != list(run.overrides):
                before, now = (" ".join(overrides) or "(none)" for overrides in (line["overrides"], run.overrides))
                changed = f"its overrides were {before}, now they are {now}, or the recipe has changed"
            raise ValueError(
                f"{self.path} holds a result of {run.label} that was made with other settings: {changed}. Give the "
                "arm or the study another name, or remove the lines of this arm, and its runs in "
                f"{run.folder.parent}"
            )
        if line is not None and (files := changed_files(line.get("data", {}), run.data)):
            raise ValueError(
                f"{self.path} holds a result of {run.label} that was made with other records: {', '.join(files)} "
                "changed since. Bring the file back, or give the arm or the study another name, or remove the lines "
                f"of this arm, and its runs in {run.folder.parent}"
            )
        return line

    def has(self, run: Run, names: Iterable[str]) -> bool:
        """Return whether a run is finished and all of the named numbers are known."""
        line = self.of(run)
        return line is not None and set(names) <= line["scores"].keys()

    def choice(self, arm: str) -> Line | None:
        """Return the recorded choice of an arm."""
        return self._choices.get(arm)

    def unused(self, known: Iterable[Key]) -> int:
        """Return how many finished runs are none of the known ones."""
        return len(self._runs.keys() - set(known))

    @property
    def seconds(self) -> list[float]:
        """How long each finished run took."""
        return [line["seconds"] for line in self._runs.values()]

    def append(self, line: Line) -> None:
        """Add a line and make it durable.

        Raises:
            ValueError: it is none that could be read again; nothing was written.
        """
        self._take(line)
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        if self._must_repair:
            write_text(self.path, "".join(f"{whole}\n" for whole in self._whole))
            self._must_repair = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self.path.parent)

    def _take(self, line: Line) -> None:
        if "chosen" in line:
            _ChoiceForm.model_validate(line)
            self._choices[line["arm"]] = line
            return
        _RunForm.model_validate(line)
        self._runs[line["arm"], line["seed"], line["tried"]] = line
