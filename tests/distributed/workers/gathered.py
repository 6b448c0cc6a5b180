"""What is gathered of a sharded backbone between forward and backward, and a step's peak beside the plan's.

`torchrun --nproc-per-node 2 -m tests.distributed.workers.gathered FOLDER`: every rank writes what it counted; the
first then plays one of two ranks without the other, where every byte of a step can be counted.
"""

import json
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from metatt_scale.backbone import attention, load_backbone
from metatt_scale.data import Batch
from metatt_scale.ending import leave
from metatt_scale.methods import build_adapter
from metatt_scale.parallel import join, make_engine, read_launch
from metatt_scale.parallel.parity import Parity
from metatt_scale.plan.gathered import always_gathered_bytes
from metatt_scale.plan.layout import lay_out
from metatt_scale.plan.shape import read_shape
from metatt_scale.plan.simulate import fake_world
from metatt_scale.recipe import validate
from metatt_scale.training.loss import token_loss_sum
from metatt_scale.training.start import make_ready
from tests.distributed.jobs import ROOT
from tests.model.test_plan_memory import LLAMA as SMALL
from tests.model.test_plan_memory import WIDE, make_recipe, measured_and_estimate
from tests.toy import CPU, GPT2, LLAMA, quiet, toy

for library in ("bitsandbytes", "DeepSpeed", "deepspeed"):
    logging.getLogger(library).setLevel(logging.ERROR)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2},
    "tied": {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True},
    "biased": {**LLAMA, "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128},
    "gpt2": GPT2,
}
ONE_BY_ONE = {
    f"stage3_{key}": 0
    for key in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
}
"""Nothing that DeepSpeed keeps or fetches of its own accord."""
IN_PIECES = {**ONE_BY_ONE, "stage3_max_live_parameters": 10**9, "stage3_prefetch_bucket_size": 10**6}
A_FEW = {**ONE_BY_ONE, "stage3_max_live_parameters": 4 * 10**6, "stage3_prefetch_bucket_size": 5 * 10**7}
"""What follows is fetched ahead: everything, or 4 of 12 million values."""

LIVE = [
    ("llama", engine, quantization, recompute)
    for engine in ("replicate", "fsdp2", "zero3")
    for quantization in ("none", "nf4")
    for recompute in (False, True)
]
LIVE += [("tied", "zero3", "none", False), ("gpt2", "zero3", "none", False), ("biased", "zero3", "nf4", False)]
LIVE += [("llama", "zero3.json", quantization, False) for quantization in ("none", "nf4")]
"""(model, engine, quantization, recomputed)."""

PLANNED = [
    (SMALL, ONE_BY_ONE, "bfloat16", "none", True),
    (SMALL, ONE_BY_ONE, "bfloat16", "nf4", False),
    (WIDE, ONE_BY_ONE, "float32", "nf4", True),
    (WIDE, ONE_BY_ONE, "float32", "none", False),
    (WIDE, IN_PIECES, "float32", "nf4", True),
    (WIDE, A_FEW, "float32", "none", False),
]
"""(model, ZeRO-3's settings, dtype, quantization, recomputed)."""


class Gathered:
    """The memory of all parameters that were whole when their module ran."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._seen: dict[StorageWeakRef, int] = {}
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._note)  # behind the engine's, which gathers

    def _note(self, module: torch.nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            storage = parameter.untyped_storage()
            self._seen[StorageWeakRef(storage)] = storage.nbytes()

    def seen(self) -> int:
        """Return the bytes that were there when their modules ran, and forget them."""
        total = sum(self._seen.values())
        self._seen.clear()
        return total

    def alive(self, expected: int) -> int:
        """Return the bytes that are there now. gloo's threads let go of the last buffer a moment later: wait."""
        end = time.monotonic() + 20
        while self._alive() > expected and time.monotonic() < end:
            time.sleep(0.01)
        return self._alive()

    def _alive(self) -> int:
        """Return the bytes of them that are there now, whoever holds them."""
        found = [torch.UntypedStorage._new_with_weak_ptr(seen.cdata) for seen in self._seen if not seen.expired()]
        return sum(storage.nbytes() for storage in found if storage is not None)


def settings_of(engine: str, folder: Path, zero: dict[str, Any]) -> dict[str, Any]:
    """Return `parallel` of a recipe."""
    if engine.endswith(".json"):
        return {"deepspeed_config": str(ROOT / "ds_configs" / engine)}
    if engine != "zero3":
        return {"backbone": engine}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    return {"deepspeed_config": str(folder / "zero3.json")}


def live_bytes(
    name: str, engine_name: str, quantization: str, recompute: bool, folder: Path, world
) -> dict[str, int]:
    """Return what is gathered in the third step of training."""
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    backbone = {"path": f"random:{folder}", "dtype": "bfloat16"}
    backbone |= {"quantization": quantization, "gradient_checkpointing": recompute}
    parallel = settings_of(engine_name, folder, ONE_BY_ONE)
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    sections = {"backbone": backbone, "parallel": parallel, "adapter": {"target_modules": targets}}
    recipe = validate(toy(folder, **sections), "gathered")
    engine = make_engine(world, read_launch(recipe.parallel), recipe)
    model = load_backbone(recipe.backbone, CPU, 0, engine).train()
    adapter = build_adapter(model, recipe, world, engine)
    make_ready(model, False, CPU, quiet())
    always = always_gathered_bytes(read_shape(recipe), recipe, lay_out(recipe, world.size, world.size))
    resident = sum(p.untyped_storage().nbytes() for p in model.parameters()) if engine is None else always
    gathered, between = Gathered(model), 0
    ids = torch.randint(2, 300, (1, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # DeepSpeed fetches ahead from the third on
        gathered.seen()
        loss = token_loss_sum(model, Batch(ids, torch.ones_like(ids), ids.clone()), CPU)
        between = gathered.alive(resident)
        loss.backward()
        adapter.pull_back()
        adapter.zero_grad()
    return {"between": between, "after": gathered.alive(resident), "seen": gathered.seen(), "expected": resident}


def peak(config, zero, dtype, quantization, recompute, folder: Path, world) -> tuple[int, int]:
    """Return the most bytes of a step under ZeRO-3, measured and planned."""
    backbone = {"dtype": dtype, "quant_storage": dtype, "quantization": quantization}
    backbone |= {"gradient_checkpointing": recompute}
    size = {"examples": 1, "tokens": 16} if config is WIDE else {}
    parallel = settings_of("zero3", folder, zero)
    recipe = make_recipe(folder, config, ranks=world.size, backbone=backbone, parallel=parallel, **size)
    engine = make_engine(world, read_launch(recipe.parallel), recipe)
    model = load_backbone(recipe.backbone, CPU, 0, engine).train()
    return measured_and_estimate(model, recipe, lay_out(recipe, world.size, world.size), before=2)


def main(folder: Path) -> None:
    """What one rank does."""
    with join(CPU, timedelta(minutes=5), group=True) as world:
        own = folder / f"rank-{world.rank}"
        own.mkdir()
        found = [live_bytes(*cell, own, world) for cell in LIVE]
        (folder / f"live-{world.rank}.json").write_text(json.dumps(found))
    if world.is_first:
        attention._SHORT = 0  # the plan is for kernels that hold no scores
        Parity.check = lambda *_: None  # nobody sends the other rank's part of the weights
        with fake_world(0, world.size, world.size) as world:
            (folder / "peaks.json").write_text(json.dumps([peak(*cell, own, world) for cell in PLANNED]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
