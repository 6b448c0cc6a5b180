"""Twenty optimizer steps and two sweeps of one recipe on 1, 2 and 4 ranks under every engine, beside one process.

`python -m tests.distributed.steps` prints the loss curves of `replicate`, and for every job the largest difference of
its loss to one process at any step. The yardstick is the spread: one process again, with other micro-batch sizes, so
that only the order of summation differs (AdamW amplifies rounding where gradients are near zero). A job may differ by
ten times as much.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from metatt_scale.backbone import byte_tokenizer
from metatt_scale.data import prepare
from metatt_scale.ending import leave
from metatt_scale.parallel import World, join, read_launch
from metatt_scale.recipe import Recipe
from tests.distributed.equivalence import make_trainer
from tests.distributed.jobs import ROOT, finish, torchrun
from tests.toy import CPU, one_step, toy_recipe, write_toy

STEPS = 20
SWEEPS = {"unit": "step", "schedule": [{"after": 8, "rank": 3}, {"after": 14, "rank": 2}], "moments": "transport"}
BATCH = 16
ONE_PROCESS = {f"replicate, micro-batches of {size}": ({}, size) for size in (8, 4, 2, 1)}
ENGINES: dict[str, tuple[dict[str, Any], int | None]] = {
    name: ({"backbone": name}, None) for name in ("replicate", "fsdp2", "zero3")
}
FILES: dict[str, tuple[dict[str, Any], int | None]] = {
    f"ds_configs/{name}": ({"deepspeed_config": str(ROOT / "ds_configs" / name)}, None)
    for name in ("zero3.json", "zero3_offload_cpu.json", "zero3_offload_nvme.json", "zero2.json")
}
HYBRID: dict[str, tuple[dict[str, Any], int | None]] = {
    "fsdp2, 2 x 2 hybrid mesh": ({"backbone": "fsdp2", "shard_size": 2}, None),
    "fsdp2, kept after forward": ({"backbone": "fsdp2", "reshard_after_forward": False}, None),
}
JOBS = {1: {**ENGINES, **ONE_PROCESS}, 2: {**ENGINES, **FILES}, 4: {**ENGINES, **HYBRID}}
"""World size -> name of the job -> (keys of `parallel`, micro-batch size; the whole batch at once when None)."""


def recipe_for(folder: Path, parallel: Mapping[str, Any], micro: int) -> Recipe:
    """The toy recipe of one job."""
    training = {"batch_size": BATCH, "micro_batch_size": micro, "max_steps": STEPS, "learning_rate": 5e-3}
    return toy_recipe(folder, parallel=dict(parallel), training=training, sweep=SWEEPS)


def own_nvme(folder: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """The file as a user would edit it: a folder that is there and buffers for a small model."""
    file = parallel.get("deepspeed_config")
    if file is None or "nvme" not in file:
        return parallel
    config = json.loads(Path(file).read_text())
    config["zero_optimization"]["offload_param"] |= {"nvme_path": str(folder / "nvme"), "buffer_size": 1_000_000}
    (folder / "nvme").mkdir(exist_ok=True)
    edited = folder / "nvme.json"
    edited.write_text(json.dumps(config))
    return {"deepspeed_config": str(edited)}


def losses(folder: Path, world: World, parallel: dict[str, Any], micro: int | None) -> list[float | None]:
    """What one rank does for one job: the loss of every step."""
    recipe = recipe_for(folder, own_nvme(folder, parallel), micro or BATCH // world.size)
    trainer = make_trainer(recipe, world, read_launch(recipe.parallel))
    found = []
    for _ in range(STEPS):
        report = one_step(trainer)
        found.append(report["loss"])
        trainer._sweep_if_due(report)
        trainer._compare_replicas_if_due()  # by hash, also after a sweep
    assert trainer.adapter.spec.ranks == (2, 2, 2)
    return found


def work(folder: Path, names: list[str]) -> None:
    """What one rank does for all jobs of its world size; rank 0 writes the curves."""
    curves = {}
    with join(CPU, timedelta(minutes=2), group=True) as world:
        for name in names:
            try:
                curves[name] = losses(folder, world, *JOBS[world.size][name])
            except ValueError as error:  # a library that this machine lacks; every rank finds the same
                curves[name] = str(error)
        if world.is_first:
            (folder / f"curves-{world.size}.json").write_text(json.dumps(curves))


def measure(folder: Path, size: int, names: list[str] | None = None) -> dict[str, Any]:
    """Run the jobs of a world size; return their curves, or why there is none."""
    if not (folder / "data.jsonl").exists():
        write_toy(folder)
        prepare(toy_recipe(folder).data, byte_tokenizer(), 42)  # tokenised once, before the ranks start
    work = ("-m", "tests.distributed.steps", "--work", folder, "--names", *(names or JOBS[size]))
    finish(torchrun(*work, ranks=size), folder / f"curves-{size}.log", 1800)
    return json.loads((folder / f"curves-{size}.json").read_text())


def largest_difference(curve: list[float], other: list[float]) -> float:
    """The largest difference of two loss curves at any step (nats)."""
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


def main() -> int:
    """Print curves and differences; exit 1 if a job differs by more than ten times the spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--no-nvme", action="store_true", help="leave out the file for which DeepSpeed builds a library"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.names)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        wanted = {s: [n for n in jobs if not (options.no_nvme and "nvme" in n)] for s, jobs in JOBS.items()}
        curves = {size: measure(Path(folder), size, names) for size, names in wanted.items()}
    reference = curves[1]["replicate"]
    print("step  " + "  ".join(f"{size} rank{'s' if size > 1 else ' '}   " for size in curves))
    for step in range(STEPS):
        print(f"{step + 1:4}  " + "  ".join(f"{curves[size]['replicate'][step]:.7f}" for size in curves))
    spread = max(largest_difference(curves[1][name], reference) for name in ONE_PROCESS)
    print(f"\nspread of one-process runs that differ in summation order: {spread:.1e} nats; ten times is allowed")
    failed = 0
    for size, jobs in curves.items():
        for name, curve in jobs.items():
            if isinstance(curve, str):
                print(f"{size} ranks  {name:32} not run: {curve}")
                continue
            difference = largest_difference(curve, reference)
            failed += difference > 10 * spread
            print(f"{size} ranks  {name:32} {difference:.1e}{'  OUTSIDE' if difference > 10 * spread else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main())
