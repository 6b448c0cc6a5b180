"""A model brought to its place unit by unit: a decoder layer at a time, never the whole.

The model starts on the meta device, shapes without memory. Each unit (a layer; the embeddings and the output head
where nothing else shares their weights) is filled, quantised if the recipe asks for it, and handed to the sharding
engine, if there is one, before the next one is touched. What belongs to no unit stays with the root and comes last.

Tensors go from the mapped files straight to the device, and on a CPU into memory of their own. They could stay mapped
there and would cost nothing. But a file that is overwritten in place while a run uses it would change the weights
under the run, or end it with a bus error, and no process can prevent that. Only a linear that is to be quantised is
read where it lies.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from metatt_scale.backbone.checkpoint import Checkpoint, tied_names
from metatt_scale.backbone.head import HeadStart, in_head, last_linear
from metatt_scale.backbone.quantised import linears_to_pack, pack
from metatt_scale.recipe import BackboneRecipe

_HOST = torch.device("cpu")


class Engine(Protocol):
    """What shards a backbone."""

    def shard(self, unit: nn.Module) -> None:
        """Keep only this rank's part of a unit whose weights are in place; it is gathered when it runs."""
        ...

    def finish(self, model: PreTrainedModel) -> None:
        """Shard what no unit held; afterwards the model can be called."""
        ...

    def gathered(self, model: nn.Module, path: str) -> AbstractContextManager[object]:
        """Have the weights of the module at this path whole inside a `with` block; all ranks call it."""
        ...


