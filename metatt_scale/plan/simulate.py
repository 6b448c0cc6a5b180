"""A small model run through the real prepare, forward, backward and reduce, by one process as one rank of many.

PyTorch's fake process group answers every collective at once with whatever is in the buffer: losses are meaningless,
the collectives issued, their bytes and each rank's shards are real.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from metatt_scale.adapter import ChainAdapter, inject
from metatt_scale.backbone import load_backbone
from metatt_scale.data import Batch
from metatt_scale.parallel import World
from metatt_scale.parallel.fsdp2 import Fsdp2
from metatt_scale.plan.layout import Layout, lay_out
from metatt_scale.plan.shape import ModelShape, read_shape
from metatt_scale.plan.weights import own_bytes
from metatt_scale.plan.wire import backbone_gathers, chain_buffer
from metatt_scale.recipe import Recipe
from metatt_scale.training.loss import token_loss_sum
from metatt_scale.training.reduce import sum_step

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
"""The model that stands for the recipe's: the same path through the code, small enough for a CPU."""
_EXAMPLES, _TOKENS = 1, 8


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What one optimizer step of the small model issues in a world of this size, beside what the formulas say."""

    ranks: int
    strategy: str
    """Of the layout: `replicate` or `fsdp2`."""
    collectives: dict[str, dict[str, int]]
    """Kind -> count and bytes (of the whole result, on each rank)."""
    layer_gathers: dict[str, int]
    """Decoder layer -> gathers in the step."""
    expected: dict[str, dict[str, int]]
    """The same as `collectives`, by the formulas of wire.py."""
    first_rank_bytes: int
    """Of backbone parameters that rank 0 owns."""
    last_rank_bytes: int
    """The same of the last rank, whose shards can be empty."""
    expected_bytes: tuple[int, int]
    """Both by the formula of weights.py."""


def small_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the small model, whose configuration is written to `folder`, and one micro-batch.

    Nothing is offloaded: that changes no collective, and the simulation computes where the shards are.
    """
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    backbone = recipe.backbone.model_copy(update={"path": f"random:{folder}"})
    adapter = recipe.adapter
    if adapter.layers is not None and adapter.layers[1] > MODEL["num_hidden_layers"]:
        adapter = adapter.model_copy(update={"layers": None})
    training = recipe.training.model_copy(update={"batch_size": 1, "micro_batch_size": 1})
    parallel = recipe.parallel.model_copy(update={"cpu_offload": False})
    return recipe.model_copy(
        update={"backbone": backbone, "adapter": adapter, "training": training, "parallel": parallel}
    )


def simulate(recipe: Recipe, ranks: int, gpus_per_node: int) -> Simulation:
    """Run one optimizer step of one micro-batch as rank 0 of `ranks`, and load as the last of them.

    Raises:
        ValueError: targets that a Llama model does not have, a strategy that the fake process group cannot play, or
            what `lay_out` refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        small = small_recipe(recipe, Path(folder))
        try:
            shape, layout = read_shape(small), lay_out(small, ranks, gpus_per_node, examples=_EXAMPLES)
        except ValueError as error:
            raise ValueError(f"--simulate plays the recipe on a small Llama model, and there: {error}") from None
        if layout.strategy == "zero3":
            raise ValueError(
                "--simulate plays FSDP2 and replicas, but the recipe's `parallel` means zero3, whose hooks want real "
                "processes; leave --simulate out, or set parallel.backbone: fsdp2"
            )
        with fake_world(0, ranks, gpus_per_node) as world:
            model = load_sharded(small, world, layout.strategy)
            adapter = inject(model, small.adapter, small.seed, world.device)
            first, counter = held_bytes(model), Collectives(model)
            with counter:
                run_step(model, adapter, world)
        with fake_world(ranks - 1, ranks, gpus_per_node) as world:
            last = held_bytes(load_sharded(small, world, layout.strategy))
    return Simulation(
        ranks=ranks,
        strategy=layout.strategy,
        collectives=counter.table(),
        layer_gathers=dict(counter.layers),
        expected=expected_collectives(shape, small, layout),
        first_rank_bytes=first,
        last_rank_bytes=last,
        expected_bytes=(
            expected_bytes(shape, small, layout, 0),
            expected_bytes(shape, small, layout, ranks - 1),
        ),
    )


def held_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of parameters that this rank owns."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def expected_bytes(shape: ModelShape, recipe: Recipe, layout: Layout, rank: int) -> int:
    """Return the same by the formula: the rank's rows of every tensor."""
    place = rank % layout.sharers
    weights = (weight for unit in shape.units for weight in unit.weights)
    return sum(own_bytes(weight, recipe.backbone, layout.sharers, place) for weight in weights)


