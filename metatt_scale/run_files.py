"""The schemas of the JSON files that a run leaves and later commands read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from metatt_scale.json_files import ClosedForm, Count, Form, Number, Sha256, Size

Step = Annotated[int, Field(ge=0, lt=10**9)]
"""No run has more steps, and axes cannot hold many more."""
Sizes = Annotated[list[Size], Field(min_length=1, max_length=8)]
"""One per mode or inner bond of a chain: there are at most six modes."""


class MarkerForm(ClosedForm):
    """COMPLETE of a checkpoint."""

    state: Sha256 = Field(alias="state.json")
    tensors: Sha256 = Field(alias="state.safetensors")


class SweepForm(Form):
    """A sweep that was made."""

    step: Step
    ranks: Sizes


class ProgressForm(ClosedForm):
    """How far a run has come; keys with defaults are not in the files of earlier versions."""

    step: Step
    skipped: Step
    skipped_in_a_row: Step
    best_loss: Number | None
    best_metric: Number | None = None
    best_step: Step | None
    evaluations_without_gain: Step
    target_tokens: Count
    start_scores: dict[str, Number] = Field(default={})
    tasks_before: list[str] = Field(default=[])
    sweeps: list[SweepForm] = Field(default=[])
    start_values: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    last_evaluation_finite: bool = True
    finished: bool

    @model_validator(mode="after")
    def _check(self) -> ProgressForm:
        latest = max([self.skipped, self.best_step or 0, *(sweep.step for sweep in self.sweeps)])
        if latest > self.step or self.skipped_in_a_row > self.skipped:
            raise ValueError(f"the counters contradict each other: nothing can lie behind step {self.step}")
        if (self.best_step is None) != (self.best_loss is None):
            raise ValueError("the best evaluation must have a step and a loss, or neither")
        return self


class StateForm(Form):
    """state.json of a checkpoint."""

    progress: ProgressForm
    inputs: str
    world_size: Annotated[int, Field(ge=1, lt=2**20)]
    threads: Annotated[int, Field(ge=1, lt=2**16)]
    kernels: str = "the CPU"
    recipe: dict[str, Any]


class TargetForm(ClosedForm):
    """A linear module behind which an adapter stands."""

    path: Annotated[str, Field(min_length=1, max_length=1000)]
    layer: Step
    projection: Step
    d_in: Size
    d_out: Size
    transposed: bool = False


class ChainForm(Form):
    """What metatt.json says of a chain, if it is of one, and of the run."""

    modes: list[str] | None = None
    sizes: Sizes | None = None
    ranks: Sizes | None = None
    head_parameters: Count = 0
    contents: dict[str, str] = Field(default={})


class DescriptionForm(ChainForm):
    """What a report reads of metatt.json, which may have been edited."""

    trainable_parameters: Count | None = None
    layers: list[Step | str] = Field(default=[])
    projections: list[str] = Field(default=[])


class AdapterForm(ChainForm):
    """metatt.json of an adapter; keys with defaults are those of chains, or not in the files of earlier versions."""

    format: Literal[1]
    alpha: Number
    diagonal: bool = False
    summary: str = ""
    trainable_parameters: Count
    layers: list[Step]
    projections: list[str]
    targets: list[TargetForm]
    weights_sha256: Sha256
    head_sha256: Sha256 | None = None
    base_model: str
    base_model_weights: str | None = None
    kind: str
    step: Step
    target_tokens: Count
    records: list[str]
    recipe: dict[str, Any]
    metatt_scale: str

    @model_validator(mode="after")
    def _check(self) -> AdapterForm:
        places = {(target.layer, target.projection) for target in self.targets}
        paths = {target.path for target in self.targets}
        if not len(places) == len(paths) == len(self.targets):
            raise ValueError("`targets` has a module or a place in the chain twice")
        return self


class ScoreForm(Form):
    """What results.json has of one task."""

    metric: str
    samples: dict[str, Annotated[str, Field(pattern=r"^[01]+$")]]
    key: dict[str, str | int | None]
    seconds: Annotated[float, Field(ge=0, le=1e10)]

    @model_validator(mode="after")
    def _check(self) -> ScoreForm:
        if self.metric not in self.samples:
            raise ValueError(f"`metric` is {self.metric}, which `samples` has not")
        if len({len(answers) for answers in self.samples.values()}) != 1:
            raise ValueError("`samples` must have one answer a question under every metric")
        return self


class ResultsForm(Form):
    """results.json: scores by the model's label and the task."""

    scores: dict[str, dict[str, ScoreForm]] = Field(default={})


class CountsForm(Form):
    """How many records a cached source has."""

    __pydantic_extra__: dict[str, Count] = Field(init=False)  # type: ignore[assignment]
    records: Count
    skipped: Count


class EntryForm(Form):
    """meta.json of the token cache."""

    key: dict[str, Any]
    counts: CountsForm
    sha256: Sha256


class IndexForm(Form):
    """model.safetensors.index.json of a backbone in several files."""

    weight_map: dict[str, str]
