"""Checkpoints that are whole or absent, and a resume that gives the same bits.

    checkpoints/step-000100/
        state.safetensors   trained values, AdamW moments, the best values so far, a classifier's frozen head
        state.json          step, counters, the recipe, world size, threads and kernels
        COMPLETE            hashes of the two, written last; the folder is renamed into place after that

Everything else a run needs is a pure function of (recipe, step): data order, dropout, learning rate.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metatt_scale.adapter import Adapter
from metatt_scale.determinism import kernels_of
from metatt_scale.files import new_folder, save_tensors, sha256, write_json
from metatt_scale.json_files import read_json
from metatt_scale.parallel import World
from metatt_scale.recipe import Recipe, validate
from metatt_scale.run_files import MarkerForm, StateForm
from metatt_scale.tensor import check_chain
from metatt_scale.tensor_files import Forms, TensorForm, difference, forms_of, read_tensors
from metatt_scale.training.optimizer import Moments, moments_of, named

_MARKER, _STATE, _TENSORS = "COMPLETE", "state.json", "state.safetensors"
_NAME = re.compile(r"step-(\d{6,})")
# What may differ between the run that wrote a checkpoint and the one that resumes it: nothing here decides a bit of
# a step.
_FREE = (
    "data.cache_dir",
    "training.max_nonfinite_steps",
    "output_dir",
    "device",
    "evaluation",
    "logging",
    "training.resume",
    "training.save_every",
    "training.keep_checkpoints",
    "parallel",
)


@dataclass(kw_only=True)
class RunState:
    """All of a run's state that is not a tensor."""

    step: int = 0
    """Optimizer steps done (skipped ones too)."""
    skipped: int = 0
    """Steps skipped because loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    """Loss of the best evaluation so far."""
    best_metric: float | None = None
    """Its headline score, where that made it the best (`training.best_by: metric`)."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    target_tokens: int = 0
    """Target tokens trained on (of a classifier: examples)."""
    start_scores: dict[str, float] = field(default_factory=dict)
    """Scores before the first step, of a run that goes on from another one."""
    tasks_before: list[str] = field(default_factory=list)
    """Tasks of that other one."""
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    """Sweeps so far: step, and ranks after it."""
    start_values: str = ""
    """Digest of the trained values before the first step; empty where an earlier version began the run."""
    last_evaluation_finite: bool = True
    """False where the last evaluation gave a loss that is not finite."""
    finished: bool = False
    """Nothing is left to train (all steps done, or stopped early)."""

    def improved(self, loss: float, metric: float | None = None) -> bool:
        """Take note of an evaluation; return whether it is the best so far, by its metric if that is given."""
        if metric is not None:
            better = self.best_metric is None or metric > self.best_metric
        else:
            better = self.best_loss is None or loss < self.best_loss
        if not (better and math.isfinite(loss) and (metric is None or math.isfinite(metric))):
            self.evaluations_without_gain += 1
            return False
        self.best_loss, self.best_metric, self.best_step = loss, metric, self.step
        self.evaluations_without_gain = 0
        return True

    def forget_best(self) -> None:
        """Let the next evaluation be the best so far."""
        self.best_loss = self.best_metric = self.best_step = None
        self.evaluations_without_gain = 0


