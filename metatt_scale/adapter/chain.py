"""The owner of the cores, and the linears that borrow them.

One `ChainAdapter` holds all trainable parameters. The adapted linears keep a plain, unregistered reference to
it, so no engine that walks the backbone's parameters ever meets a core.

A core has one life per optimizer step: `fold` contracts the chain into the factors A, C, B of every module, as
compute copies and as full-precision leaves; forward and backward passes of any number of micro-batches use them
and add their gradients to the leaves; `pull_back` carries the sums to `core.grad`. The next forward folds anew
because the optimizer has changed the cores.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from metatt_scale.adapter import operator
from metatt_scale.adapter.modes import ChainSpec, Factors, factors
from metatt_scale.adapter.targets import Target, TargetMap


class Operand(NamedTuple):
    """One factor of one module: the leaf that receives its gradient, and the copy that computes."""

    leaf: Tensor
    copy: Tensor


class AdaptedLinear(nn.Module):
    """A frozen linear with y += (x A) C B behind it; A, C, B come from the owner of the chain."""

    def __init__(self, base_layer: nn.Module, adapter: ChainAdapter, index: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.merged_layer: nn.Module | None = None
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
        return self.adapter.add_to(y.clone() if self._copies else y, x, self.index)


class ChainAdapter(nn.Module):
    """All trainable parameters of a run: the cores of one tensor train."""

    def __init__(
        self, spec: ChainSpec, cores: Sequence[Tensor], alpha: float, target_map: TargetMap, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.spec = spec
        self.alpha = alpha
        self.target_map = target_map
        self.compute_dtype = dtype
        self.enabled = True
        self.linears: tuple[AdaptedLinear, ...] = ()
        self.cores = nn.ParameterList([nn.Parameter(core) for core in cores])
        self._forget()

    def _forget(self) -> None:
        self._folded_at: tuple[int, ...] | None = None
        self._operands: list[tuple[Operand, Operand, Operand]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []  # (node of the graph back to the cores, leaf)
        self._shared: tuple[Any, ...] | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """The adapted modules, in the order of `linears`."""
        return self.target_map.targets

    def extra_repr(self) -> str:
        """Modes, sizes and ranks for print(adapter)."""
        return f"modes={self.spec.modes}, sizes={self.spec.sizes}, ranks={self.spec.ranks}, alpha={self.alpha}"

    # ---- the life of a core within one optimizer step

    def fold(self) -> None:
        """Contract the cores into every module's factors, unless that is done and the cores are unchanged."""
        versions = tuple(core._version for core in self.cores)
        if self._folded_at == versions:
            return
        self._forget()
        # Outside inference mode: the leaves must be able to serve a later backward.
        with torch.inference_mode(False), torch.enable_grad():
            a_LMIP, c_LMPQ, b_LMQO = factors(self.spec, list(self.cores), self.alpha)
            c_nodes = c_LMPQ.flatten(0, 1).unbind(0)
            made: dict[tuple[Any, ...], Operand] = {}
            for target in self.targets:
                la, ma = _place(a_LMIP, target)
                lb, mb = _place(b_LMQO, target)
                lc, mc = _place(c_LMPQ, target)
                c_node = c_nodes[lc * c_LMPQ.shape[1] + mc]
                a_node, b_node = a_LMIP[la, ma, : target.d_in], b_LMQO[lb, mb, :, : target.d_out]
                self._operands.append(
                    (
                        self._operand(made, ("a", la, ma, target.d_in), a_node),
                        self._operand(made, ("c", lc, mc), c_node),
                        self._operand(made, ("b", lb, mb, target.d_out), b_node),
                    )
                )
        self._folded_at = versions

    def _operand(self, made: dict[tuple[Any, ...], Operand], key: tuple[Any, ...], graph: Tensor) -> Operand:
        if key not in made:
            leaf = graph.detach().clone(memory_format=torch.contiguous_format).requires_grad_(graph.requires_grad)
            made[key] = Operand(leaf, leaf.detach().to(self.compute_dtype))
            self._pairs.append((graph, leaf))
        return made[key]

    def add_to(self, y: Tensor, x: Tensor, index: int) -> Tensor:
        """Add module `index`'s adapter output for input x to its base output y, in place where possible."""
        a, c, b = self._operands[index]
        h = self._project(x, a)
        if not torch.is_grad_enabled():
            return operator.add_low_rank(y, h, c.copy, b.copy)
        return operator.accumulate(y, h, c.leaf, b.leaf, c.copy, b.copy)

    def _project(self, x: Tensor, a: Operand) -> Tensor:
        """Return x A, once for neighbours that read the same x (Q, K and V; gate and up)."""
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
        live = [(graph, leaf) for graph, leaf in self._pairs if leaf.grad is not None]
        if live:
            torch.autograd.backward([graph for graph, _ in live], [leaf.grad for _, leaf in live])
        self._forget()

    def set_cores(self, cores: Sequence[Tensor]) -> None:
        """Replace the values of all cores (same shapes)."""
        with torch.no_grad():
            for core, value in zip(self.cores, cores, strict=True):
                core.copy_(value)

    # ---- what a person wants to do with it

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the frozen backbone alone inside a `with` block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def factors_of(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return module `index`'s A (d_in x r), C (r x r', holds alpha) and B (r' x d_out) in the cores' dtype."""
        self.fold()
        a, c, b = self._operands[index]
        return a.leaf.detach(), c.leaf.detach(), b.leaf.detach()


def factors_at(all_factors: Factors, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return the A (d_in x r), C (r x r') and B (r' x d_out) of one module out of those of all."""
    a_LMIP, c_LMPQ, b_LMQO = all_factors
    a_IP = a_LMIP[_place(a_LMIP, target)][: target.d_in]
    b_QO = b_LMQO[_place(b_LMQO, target)][:, : target.d_out]
    return a_IP, c_LMPQ[_place(c_LMPQ, target)], b_QO


def _place(factor_LM: Tensor, target: Target) -> tuple[int, int]:
    """Return the (layer, projection) index of a target in a factor whose axes may be shared (size 1)."""
    layers, projections = factor_LM.shape[:2]
    return (target.layer if layers > 1 else 0), (target.projection if projections > 1 else 0)
