"""What a study file may ask for: frozen models with one docstring per key, as in a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from metatt_scale.recipe.scores import is_loss
from metatt_scale.recipe.section import PathText

Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]
HEADLINE = "headline"
"""As a metric: what each recipe is judged by, whatever that is."""
MEAN = "mean"
"""What no column can be called: the mean over all of them."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Choose(_Section):
    """How every arm gets its own value of one key, on records that are not reported."""

    key: str = Field(min_length=1)
    """Dotted key of the recipe, for example training.learning_rate."""
    values: tuple[JsonValue, ...] = Field(min_length=1)
    """Values that are tried."""
    seeds: Seeds
    """Seeds of the trials of each value."""
    overrides: tuple[str, ...] = ()
    """Overrides of the trials, after the arm's: they say on which records the trials are scored."""
    columns: dict[str, tuple[str, ...]] = {}
    """Of several recipes: more overrides of the trials in a column, such as a length."""
    by: str = Field(min_length=1)
    """Key of metrics.jsonl that decides: the value with the best mean over the seeds of its last evaluation, of
    equal ones that of the least eval_loss, else the first. As in `score.metrics`, `headline` is the recipe's own."""


class Score(_Section):
    """The numbers that are reported."""

    metrics: tuple[str, ...] = ()
    """Keys of the evaluations in metrics.jsonl, for example eval_loss; or `headline`: of a classifier the score that
    it is judged by, of several tasks the mean of theirs, of a language model eval_loss."""
    tasks: tuple[str, ...] = ()
    """Tasks that `metatt-scale evaluate` scores after training."""
    higher_is_better: dict[str, bool] = {}
    """Which way a number is good, where its name does not say so: of names that end in loss less is better, of all
    others more."""

    @property
    def names(self) -> tuple[str, ...]:
        """All numbers, in the order of the table."""
        return (*self.metrics, *self.tasks)

    def prefers_more(self, name: str) -> bool:
        """Return whether more of a number is better."""
        return self.higher_is_better.get(name, not is_loss(name))

    @model_validator(mode="after")
    def _check(self) -> Score:
        if not self.names:
            raise ValueError("neither `metrics` nor `tasks` names a number to report; give at least one")
        if twice := _twice(self.names):
            raise ValueError(f"{twice} is named twice; keep one of them")
        return self


class Study(_Section):
    """Arms x seeds over one recipe, or over several, which are the columns of the table.

    Recipes and results are looked for from the study file; runs, and the data and backbones that recipes name, from
    the working folder, as by `train`.
    """

    name: str = Field(default="", pattern=r"^([A-Za-z0-9][\w.-]*)?$")
    """Name of the results; that of the study file when absent."""
    recipe: PathText = ""
    """Recipe that all runs start from, relative to the study file; or `recipes`."""
    recipes: dict[Name, Annotated[PathText, Field(min_length=1)]] = {}
    """Several recipes by the names of their columns; every arm is run, and chooses, on each."""
    columns: dict[str, tuple[str, ...]] = {}
    """Overrides of every run in a column, after those of `base` and before the arm's."""
    base: tuple[str, ...] = ()
    """Overrides of every run (dotted.key=value, as on the command line)."""
    arms: dict[Name, tuple[str, ...]] = {}
    """Overrides of each arm by its name: a letter or digit, then letters, digits and _ . + -"""
    grid: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = {}
    """Values by dotted key; every arm is run at every combination, and named after it."""
    seeds: Seeds
    """Seeds of the reported runs of each arm."""
    choose: Choose | None = None
    """Choose the value of one key for each arm (on each of several recipes) before its reported runs."""
    score: Score
    """What is reported."""
    compare: tuple[tuple[str, str], ...] = ()
    """Pairs of arms whose difference is tested over their common seeds (on each of several recipes, and the mean)."""
    jobs: int = Field(default=1, ge=1, le=64)
    """Runs at a time; they share the machine's memory. Each sees one GPU, and where there are fewer GPUs than runs at
    a time some share one."""
    runs_dir: PathText = ""
    """Folder of the run directories, relative to the working folder; runs/studies/NAME when absent."""

    @model_validator(mode="after")
    def _check(self) -> Study:
        if bool(self.recipe) == bool(self.recipes):
            given = "both `recipe` and `recipes` are" if self.recipe else "neither `recipe` nor `recipes` is"
            raise ValueError(
                f"{given} given; name one recipe, or several by their columns, for example `recipes: {{cola: PATH}}`"
            )
        for key, named in (("columns", self.columns), ("choose.columns", self.choose.columns if self.choose else ())):
            if unknown := next((name for name in named if name not in self.recipes), None):
                raise ValueError(f"`{key}` has {unknown}, but `recipes` {', '.join(self.recipes) or 'is not given'}")
        if MEAN in self.recipes:
            raise ValueError(f"`recipes` has a column {MEAN}, which is the mean over all of them; call it otherwise")
        if not self.arms and not self.grid:
            raise ValueError("neither `arms` nor `grid` is given; name at least one arm, for example `rank4: [...]`")
        for name, seeds in (("seeds", self.seeds), ("choose.seeds", self.choose.seeds if self.choose else ())):
            if twice := _twice(seeds):
                raise ValueError(f"`{name}` holds {twice} twice; every seed is one run, keep one of them")
        if self.choose and self.choose.by in self.score.tasks:
            raise ValueError(
                f"`choose.by` is {self.choose.by}, a task that is reported; choose by a key of metrics.jsonl"
            )
        return self


def _twice(values: tuple[object, ...]) -> object | None:
    """Return a value that occurs twice, or None."""
    return next((value for k, value in enumerate(values) if value in values[:k]), None)