@dataclass(kw_only=True)
class Snapshot:
    """A checkpoint in memory."""

    progress: RunState
    values: dict[str, Tensor]
    """The adapter's tensors by name: trained ones, and what it keeps beside them."""
    moments: dict[str, Moments]
    """AdamW's state of the trained ones; empty before the first step."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The adapter's tensors at the best evaluation so far, if there was one."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """A classifier's frozen head, whole: without it the adapter means nothing, and it may come from another run."""
    inputs: str = ""
    """Digest of the tokenised records and of the backbone's weights."""
    world_size: int = 1
    threads: int = 1
    kernels: str = "the CPU"
    """What it was computed by, as `kernels_of` says it."""

    def to_message(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what JSON can hold and the named tensors: the form on disk and on the wire."""
        tensors = {f"value:{name}": value for name, value in self.values.items()}
        tensors |= {f"best:{name}": value for name, value in self.best.items()}
        tensors |= {f"head:{name}": value for name, value in self.head.items()}
        for name, moments in self.moments.items():
            tensors |= {f"adam:{name}:{key}": value for key, value in moments.items()}
        state = {
            "progress": asdict(self.progress),
            "inputs": self.inputs,
            "world_size": self.world_size,
            "threads": self.threads,
            "kernels": self.kernels,
        }
        return state, {name: value.cpu().contiguous() for name, value in tensors.items()}

    @classmethod
    def from_message(cls, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
        """Undo `to_message`."""
        moments: dict[str, Moments] = {}
        for found, tensor in named(tensors, "adam:").items():
            name, _, key = found.rpartition(":")
            moments.setdefault(name, {})[key] = tensor
        return cls(
            progress=RunState(**state["progress"]),
            values=named(tensors, "value:"),
            moments=moments,
            best=named(tensors, "best:"),
            head=named(tensors, "head:"),
            inputs=state["inputs"],
            world_size=state["world_size"],
            threads=state["threads"],
            kernels=state.get("kernels", cls.kernels),
        )


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a checkpoint of a run must hold; nothing else is installed."""

    values: Forms
    """Of the adapter's tensors. Where the recipe has a sweep, the ranks of its cores may be others."""
    trained: frozenset[str]
    """Names of those that have AdamW's moments."""
    head: Forms
    """Of a classifier's frozen head."""
    total_steps: int | None
    """Of the whole run; None where that is not known."""


def expected(adapter: Adapter, head: Mapping[str, Tensor] | None = None, total_steps: int | None = None) -> Expected:
    """Return what a checkpoint of a run with this adapter must hold."""
    return Expected(
        values=forms_of(adapter.tensors()),
        trained=frozenset(adapter.trained()),
        head=forms_of(head or {}),
        total_steps=total_steps,
    )


def take_snapshot(
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    progress: RunState,
    best: Mapping[str, Tensor],
    inputs: str,
    world: World,
    head: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Collect what `save` writes."""
    return Snapshot(
        progress=progress,
        values=adapter.tensors(),
        moments=moments_of(optimizer, adapter.trained()),
        best=dict(best),
        head=dict(head or {}),
        inputs=inputs,
        world_size=world.size,
        threads=torch.get_num_threads(),
        kernels=kernels_of(world.device),
    )


def save(root: Path, snapshot: Snapshot, recipe: Recipe) -> Path:
    """Write `step-N` below `root` and remove all but the newest `training.keep_checkpoints` that are whole.

    Later steps are there only where they were passed over as damaged; they go too.
    """
    folder = root / _folder_name(snapshot.progress.step)
    state, tensors = snapshot.to_message()
    state |= {"torch": torch.__version__, "recipe": recipe.model_dump(mode="json")}
    with new_folder(folder, replace=True) as temporary:
        save_tensors(temporary / _TENSORS, tensors)
        write_json(temporary / _STATE, state)
        write_json(temporary / _MARKER, {name: sha256(temporary / name) for name in (_STATE, _TENSORS)})
    found = list_checkpoints(root)
    whole = [path for path in found[: found.index(folder) + 1] if _is_whole(path)]
    for old in found:
        if old not in whole[-recipe.training.keep_checkpoints :]:
            shutil.rmtree(old)
    for leftover in root.glob(".step-*"):  # a run killed while writing
        shutil.rmtree(leftover, ignore_errors=True)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """Return all checkpoint folders below `root`, oldest first, valid or not."""
    found = [path for path in root.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load(folder: Path, recipe: Recipe, wanted: Expected) -> Snapshot:
    """Read one checkpoint.

    Raises:
        DamagedCheckpointError: cut short, wrong hash, or not what a run leaves.
        ValueError: made by another recipe, or for tensors of other shapes.
    """
    state = _verified_state(folder)
    differences = _differences(_with_defaults(state["recipe"]), recipe.model_dump(mode="json"))
    if differences:
        raise ValueError(
            f"{folder}: made by another recipe ({'; '.join(differences[:4])}); use another output_dir, or take the "
            "settings back"
        )
    try:
        tensors = read_tensors(folder / _TENSORS)
    except ValueError as error:
        raise DamagedCheckpointError(f"{folder}: unreadable ({error})") from None
    snapshot = Snapshot.from_message(state, tensors)
    if missing := wanted.values.keys() - snapshot.values.keys():
        raise DamagedCheckpointError(f"{folder}: unreadable (it lacks {', '.join(sorted(missing))})")
    if problem := _wrong_values(snapshot.values, wanted.values, recipe):
        raise ValueError(f"{folder}: {problem}; not the same adapter, use another output_dir")
    problem = _wrong_progress(folder, snapshot.progress, recipe, wanted) or _wrong_tensors(tensors, snapshot, wanted)
    if problem:
        raise DamagedCheckpointError(f"{folder}: unreadable ({problem})")
    return snapshot


def _wrong_values(values: Mapping[str, Tensor], wanted: Forms, recipe: Recipe) -> str | None:
    """Return what is wrong with the adapter's tensors; after sweeps the cores have any ranks, but the same modes."""
    found = forms_of(values)
    if recipe.sweep is not None:
        cores = [found[name] for name in wanted if name in found and name.startswith("core_")]
        if all(len(core.shape) == 3 for core in cores):
            wanted = _with_ranks_of(found, wanted)
    problem = difference(found, wanted)
    if problem is None and recipe.sweep is not None:
        try:
            check_chain([value for name, value in values.items() if name.startswith("core_")])
        except ValueError as error:
            problem = str(error)
    return problem


def _with_ranks_of(found: Forms, wanted: Forms) -> dict[str, TensorForm]:
    def adjusted(name: str, form: TensorForm) -> TensorForm:
        if not name.startswith("core_") or name not in found:
            return form
        left, _, right = found[name].shape
        return form._replace(shape=(left, form.shape[1], right))

    return {name: adjusted(name, form) for name, form in wanted.items()}


def _wrong_tensors(tensors: Mapping[str, Tensor], snapshot: Snapshot, wanted: Expected) -> str | None:
    """Return which tensor is not of the form that goes with the values: fused AdamW would write past its end."""
    values = forms_of(snapshot.values)
    forms = {f"value:{name}": form for name, form in values.items()}
    if snapshot.best:
        forms |= {f"best:{name}": form for name, form in values.items()}
    if snapshot.head:
        forms |= {f"head:{name}": form for name, form in wanted.head.items()}
    for name in snapshot.moments.keys() & wanted.trained:
        moment = values[name]
        forms |= {f"adam:{name}:{key}": moment for key in ("exp_avg", "exp_avg_sq")}
        forms[f"adam:{name}:step"] = TensorForm((), torch.float32)
    if problem := difference(forms_of(tensors), forms):
        return problem
    bad = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    return f"{bad} is not finite" if bad is not None else None


def _wrong_progress(folder: Path, progress: RunState, recipe: Recipe, wanted: Expected) -> str | None:
    """Return why a run cannot have come to this point."""
    if folder.name != _folder_name(progress.step):
        return f"it is of step {progress.step}"
    total, patience = wanted.total_steps, recipe.training.early_stopping_patience
    if total is None:
        return None
    if progress.step > total:
        return f"it is of step {progress.step}, but the run has {total}"
    if progress.finished != (progress.step == total) and not (
        progress.finished and patience is not None and progress.evaluations_without_gain >= patience
    ):
        return f"`progress.finished` is {progress.finished} at step {progress.step} of {total}"
    return None


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


class DamagedCheckpointError(ValueError):
    """A checkpoint folder that cannot be trusted; an older one may be."""


def newest_valid(root: Path, recipe: Recipe, wanted: Expected) -> tuple[Path | None, Snapshot | None, list[str]]:
    """Return the newest checkpoint that is whole, and a message for each damaged one passed over.

    Raises:
        ValueError: the newest whole checkpoint belongs to another recipe or shape.
    """
    refused: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        try:
            return folder, load(folder, recipe, wanted), refused
        except DamagedCheckpointError as error:
            refused.append(str(error))
    return None, None, refused


def _is_whole(folder: Path) -> bool:
    try:
        _verified_state(folder)
    except DamagedCheckpointError:
        return False
    return True


def _verified_state(folder: Path) -> dict[str, Any]:
    remedy = "remove the folder, or take it from a backup"
    try:
        marker = read_json(folder / _MARKER, MarkerForm, remedy)
        for name in (_STATE, _TENSORS):
            if sha256(folder / name) != marker[name]:
                raise DamagedCheckpointError(f"{folder}: the hash of {name} is not the one in {_MARKER}")
        return read_json(folder / _STATE, StateForm, remedy)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DamagedCheckpointError(f"{folder}: cut short, {missing} is missing") from None
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder}: unreadable ({error})") from None


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved recipe with the keys that did not exist yet when it was written."""
    try:
        return validate(saved, "checkpoint").model_dump(mode="json")
    except ValueError:  # written by a version with other rules
        return saved


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    result: list[str] = []
    for key in [*wanted, *(key for key in saved if key not in wanted)]:
        dotted = f"{prefix}{key}"
        old, new = saved.get(key), wanted.get(key)
        if dotted == "tasks" and old == new and list(old or ()) != list(new or ()):
            result.append(f"tasks were in the order {', '.join(old or ())}, are in {', '.join(new or ())}")
        if dotted in _FREE or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            result += _differences(old, new, f"{dotted}.")
        else:
            result.append(f"{dotted} was {old!r}, is {new!r}")
    return result
