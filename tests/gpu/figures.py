"""Figures of a GPU at 7B shapes: a training step over the frozen model's, its memory beside `plan`, its waits.

    python -m tests.gpu.figures FILE --quantization none   # or nf4; --device cpu --tiny shows the logic alone

Timing and arms are those of `metatt-scale benchmark --table steps` (metatt_scale/benchmark/steps.py); here a step is
one packed micro-batch, and the weights are made on the device, where 7 billion random numbers take seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from metatt_scale.backbone import pick_attention
from metatt_scale.backbone.quantised import linears_to_pack, pack
from metatt_scale.benchmark.arms import FROZEN, Work, builders
from metatt_scale.benchmark.memory import held_bytes
from metatt_scale.benchmark.report import Report, describe_machine, describe_targets, ratio_cells
from metatt_scale.benchmark.steps import build_arms, measure_arms
from metatt_scale.data import IGNORE, Batch
from metatt_scale.plan.estimate import Machine, plan
from metatt_scale.recipe import Recipe, validate
from metatt_scale.recipe.architectures import architecture_file
from metatt_scale.training.start import make_ready
from tests.gpu.waits import count_waits
from tests.toy import LLAMA

_GIB = 2**30
_LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"
_COLUMNS = ("arm", "trained", "ms", "/ frozen", "range", "peak GiB", "plan GiB", "waits")
_NOTES = (
    "step: forward and backward of one packed micro-batch, in turns; medians with ranges. Folding and pulling back "
    "are in MetaTT's, the optimizer's update in none. PEFT's adapters are in fp32, its default, unless named "
    "otherwise.",
    "peak: weights, adapter and a step, from a pass that is not timed. plan: what `metatt-scale plan` says of as "
    "many tokens, with AdamW's moments, which a step here has not; it speaks of chains only.",
    "waits: how often the host waits for the device in a step, as torch.cuda.set_sync_debug_mode counts.",
)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a step of every arm does."""

    config: dict[str, Any]
    """Of the model."""
    lengths: tuple[int, ...]
    """Tokens of each example of the packed row; the last eighth of each is to be predicted."""
    rank: int
    repeats: int
    """Rounds that count."""

    @property
    def mean(self) -> int:
        """Tokens of an example."""
        return sum(self.lengths) // len(self.lengths)


def shapes_of(tiny: bool) -> Shapes:
    """Return Llama-2-7B and 16 examples of 76 to 436 tokens, 4096 together; or what a CPU does in a second."""
    if tiny:
        config = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        return Shapes(config=config, lengths=(6, 10, 8), rank=4, repeats=2)
    file = architecture_file(_LLAMA_2_7B)
    assert file is not None
    return Shapes(config=json.loads(file.read_text()), lengths=tuple(range(76, 437, 24)), rank=16, repeats=9)


def figures(recipe: Recipe, shapes: Shapes, device: torch.device) -> Report:
    """Measure frozen model, MetaTT-4D and LoRA on weights of the recipe's kind."""
    model = random_model(recipe, shapes.config, device)
    packed = make_ready(model, True, device, Console(quiet=True))
    assert packed
    weights = _bytes_of(model, device)
    work = Work(recipe=recipe, batch=packed_batch(model, shapes.lengths), device=device)
    chosen = (FROZEN, f"MetaTT-4D r={shapes.rank}", "LoRA r=8", f"LoRA r=8 in {recipe.backbone.dtype}")
    every = builders(recipe, (shapes.rank,))
    arms = build_arms(model, work, {name: every[name] for name in chosen}, _show)
    rows = measure_arms(arms, shapes.repeats, device, _show)
    planned = plan(recipe, Machine(answers=max(1, shapes.mean // 8)))["memory"]
    for row in rows:
        _show(f"waits: {row['arm']}")
        row["waits"] = count_waits(arms[row["arm"]].step, device)
        row["peak_in_all"] = weights + row["peak_bytes"]
        row["planned"] = planned["peak"] if row["arm"].startswith("MetaTT") else None
    attention, quantization = model.config._attn_implementation, recipe.backbone.quantization
    return Report(
        table="gpu-check",
        title=f"{recipe.backbone.dtype}, quantization {quantization}: {model.config.num_hidden_layers} layers of "
        f"{model.config.hidden_size}, attention {attention}, adapted {describe_targets(recipe)}, "
        f"{len(shapes.lengths)} examples packed into {sum(shapes.lengths)} tokens",
        machine=describe_machine(device),
        columns=_COLUMNS,
        cells=tuple(_cells(row) for row in rows),
        rows=tuple(rows),
        settings={"lengths": shapes.lengths, "weights": weights, "plan": planned},
        notes=_NOTES,
    )


def recipe_of(folder: Path, shapes: Shapes, quantization: str) -> Recipe:
    """Return the recipe that plan and arms read; its batch has as many tokens as the packed row."""
    file = folder / "config.json"
    file.write_text(json.dumps(shapes.config))
    examples = len(shapes.lengths)
    data = {"train": [{"path": "unused"}], "cutoff_length": shapes.mean}
    return validate(
        {
            "output_dir": "unused",
            "backbone": {"path": f"random:{file}", "dtype": "bfloat16", "quantization": quantization},
            "adapter": {"kind": "metatt_4d", "rank": shapes.rank},
            "data": data,
            "training": {"batch_size": examples, "micro_batch_size": examples},
        },
        "gpu-check",
    )


def random_model(recipe: Recipe, config: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """Return a frozen model in train mode whose random weights were made on the device."""
    backbone = recipe.backbone
    named = dict(config)
    built = AutoConfig.for_model(named.pop("model_type"), **named)
    attention = pick_attention(backbone.attention, device, backbone.dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            built, dtype=getattr(torch, backbone.dtype), attn_implementation=attention
        )
    model.requires_grad_(False)
    if backbone.quantization != "none":
        pack(model, linears_to_pack(model, backbone, device), backbone, device)
    return model.train()


def packed_batch(model: PreTrainedModel, lengths: tuple[int, ...]) -> Batch:
    """Return random examples of these lengths in one row."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BS = torch.randint(0, vocabulary, (1, sum(lengths)), generator=generator)
    labels_BS, end = torch.full_like(ids_BS, IGNORE), 0
    for length in lengths:
        end += length
        answer = slice(end - max(1, length // 8), end)
        labels_BS[:, answer] = ids_BS[:, answer]
    return Batch(ids_BS, torch.ones_like(ids_BS), labels_BS, lengths=lengths)


def _bytes_of(model: PreTrainedModel, device: torch.device) -> int:
    """Return the bytes of all weights, of packed ones with their scales where the allocator tells."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return held_bytes([*model.parameters(), *model.buffers()])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        f"{row['trained']:,}",
        f"{1000 * statistics.median(row['seconds']):.1f}",
        *ratio_cells(row["time_ratio"]),
        f"{row['peak_in_all'] / _GIB:.2f}",
        "-" if row["planned"] is None else f"{row['planned'] / _GIB:.2f}",
        str(row["waits"]),
    )


def _show(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    shapes = shapes_of(options.tiny)
    report = figures(recipe_of(options.file.parent, shapes, options.quantization), shapes, device)
    options.file.write_text(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
