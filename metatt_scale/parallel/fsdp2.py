"""A frozen backbone sharded by PyTorch's FSDP2, a decoder layer at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from metatt_scale.parallel.checks import shard_ranks
from metatt_scale.parallel.parity import Parity
from metatt_scale.parallel.world import World
from metatt_scale.recipe import ParallelRecipe


class Fsdp2:
    """Cuts units with `fully_shard`; hooks gather each for its forward and backward.

    Weights are stored in the type they compute in and the policy casts nothing, so packed 4-bit bytes travel as they
    are. The trainable chain is none of its business.
    """

    def __init__(self, world: World, recipe: ParallelRecipe, dtype: torch.dtype) -> None:
        """Make the mesh of ranks; all ranks call it.

        Args:
            world: the ranks, with a process group (also for one).
            recipe: shard size, resharding, offloading.
            dtype: the type of all weights.

        Raises:
            ValueError: a shard size that does not divide the world.
        """
        # Linears with a bias return views. What is written in place here are outputs inside a layer (the chain's
        # sums), never the output of a sharded unit, which is what FSDP2 warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._world = world
        self._dtype = dtype
        self._parity = Parity()
        self._mesh = _mesh(world, recipe)
        self._reshard = recipe.reshard_after_forward
        self._offload = CPUOffloadPolicy() if recipe.cpu_offload else OffloadPolicy()

    def shard(self, unit: nn.Module) -> None:
        """Keep this rank's rows of every parameter of the unit.

        Raises:
            ValueError: a parameter of another type than the backbone's.
        """
        self._parity.remember(unit)
        self._shard(unit)

    def finish(self, model: PreTrainedModel) -> None:
        """Shard what no unit holds, and compare a 4-bit layer with what it was.

        Raises:
            ValueError: as `shard`; or the 4-bit layer computes something else now.
        """
        self._shard(model)
        embedding = model.get_input_embeddings()
        if isinstance(embedding, FSDPModule):  # frozen, so its backward needs no weights, though it would fetch them
            embedding.set_unshard_in_backward(False)
        self._compare()

    @contextlib.contextmanager
    def gathered(self, model: nn.Module, path: str) -> Iterator[None]:
        """Have the weights of the module at this path whole inside a `with` block; all ranks call it."""
        parts = path.split(".")
        above = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1))
        with _gathered(next(module for module in above if isinstance(module, FSDPModule))):
            yield

    def _compare(self) -> None:
        self._parity.check(self._world, _gathered)

    def _shard(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if parameter.dtype != self._dtype:
                raise ValueError(
                    f"backbone: {name} is {parameter.dtype}, the other weights are {self._dtype}, and FSDP2 gathers "
                    "a layer in one type; set parallel.backbone: replicate, or another backbone.dtype"
                )
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=self._reshard,
            mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
            offload_policy=self._offload,
        )


@contextlib.contextmanager
def _gathered(unit: nn.Module) -> Iterator[None]:
    assert isinstance(unit, FSDPModule)
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def _mesh(world: World, recipe: ParallelRecipe) -> DeviceMesh:
    """Return one axis of ranks, or (copies, ranks that share a copy)."""
    size = shard_ranks(recipe, world.size, world.local_size)
    kind = world.device.type
    if size == world.size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
