"""What the adapter costs: step times beside a frozen forward and backward, interleaved in one process."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import PreTrainedModel

from metatt_scale.adapter import find_targets, inject
from metatt_scale.backbone import load_backbone, pick_device
from metatt_scale.data import IGNORE, Batch
from metatt_scale.recipe import Recipe
from metatt_scale.training.loss import token_loss_sum


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Step times of one arm, in seconds, in the order they were taken."""

    name: str
    trained: int
    """Trained parameters."""
    seconds: tuple[float, ...]


def measure_steps(recipe: Recipe, *, examples: int, length: int, repeats: int) -> list[Timing]:
    """Time forward + backward of three arms in turn, A B C A B C ...: frozen, our adapter, PEFT LoRA r=8.

    The floor is the frozen model's own forward and backward with a gradient for the first layer's input. All arms
    see the same tokens; the loss is on the last eighth of each example. Two rounds of warm-up are not counted.
    """
    device = pick_device()
    base = load_backbone(recipe.backbone, device, recipe.seed).train()
    batch = _random_batch(base, examples, length)
    arms: dict[str, tuple[int, Callable[[], None]]] = {}
    for name, build in (("frozen", _frozen), (recipe.adapter.kind, _metatt), ("PEFT LoRA r=8", _lora)):
        arms[name] = build(copy.deepcopy(base), recipe, batch, device)
    del base
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(-2, repeats):
        for name, (_, step) in arms.items():
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            if round_number >= 0:
                times[name].append(time.perf_counter() - started)
    return [Timing(name=name, trained=arms[name][0], seconds=tuple(times[name])) for name in arms]


def ratios(timing: Timing, floor: Timing) -> tuple[float, float, float]:
    """Return median, smallest and largest ratio of an arm to the floor, round by round."""
    pairs = [a / b for a, b in zip(timing.seconds, floor.seconds, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def timing_table(timings: Sequence[Timing], recipe: Recipe) -> Table:
    """Return the arms with their times and ratios to the first; the title names versions and device."""
    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    backbone = recipe.backbone
    setting = f"{backbone.path}, {backbone.dtype}, quantization {backbone.quantization}"
    table = Table(title=f"{setting}; torch {torch.__version__}; {name}")
    for column in ("arm", "trained", "median s", "over frozen", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for timing in timings:
        middle, low, high = ratios(timing, timings[0])
        seconds = statistics.median(timing.seconds)
        table.add_row(
            timing.name, f"{timing.trained:,}", f"{seconds:.3f}", *(f"{r:.3f}" for r in (middle, low, high))
        )
    return table


def _random_batch(model: PreTrainedModel, examples: int, length: int) -> Batch:
    vocabulary = model.config.get_text_config().vocab_size
    ids_BS = torch.randint(0, vocabulary, (examples, length), generator=torch.Generator().manual_seed(0))
    labels_BS = ids_BS.clone()
    labels_BS[:, : length - max(1, length // 8)] = IGNORE
    return Batch(ids_BS, torch.ones_like(ids_BS), labels_BS)


def _frozen(
    model: PreTrainedModel, recipe: Recipe, batch: Batch, device: torch.device
) -> tuple[int, Callable[[], None]]:
    model.enable_input_require_grads()
    return 0, lambda: token_loss_sum(model, batch, device).backward()


def _metatt(
    model: PreTrainedModel, recipe: Recipe, batch: Batch, device: torch.device
) -> tuple[int, Callable[[], None]]:
    adapter = inject(model, recipe.adapter, recipe.seed)

    def step() -> None:
        token_loss_sum(model, batch, device).backward()
        adapter.pull_back()
        adapter.zero_grad()

    return adapter.spec.n_parameters, step


def _lora(
    model: PreTrainedModel, recipe: Recipe, batch: Batch, device: torch.device
) -> tuple[int, Callable[[], None]]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("the benchmark compares with PEFT, which is not installed; run `pip install peft`") from None
    paths = [
        target.path for target in find_targets(model, recipe.adapter.target_modules, recipe.adapter.layers).targets
    ]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=paths))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]

    def step() -> None:
        token_loss_sum(adapted, batch, device).backward()
        for parameter in trained:
            parameter.grad = None

    return sum(parameter.numel() for parameter in trained), step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
