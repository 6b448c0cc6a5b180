"""One global batch under every engine, precision, number of ranks and accumulation, against one process.

`python -m tests.distributed.equivalence [--ranks 1 2 4]` prints the matrix. Per cell: the relative difference of the
loss and of the gradient of all cores (2-norm) to the reference: one process without an engine that sends the whole
batch through at once, in the same precision. What is allowed:

fp32: 1e-5, the roundings of sums in another order.
bf16, nf4: the one-process reference itself differs by some e from the same weights computed in fp32, and a run that
rounds elsewhere may not differ from it by more than 2 e. That alone would hide much, so the gradient is held to less:
rows of a batch do not touch each other, so the split changes only the sums over rows, each rounded to 8 bits (2^-9)
once per module and micro-batch, in both runs: 2^-8 together, times 4 because the micro-batches cancel in part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from metatt_scale.adapter import ChainAdapter, inject
from metatt_scale.backbone import byte_tokenizer, load_backbone
from metatt_scale.data import prepare
from metatt_scale.ending import leave
from metatt_scale.parallel import Launch, Strategy, World, join, make_engine
from metatt_scale.recipe import Recipe
from metatt_scale.training.loop import Trainer
from metatt_scale.training.reduce import sum_step
from tests.distributed.jobs import finish, torchrun
from tests.tiny import FLOAT32, randomise
from tests.toy import CPU, LLAMA, quiet, toy_recipe, write_toy

STRATEGIES = ("replicate", "fsdp2", "zero3")
PRECISIONS = ("fp32", "bf16", "nf4")
RANKS = (1, 2, 4)
ACCUMULATIONS = (1, 4)
CHECKPOINTING = (False, True)
BATCH = 16
MODEL = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}  # 4-bit weights need multiples of 64 on a CPU
ALONE = Launch(strategy="replicate")


def recipe_for(folder: Path, precision: str, ranks: int, accumulation: int, checkpointing: bool) -> Recipe:
    """The toy recipe of one cell: the same global batch for all of them."""
    backbone: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    if precision == "fp32":
        backbone["dtype"] = "float32"
    else:
        backbone |= {"dtype": "bfloat16", "quantization": "nf4" if precision == "nf4" else "none"}
    micro = BATCH // (ranks * accumulation)
    return toy_recipe(folder, backbone=backbone, training={"batch_size": BATCH, "micro_batch_size": micro})


def make_trainer(recipe: Recipe, world: World, launch: Launch) -> Trainer:
    """The trainer that `train` would make, but with cores of random values."""
    engine = make_engine(world, launch, recipe)
    model = load_backbone(recipe.backbone, CPU, recipe.seed, engine)
    adapter = inject(model, recipe.adapter, recipe.seed, world.device)
    randomise(adapter)
    return Trainer(
        recipe=recipe,
        model=model,
        adapter=adapter,
        data=prepare(recipe.data, byte_tokenizer(), recipe.seed),
        inputs="digest",
        pad_token_id=0,
        world=world,
        folder=Path(recipe.output_dir),
        console=quiet(),
    )


def loss_and_gradient(trainer: Trainer) -> tuple[float, torch.Tensor]:
    """The loss sum of step 0's global batch, and the gradient of all cores in one vector, summed over the ranks."""
    _, indices = trainer.order.global_batch(0)
    trainer.adapter.zero_grad()
    loss_sum, tokens = trainer._accumulate(indices, len(indices), 0)
    gradients = _gradients(trainer.adapter)
    sums = sum_step(trainer.world, gradients, loss_sum, tokens, None).read()
    return sums.loss, torch.cat([gradient.reshape(-1) for gradient in gradients])


def _gradients(adapter: ChainAdapter) -> list[torch.Tensor]:
    return [core.grad for core in adapter.cores if core.grad is not None]


def reference(folder: Path, precision: str) -> tuple[float, torch.Tensor]:
    """One process, no engine, the whole batch at once."""
    return loss_and_gradient(make_trainer(recipe_for(folder, precision, 1, 1, False), World(device=CPU), ALONE))