def find_units(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of everything that is loaded and sharded on its own.

    Layers are the members of the outermost module lists. Embeddings and output head are units if their weights have
    no other name; tied ones belong to the root, for a parameter can have one owner only.
    """
    tied = tied_names(model)
    units = list(_members_of_lists(model, ""))
    inside = {id(module) for _, unit in units for module in unit.modules()}
    for edge in (model.get_input_embeddings(), model.get_output_embeddings()):
        if edge is None or id(edge) in inside:
            continue
        path = next(path for path, module in model.named_modules() if module is edge)
        if not any(name in tied for name, _ in edge.named_parameters(prefix=path)):
            units.append((path, edge))
    return units


def _check_units(model: PreTrainedModel, units: list[tuple[str, nn.Module]]) -> None:
    """Refuse a model that an engine cannot shard unit by unit.

    Raises:
        ValueError: there are no layers, or layers share weights.
    """
    if not units:
        raise ValueError(
            f"backbone: {type(model).__name__} has no list of layers to shard one by one; set parallel.backbone: "
            "replicate"
        )
    tied = tied_names(model)
    for path, unit in units:
        for name, _ in unit.named_parameters(prefix=path):
            if any(not alias.startswith(path + ".") for alias in tied.get(name, ())):
                raise ValueError(
                    f"backbone: {type(model).__name__} uses {name} in several layers, so they cannot be sharded one "
                    "by one; set parallel.backbone: replicate"
                )


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch.compile replace the forward of every layer at its first call, in place.

    Layer by layer: those that look alike share one compilation; the first has its own where its input needs no
    gradient. Checkpointing is a part of a layer's forward in transformers 5, and is compiled with it.
    """
    for _, layer in _members_of_lists(model, ""):
        layer.compile(dynamic=True)  # lengths differ from batch to batch


def _members_of_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            for index, member in child.named_children():
                if any(True for _ in member.parameters()):
                    yield f"{inner}.{index}", member
        else:
            yield from _members_of_lists(child, inner)


def bring_in(
    model: PreTrainedModel,
    weights: Weights | None,
    recipe: BackboneRecipe,
    device: torch.device,
    engine: Engine | None,
) -> None:
    """Fill, quantise, move and shard a model, in place.

    Args:
        model: with its weights, or on the meta device.
        weights: fills a model on the meta device; None where the weights are in place.
        recipe: says what is quantised.
        device: where the model computes.
        engine: shards it; without one it stays whole.

    Raises:
        ValueError: weights that cannot be quantised or sharded.
    """
    model.requires_grad_(False)
    packable = linears_to_pack(model, recipe, device) if recipe.quantization != "none" else []
    units = find_units(model)
    if engine:
        _check_units(model, units)
    if engine or device.type != "cpu":
        _give_back_large_blocks()
    done: set[nn.Module] = set()
    for path, unit in [*units, ("", model)]:
        here = [name for name in packable if unit is model or name.startswith(path + ".")]
        packable = [name for name in packable if name not in set(here)]
        if weights:
            weights.fill(path, unit, done, device, mapped=frozenset(here))
        pack(model, here, recipe, device)
        for _, module in _post_order(unit, path, done):
            # One module at a time: what an engine holds already stays where the engine keeps it.
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(tensor.device != device for tensor in own):
                module._apply(lambda tensor: tensor.to(device), recurse=False)
        if unit is not model:
            done.add(unit)
            if engine:
                engine.shard(unit)
        if here or engine or device.type != "cpu":  # a weight that stays on a CPU as it is frees nothing
            _give_back_freed_memory()
    if weights:
        weights.check()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never filled: {left}"


def _post_order(module: nn.Module, path: str, skip: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Walk a module tree, children first, without the subtrees in `skip`."""
    if module in skip:
        return
    for name, child in module.named_children():
        yield from _post_order(child, f"{path}.{name}" if path else name, skip)
    yield path, module


def _give_back_large_blocks() -> None:
    """Return the memory of every tensor from 1 MiB on to the system as soon as it is freed, from now on.

    glibc would come to keep blocks of up to 32 MiB, and the holes between them: twice the memory of a 4-bit shard.
    Not for a whole model on a CPU: each activation of its training would be mapped and cleared anew.
    """
    m_mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):  # another C library manages its memory itself
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


def _give_back_freed_memory() -> None:
    """Return the memory that is free now to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library manages its memory itself
        ctypes.CDLL(None).malloc_trim(0)


class Weights:
    """Gives the modules of a model on the meta device their values.

    What a checkpoint lacks is initialised as the model's class says, each module from a seed of its own that follows
    from (seed, module path): the values do not depend on the order of loading, the engine or the number of ranks.
    `head` says otherwise of the head of an encoder.
    """

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint | None, seed: int, head: HeadStart | None = None
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._seed = seed
        self._head = head or HeadStart()
        self._tied = tied_names(model)
        self._stored = set(model.state_dict())
        self._made: dict[str, nn.Parameter] = {}
        self._owners = {path: part for path, part in model.named_modules() if isinstance(part, PreTrainedModel)}
        self._unset: list[tuple[str, nn.Module, str]] = []
        # Code beside the weights may fill what is below a module in place, whether it has a value or not.
        self._is_custom = not type(model).__module__.startswith("transformers.")

    def fill(
        self, path: str, unit: nn.Module, skip: set[nn.Module], device: torch.device, mapped: frozenset[str]
    ) -> None:
        """Give the weights and buffers of a unit their values, except those of the modules in `skip`.

        Args:
            path: of the unit in the model.
            unit: a module.
            skip: modules in it that have their values already.
            device: where modules are put that the checkpoint has whole; the others lie in the memory of the CPU.
            mapped: paths of modules that are replaced at once: their tensors stay in their files, if they have the
                right type, and otherwise in the memory of the CPU.

        Raises:
            ValueError: a weight that neither the checkpoint nor the class of the model gives a value.
        """
        modules = list(_post_order(unit, path, skip))
        with torch.no_grad():
            for module_path, module in modules:
                self._read(module_path, module, _HOST if module_path in mapped else device, module_path in mapped)
        self._initialise(modules)

    def check(self) -> None:
        """Refuse buffers without a value, when all of the model is filled: the root may have set those of a layer.

        Raises:
            ValueError: neither the files nor the class of the model gives a buffer its value.
        """
        for path, module, name in self._unset:
            if module.get_buffer(name)._version == 0:
                raise self._without_value(path, name)

    def _read(self, path: str, module: nn.Module, device: torch.device, mapped: bool) -> None:
        """Read what the checkpoint has of a module, and make room for the rest."""
        own = [*module._parameters.items(), *module._buffers.items()]
        metas = {name: tensor for name, tensor in own if tensor is not None and tensor.is_meta}
        names = {name: f"{path}.{name}" if path else name for name in metas}
        stored = {name: self._look_up(names[name]) for name in metas}
        if any(tensor is None for tensor in stored.values()):
            device = _HOST  # where random numbers are drawn, to be the same on every device
        for name, meta in metas.items():
            setattr(module, name, self._make(meta, names[name], stored[name], device, mapped))

    def _look_up(self, name: str) -> Tensor | None:
        return self._checkpoint.read(name) if self._checkpoint is not None and name in self._stored else None

    def _make(self, meta: Tensor, name: str, stored: Tensor | None, device: torch.device, mapped: bool) -> Tensor:
        first = self._tied.get(name, (name,))[0]
        if first in self._made:
            return self._made[first]
        if stored is None:
            tensor = torch.empty_like(meta, device=device)
        else:
            tensor = stored.to(device, meta.dtype, copy=not mapped or name in self._tied)
        if isinstance(meta, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        if stored is not None:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it as it is
        if name in self._tied:
            assert isinstance(tensor, nn.Parameter)
            self._made[first] = tensor
        return tensor

    def _initialise(self, modules: list[tuple[str, nn.Module]]) -> None:
        """Run the initialisation of transformers on every module that still lacks a value."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), guard_torch_init_functions():
            for path, module in modules:
                own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                whole = all(getattr(tensor, "_is_hf_initialized", False) for tensor in own)
                if whole and (own or self._is_custom):
                    continue
                digest = hashlib.sha256(f"{self._seed} {path}".encode()).digest()
                torch.default_generator.manual_seed(int.from_bytes(digest[:4], "little"))
                owner = _nearest(self._owners, path)
                std = self._head.std if in_head(self._model, path) else None
                with _initialising_with(owner.config, std):
                    owner._init_weights(module)
                self._start_bias(path, module)
                for name, tensor in module.named_parameters(recurse=False):
                    if (f"{path}.{name}" if path else name) in self._tied:
                        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # once, not once per name
        for path, module in modules:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor._version or not tensor.numel() or getattr(tensor, "_is_hf_initialized", False):
                    continue
                if isinstance(tensor, nn.Parameter):
                    raise self._without_value(path, name)
                self._unset.append((path, module, name))

    def _without_value(self, path: str, name: str) -> ValueError:
        return ValueError(
            f"backbone: the files have no {path}.{name}, and {type(self._model).__name__} does not say what it "
            "starts with; set it in the method _init_weights of that class"
        )

    def _start_bias(self, path: str, module: nn.Module) -> None:
        """Give the last linear of a new head the bias that it was to start with."""
        if self._head.bias_K is None or path != last_linear(self._stored):
            return
        assert isinstance(module.bias, nn.Parameter)  # heads of BERT and RoBERTa have one
        if not getattr(module.bias, "_is_hf_initialized", False):  # what the files hold stays
            module.bias.copy_(self._head.bias_K)


@contextlib.contextmanager
def _initialising_with(config: PreTrainedConfig, std: float | None) -> Iterator[None]:
    """Let modules draw their weights with this standard deviation inside a `with` block; None changes nothing."""
    if std is None:
        yield
        return
    before, config.initializer_range = config.initializer_range, std
    try:
        yield
    finally:
        config.initializer_range = before


def _nearest(owners: dict[str, PreTrainedModel], path: str) -> PreTrainedModel:
    """Return the innermost model around a module: models can be parts of models, each with its own initialisation."""
    while path not in owners:
        path = path.rpartition(".")[0]
    return owners[path]
