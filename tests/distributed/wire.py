"""Count what two ways to train send per optimizer step: our chain, and PEFT LoRA r=8 under DDP, on the same model.

torchrun --standalone --nproc_per_node 2 tests/distributed/wire.py [random:smollm2_135m [nf4]]

Without arguments the model is the small one of `plan --simulate`.

Rank 0 prints a table and one line of JSON: bytes of the buffers that were all-reduced, beside the formulas of plan.
"""

import json
import sys
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from metatt_scale.adapter import find_targets, inject
from metatt_scale.backbone import load_backbone
from metatt_scale.data import Batch
from metatt_scale.ending import leave
from metatt_scale.parallel import World, join
from metatt_scale.plan.shape import read_shape
from metatt_scale.plan.simulate import MODEL, Collectives, run_step
from metatt_scale.plan.wire import chain_buffer, lora_buffer, ring_all_reduce
from metatt_scale.recipe import Recipe, validate
from metatt_scale.training.loss import token_loss_sum


def make_recipe(folder: Path, path: str = "", quantization: str = "none") -> Recipe:
    (folder / "config.json").write_text(json.dumps(MODEL))
    backbone = {"path": path or f"random:{folder}", "dtype": "bfloat16", "quantization": quantization}
    return validate({"output_dir": "unused", "backbone": backbone, "data": {"train": [{"path": "unused"}]}}, "wire")


def ours(recipe: Recipe, world: World) -> tuple[int, int]:
    """Return count and bytes of the all-reduces of one step of ours."""
    model = load_backbone(recipe.backbone, world.device, recipe.seed).train()
    adapter = inject(model, recipe.adapter, recipe.seed, world.device)
    counter = Collectives(model)
    with counter:
        run_step(model, adapter, world)
    (kind,) = counter.table()
    assert kind == "all_reduce", f"a step of ours issued {counter.table()}"
    return counter.table()[kind]["count"], counter.table()[kind]["bytes"]


def lora(recipe: Recipe, world: World) -> tuple[int, int]:
    """Return count and bytes of DDP's all-reduces in a step of LoRA r=8 on the same modules."""
    model = load_backbone(recipe.backbone, world.device, recipe.seed).train()
    paths = [target.path for target in find_targets(model, recipe.adapter.target_modules).targets]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=paths))
    parallel = DistributedDataParallel(adapted)
    sizes = []

    def count(group, bucket):
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    parallel.register_comm_hook(None, count)
    ids_BS = torch.arange(2, 18).view(2, 8)
    wrapped: Any = parallel  # it passes calls on
    token_loss_sum(wrapped, Batch(ids_BS, torch.ones_like(ids_BS), ids_BS.clone()), world.device).backward()
    return len(sizes), sum(sizes)


def main() -> None:
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)  # PEFT asks transformers for it
    with tempfile.TemporaryDirectory() as folder, join(torch.device("cpu"), timedelta(minutes=2)) as world:
        recipe = make_recipe(Path(folder), *sys.argv[1:])
        shape = read_shape(recipe)
        found = {
            "MetaTT r=16": (*ours(recipe, world), chain_buffer(shape)),
            "LoRA r=8, DDP": (*lora(recipe, world), lora_buffer(shape, 8)),
        }
        if world.is_first:
            print(f"{world.size} ranks, {shape.layers} layers {shape.hidden} wide, q_proj and v_proj, 1 step")
            for name, (count, size, formula) in found.items():
                sent = ring_all_reduce(size, world.size)
                print(
                    f"{name:14} all-reduces {count}  bytes {size:,}  formula {formula:,}  sent per rank {sent:,.0f}"
                )
            print(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
