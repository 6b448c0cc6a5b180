"""The owner of the cores, and the linears that borrow them.

One `ChainAdapter` holds all trainable parameters. The adapted linears keep a plain, unregistered reference to
it, so no engine that walks the backbone's parameters ever meets a core.

A core has one life per optimizer step: `fold` contracts the chain into the factors of every module, as compute
copies and as full-precision leaves; forward and backward passes of any number of micro-batches use them and add
their gradients to the leaves; `pull_back` carries the sums to `core.grad`. The next forward folds anew because the
optimizer has changed the cores.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter import operator
from metatt_scale.adapter.base import HEAD_PREFIX, Adapter, LoraPair
from metatt_scale.adapter.folding import ROOM, Fold, Operand, Operands, factors_at, fold, folding_pays
from metatt_scale.adapter.modes import ChainSpec, factors
from metatt_scale.adapter.placed import Placed, place
from metatt_scale.adapter.size import norm_in_use
from metatt_scale.adapter.targets import TargetMap
from metatt_scale.tensor import mode_sizes, ranks


class AdaptedLinear(Placed):
    """A frozen linear with y += (x A) C B behind it; A, C, B come from the owner of the chain."""

    def __init__(self, base_layer: nn.Module, adapter: ChainAdapter) -> None:
        super().__init__(base_layer)
        self.operands: Operands | None = None
        """Set by the owner; held here, and not looked up there, so that a compiled layer needs no index."""
        self._owner = (adapter,)  # inside a tuple, so that nn.Module does not register it as a child
        # A packed linear with a bias returns a view made inside its autograd Function; nothing may write into it.
        self._copies = base_layer.bias is not None and type(base_layer) not in (nn.Linear, Conv1D)

    @property
    def adapter(self) -> ChainAdapter:
        """The one owner of the cores."""
        return self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias + alpha x G1 G2[l] G3[m] G4 (paper eq. 5)."""
        if self.merged_layer is not None:
            return self.merged_layer(x)
        y = self.base_layer(x)
        if not self.adapter.enabled:
            return y
        assert self.operands is not None, "the model's forward folds the chain first"
        return self.adapter.add_to(y.clone() if self._copies else y, x, self.operands)