def expected_collectives(shape: ModelShape, recipe: Recipe, layout: Layout) -> dict[str, dict[str, int]]:
    """Return count and bytes of every kind of collective in a step of one micro-batch, as wire.py has them."""
    table = {}
    if layout.ranks > 1:
        table["all_reduce"] = {"count": 1, "bytes": chain_buffer(shape)}
    gathers = backbone_gathers(shape, recipe, layout)
    if gathers.count:
        table["all_gather"] = {"count": gathers.count, "bytes": gathers.size}
    return table


@contextlib.contextmanager
def fake_world(rank: int, ranks: int, gpus_per_node: int) -> Iterator[World]:
    """Be one rank of many for the length of a `with` block."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield World(device=torch.device("cpu"), rank=rank, size=ranks, local_size=min(gpus_per_node, ranks))
    finally:
        dist.destroy_process_group()


class _Fsdp2(Fsdp2):
    """The engine without its comparison of gathered weights, which nobody has sent here."""

    def _compare(self) -> None:
        pass


def load_sharded(recipe: Recipe, world: World, strategy: str) -> PreTrainedModel:
    """Return the recipe's model as the training command would load it."""
    engine = None
    if strategy == "fsdp2":
        engine = _Fsdp2(world, recipe.parallel, getattr(torch, recipe.backbone.dtype))
    return load_backbone(recipe.backbone, world.device, recipe.seed, engine).train()


def run_step(model: PreTrainedModel, adapter: ChainAdapter, world: World) -> None:
    """Do what the training loop does between two optimizer updates, with one micro-batch."""
    ids_BS = torch.arange(2, 2 + _EXAMPLES * _TOKENS).view(_EXAMPLES, _TOKENS)
    loss = token_loss_sum(model, Batch(ids_BS, torch.ones_like(ids_BS), ids_BS.clone()), world.device)
    loss.backward()
    adapter.pull_back()
    gradients = [core.grad for core in adapter.cores if core.grad is not None]
    sum_step(world, gradients, loss.detach(), ids_BS.numel(), None)


_KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather"}


class Collectives(TorchDispatchMode):
    """Counts every collective that passes the dispatcher, and for gathers the decoder layer that asked."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.layers: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._asking = ""
        for path, module in model.named_modules():
            if isinstance(module, FSDPModule):
                self._watch(module, path)

    def _watch(self, module: FSDPModule, path: str) -> None:
        group = cast(Any, module._get_fsdp_state()._fsdp_param_group)
        unshard = group.unshard

        def note(*arguments: Any, **options: Any) -> None:
            self._asking = path
            unshard(*arguments, **options)

        group.unshard = note

    def table(self) -> dict[str, dict[str, int]]:
        """Return kind -> count and bytes."""
        return {kind: {"count": self._counts[kind], "bytes": self._bytes[kind]} for kind in sorted(self._counts)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name: str = func._schema.name.removeprefix("c10d::")
            kind: str = _KINDS.get(name, name)
            result = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))  # the output comes first
            self._counts[kind] += 1
            self._bytes[kind] += result.numel() * result.element_size()
            if kind == "all_gather" and any(part.isdigit() for part in self._asking.split(".")):
                self.layers[self._asking] += 1
        return func(*args, **(kwargs or {}))
