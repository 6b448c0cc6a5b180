"""What the checks share: a run of `train` on the fake device, and what must hold of it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from metatt_scale.recipe import Recipe
from metatt_scale.training import TrainedRun, checks, train
from metatt_scale.training.checkpoint import list_checkpoints
from metatt_scale.training.loop import Trainer
from tests.fake_cuda.device import CUDA, FakeCuda, Wait, fake_cuda
from tests.toy import quiet

torch.set_num_threads(1)

STEPS = {"max_steps": 3, "save_every": 2, "eval_every": 3, "batch_size": 8, "micro_batch_size": 4}
RARELY = {"every": 100}
"""Logs the last step only: on a logged step more numbers are read late than those of the step itself."""


@dataclass
class GpuRun:
    """A finished run and what the host waited for."""

    run: TrainedRun
    record: FakeCuda
    steps: int
    """Optimizer steps that were made."""


def run_on_gpu(recipe: Recipe) -> GpuRun:
    """Train a recipe on the fake device; placement is asserted at every step."""
    steps = 0
    launch = Trainer._launch

    def watched(trainer: Trainer) -> None:
        nonlocal steps
        launch(trainer)
        steps += 1
        check_placement(trainer)

    # Values are made up, and always the same: a run would be refused that ends with those it started from.
    learned = mock.patch.object(checks, "values_digest", lambda _: "other values")
    with mock.patch.object(Trainer, "_launch", watched), learned, fake_cuda() as record:
        record.queue = launch.__code__, Trainer._settle.__code__
        run = train(recipe, quiet())
    return GpuRun(run, record, steps)


def resume_on_gpu(recipe: Recipe) -> GpuRun:
    """Take the end of a finished run away, and train it again from the checkpoint before."""
    folder = Path(recipe.output_dir)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(list_checkpoints(folder / "checkpoints")[-1])
    resumed = run_on_gpu(recipe)
    total, before = recipe.training.max_steps, recipe.training.save_every
    assert isinstance(total, int) and isinstance(before, int) and resumed.steps == total - before
    return resumed


def check_placement(trainer: Trainer) -> None:
    """All that trains, and all of the optimizer's state, is on the device that computes."""
    for name, parameter in trainer.adapter.trained().items():
        assert parameter.device == CUDA, f"{name} is on {parameter.device}"
        state = trainer.optimizer.state[parameter]
        assert {"step", "exp_avg", "exp_avg_sq"} <= state.keys(), name
        for key, value in state.items():
            assert value.device == CUDA, f"the optimizer's {key} of {name} is on {value.device}"


def check_queue(done: GpuRun, late: int = 1) -> None:
    """Nothing holds up the queue of steps but the one late read of each."""
    assert not shown(done.record.in_step()), "\n".join(shown(done.record.in_step()))
    assert done.record.late_reads <= late * done.steps + 1  # the last step is logged


def shown(waits: list[Wait]) -> list[str]:
    """Return waits for a message, the most frequent first."""
    return [f"{count} x {wait.kind} in {wait.function} ({wait.line})" for wait, count in Counter(waits).most_common()]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tokens of one check are not those of another."""
    monkeypatch.setenv("METATT_CACHE", str(tmp_path / "metatt"))
    yield


MakeRecipe = Callable[[Path], Recipe]