def in_fp32(folder: Path, precision: str) -> tuple[float, torch.Tensor]:
    """The reference with the very weights of `precision`, unpacked and computed in fp32."""
    trainer = make_trainer(recipe_for(folder, precision, 1, 1, False), World(device=CPU), ALONE)
    for module in trainer.model.modules():
        if precision == "nf4" and getattr(module, "quant_state", None) is not None:
            module.compute_dtype = torch.float32  # type: ignore[assignment]
            module.quant_state.dtype = torch.float32  # type: ignore[union-attr, assignment]
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    trainer.adapter.compute_dtype = torch.float32
    return loss_and_gradient(trainer)


def difference(got: tuple[float, torch.Tensor], wanted: tuple[float, torch.Tensor]) -> tuple[float, float]:
    """Relative difference of loss and gradient."""
    return abs(got[0] - wanted[0]) / abs(wanted[0]), float((got[1] - wanted[1]).norm() / wanted[1].norm())


def bounds(folder: Path, references: dict[str, tuple[float, torch.Tensor]]) -> dict[str, tuple[float, float]]:
    """What each precision allows for loss and gradient."""
    allowed = {"fp32": (FLOAT32, FLOAT32)}
    for precision in ("bf16", "nf4"):
        loss, gradient = difference(references[precision], in_fp32(folder, precision))
        allowed[precision] = (max(2 * loss, FLOAT32), min(2 * gradient, 4 * 2**-8))
    return allowed


def work(folder: Path, strategies: Sequence[Strategy]) -> None:
    """What one rank does: all cells of this number of ranks; rank 0 writes them."""
    references = {precision: reference(folder, precision) for precision in PRECISIONS}
    allowed = bounds(folder, references)
    cells = []
    with join(CPU, timedelta(minutes=5), group=True) as world:
        for strategy, precision, accumulation, checkpointing in itertools.product(
            strategies, PRECISIONS, ACCUMULATIONS, CHECKPOINTING
        ):
            recipe = recipe_for(folder, precision, world.size, accumulation, checkpointing)
            got = loss_and_gradient(make_trainer(recipe, world, Launch(strategy=strategy)))
            loss, gradient = difference(got, references[precision])
            cells.append([strategy, precision, world.size, accumulation, checkpointing, loss, gradient])
        if world.is_first:
            (folder / f"cells-{world.size}.json").write_text(json.dumps({"cells": cells, "allowed": allowed}))


def measure(
    folder: Path, ranks: int, strategies: Sequence[str] = STRATEGIES
) -> tuple[list[list[Any]], dict[str, Any]]:
    """Run all cells of a number of ranks; return them and what each precision allows."""
    if not (folder / "data.jsonl").exists():
        write_toy(folder, config=MODEL)
        prepare(toy_recipe(folder).data, byte_tokenizer(), 42)  # tokenised once, before the ranks start
    work = ("-m", "tests.distributed.equivalence", "--work", folder, "--strategies", *strategies)
    finish(torchrun(*work, ranks=ranks), folder / f"cells-{ranks}.log", 1800)
    found = json.loads((folder / f"cells-{ranks}.json").read_text())
    return found["cells"], found["allowed"]


def main() -> int:
    """Print the matrix; exit 1 if a cell is outside what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.strategies)
        return 0
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'backbone':10} {'dtype':5} ranks accum ckpt   loss      gradient  allowed (loss, gradient)")
        for ranks in options.ranks:
            cells, allowed = measure(Path(folder), ranks, options.strategies)
            for strategy, precision, size, accumulation, checkpointing, loss, gradient in cells:
                most = allowed[precision]
                ok = loss <= most[0] and gradient <= most[1]
                failed += not ok
                old = worst.get((strategy, precision), (0.0, 0.0))
                worst[strategy, precision] = (max(old[0], loss), max(old[1], gradient))
                print(
                    f"{strategy:10} {precision:5} {size:5} {accumulation:5} {'on' if checkpointing else 'off':4}  "
                    f"{loss:8.1e}  {gradient:8.1e}  {most[0]:.1e}, {most[1]:.1e}  {'' if ok else 'OUTSIDE'}"
                )
    print("\nworst of each:")
    for (strategy, precision), (loss, gradient) in worst.items():
        print(f"{strategy:10} {precision:5} loss {loss:.1e}  gradient {gradient:.1e}")
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main())