class ChainAdapter(Adapter):
    """The cores of one tensor train."""

    def __init__(
        self, spec: ChainSpec, cores: Sequence[Tensor], alpha: float, target_map: TargetMap, dtype: torch.dtype
    ) -> None:
        super().__init__(target_map, dtype)
        self.spec = spec
        self.alpha = alpha
        self.n_tasks = spec.n_tasks or 1
        self.reference = False
        """Compute by the plain reference arithmetic."""
        self.room = 0
        """Bytes that folded products may take."""
        self.cores = nn.ParameterList([nn.Parameter(core) for core in cores])
        self._forget()

    def _forget(self) -> None:
        self._folded_at: tuple[Any, ...] | None = None
        self._fold = Fold()
        self._shared: tuple[Any, ...] | None = None

    def attach(self, model: PreTrainedModel, device: torch.device) -> None:
        """Put linears that borrow the cores in the place of the model's, and fold the chain before every forward."""
        self.linears = place(model, self.targets, lambda base, _: AdaptedLinear(base, self))
        self.room = _weight_bytes(model) // ROOM
        self.to(device)
        model.register_forward_pre_hook(lambda *_: self.fold())
        model.register_forward_hook(lambda *_: self.forget_input())

    def own(self) -> dict[str, nn.Parameter]:
        """Return the cores as `core_0`, `core_1`, ..."""
        return {f"core_{k}": core for k, core in enumerate(self.cores)}

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Replace the cores; their ranks may change, and with them the parameters."""
        self.set_cores([values[f"core_{k}"] for k in range(len(self.cores))])
        super().set_values({name: value for name, value in values.items() if name.startswith(HEAD_PREFIX)})

    def describe(self) -> dict[str, Any]:
        """Return modes, sizes, ranks and alpha."""
        spec = self.spec
        about: dict[str, Any] = {"modes": spec.modes, "sizes": spec.sizes, "ranks": spec.ranks, "alpha": self.alpha}
        return about | ({"diagonal": True} if spec.diagonal else {})

    def summary(self) -> str:
        """Return sizes and ranks for a person."""
        sizes = " x ".join(f"{mode} {size}" for mode, size in zip(self.spec.modes, self.spec.sizes, strict=True))
        return f"chain {sizes}; ranks {', '.join(map(str, self.spec.ranks))}"

    # ---- the same as plain matrices

    @torch.no_grad()
    def lora_pairs(self) -> list[LoraPair]:
        """Return lora_A = (A C)^T and lora_B = B^T of every module, whose rank is the bond left of B."""
        pairs = []
        unscaled = factors(self.spec, [core.detach() for core in self.cores], task=self.one_task())
        for target in self.targets:
            a_IP, c_PQ, b_QO = factors_at(unscaled, target)
            lora_A = (a_IP @ c_PQ).mT.contiguous()
            pairs.append(LoraPair(target.path, lora_A, b_QO.mT.clone(memory_format=torch.contiguous_format)))
        return pairs

    @torch.no_grad()
    def is_zero(self) -> bool:
        """Return whether no module's delta has an entry that is not zero, whatever the task."""
        cores = [core.detach().double() for core in self.cores]
        tasks = range(self.n_tasks) if self.spec.n_tasks else [None]
        return all(norm_in_use(self.spec, cores, self.targets, task) == 0 for task in tasks)

    @torch.no_grad()
    def deltas(self) -> Iterator[Tensor]:
        """Yield alpha A C B of every module."""
        scaled = factors(self.spec, list(self.cores), self.alpha, self.one_task())
        for target in self.targets:
            yield operator.delta(*factors_at(scaled, target))

    # ---- the life of a core within one optimizer step

    def fold(self) -> None:
        """Contract the cores into every module's factors, unless that is done and the cores are unchanged."""
        state = (self.reference, self.folds_into_b, self.chosen, *(core._version for core in self.cores))
        if self._folded_at == state:
            return
        self._forget()
        # Outside inference mode: the leaves must be able to serve a later backward. Without autocast: products of
        # cores are made in the cores' precision.
        device = self.cores[0].device.type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            self._fold = fold(
                self.spec,
                list(self.cores),
                self.alpha,
                self.targets,
                dtype=self.compute_dtype,
                into_b=self.folds_into_b,
                with_values=self.reference,
                task=self.chosen,
            )
        for linear, operands in zip(self.linears, self._fold.modules, strict=True):
            assert isinstance(linear, AdaptedLinear)
            linear.operands = operands
        self._folded_at = state

    @property
    def folds_into_b(self) -> bool:
        """Whether the middle cores are multiplied into the last factor once per step: see `folding_pays`."""
        if self.reference or self._mixes_tasks:
            return False
        item = self.compute_dtype.itemsize
        return folding_pays(self.spec.middle_bonds, self.targets, self.rows_per_step, self.room, item)

    @property
    def _mixes_tasks(self) -> bool:
        return self.chosen is None

    def add_to(self, y: Tensor, x: Tensor, operands: Operands) -> Tensor:
        """Add a module's adapter output for input x to its base output y, in place where possible."""
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # the copies have the type to compute in
                return self._add_to(y, x, operands)
        return self._add_to(y, x, operands)

    def _add_to(self, y: Tensor, x: Tensor, operands: Operands) -> Tensor:
        a, c, b = operands
        if self.reference:
            assert c is not None
            return operator.reference(y, x, a.leaf, c.leaf, b.leaf, self._mixed_tasks())
        h = self._project(x, a)
        tasks = self._mixed_tasks()
        if tasks is not None:
            assert c is not None
            h, c = operator.mix_by_task(h, c.leaf, c.copy, tasks), None
        if not torch.is_grad_enabled():
            return operator.add_product(y, h if c is None else h @ c.copy, b.copy)
        # A compiled graph has no use for writing in place, and cannot trace it here.
        in_place = not torch.compiler.is_compiling()
        if c is None:
            return operator.add_folded(y, h, b.leaf, b.copy, in_place=in_place)
        return operator.add_thin_first(y, h, c.leaf, b.leaf, c.copy, b.copy, in_place=in_place)

    def _mixed_tasks(self) -> Tensor | None:
        """Return the tasks of a batch that may mix them, (B, S) or (B, 1)."""
        if not self._mixes_tasks:
            return None
        if self.row_tasks is None:
            self.one_task()  # there is none: says so
        return self.row_tasks

    def _project(self, x: Tensor, a: Operand) -> Tensor:
        """Return x A, once for neighbours that read the same x (Q, K and V; gate and up)."""
        if torch.compiler.is_compiling():  # the compiler finds equal products by itself
            return operator.project(x.to(self.compute_dtype), a.leaf, a.copy)
        grad = torch.is_grad_enabled()
        if self._shared is not None and not x.is_inference():
            seen, version, operand, with_grad, h = self._shared
            if seen() is x and version == x._version and operand is a and with_grad == grad:
                return h
        h = operator.project(x.to(self.compute_dtype), a.leaf, a.copy)
        self._shared = None if x.is_inference() else (weakref.ref(x), x._version, a, grad, h)
        return h

    def forget_input(self) -> None:
        """Drop the shared projection: a layer recomputed in the backward pass must project its input again."""
        self._shared = None

    def pull_back(self) -> None:
        """Carry the gradients that all backward passes left on the factors to `core.grad`, adding to it."""
        self._fold.pull_back()
        self._forget()

    def set_cores(self, cores: Sequence[Tensor]) -> None:
        """Replace all cores. Where ranks change, the cores are new parameters, which want a new optimizer."""
        if [core.shape for core in cores] == [core.shape for core in self.cores]:
            with torch.no_grad():
                for core, value in zip(self.cores, cores, strict=True):
                    core.copy_(value)
            return
        assert not self.spec.diagonal and mode_sizes(cores) == self.spec.sizes
        self.spec = replace(self.spec, ranks=ranks(cores))
        like = self.cores[0]
        self.cores = nn.ParameterList([nn.Parameter(core.detach().to(like, copy=True)) for core in cores])
        self._forget()


def _weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the whole model's weights, also where an engine has cut them.

    What follows from it must not depend on the engine or the number of ranks: the order of the products changes bits.
    """
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
