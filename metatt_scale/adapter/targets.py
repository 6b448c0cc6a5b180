"""Which linear modules are adapted, and where each stands in the chain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"
"""Value of `adapter.target_modules` that takes every linear module inside the layers."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One linear module with its place in the chain."""

    path: str
    """Module path inside the model."""
    layer: int
    """Index along the layer mode."""
    projection: int
    """Index along the projection mode."""
    d_in: int
    """Input width."""
    d_out: int
    """Output width."""
    transposed: bool = False
    """The weight is stored input x output (GPT-2's Conv1D)."""


@dataclass(frozen=True, kw_only=True)
class TargetMap:
    """All targets, and the names behind the two modes."""

    targets: tuple[Target, ...]
    layers: tuple[int, ...]
    """Layer numbers of the model, in the order of the layer mode."""
    projections: tuple[str, ...]
    """Module paths without their layer number, in the order of the projection mode."""

    def lora_parameters(self, rank: int) -> int:
        """Return what LoRA of this rank would train on the same modules: the sum of r (d_in + d_out)."""
        return sum(rank * (target.d_in + target.d_out) for target in self.targets)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T (+ bias): Linear, its bitsandbytes subclasses, GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def widths(module: nn.Module) -> tuple[int, int]:
    """Return (input width, output width) of a linear module, also where its weight is packed or sharded."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def find_targets(
    model: nn.Module, target_modules: Sequence[str] | str, layers: tuple[int, int] | None = None
) -> TargetMap:
    """Resolve names or a regular expression to linear modules of the layers.

    A list of names matches ends of module paths, a text is a regular expression for whole paths (or
    `all-linear`). The layer is the first number in the path; what remains of the path without it is the
    projection. A fused QKV matrix is one module and so one projection.

    Raises:
        ValueError: a name matches nothing or something that is not linear; the message lists the candidates.
    """
    linears = {path: module for path, module in model.named_modules() if is_linear(module)}
    candidates = {path for path in linears if _layer_of(path) is not None}
    if isinstance(target_modules, str):
        chosen = _match_expression(target_modules, candidates)
        if not chosen:
            raise ValueError(
                f"adapter.target_modules {target_modules!r} matches no linear module (a text is a regular expression "
                f"for whole module paths; write a list such as [q_proj, v_proj] for names); {_menu(linears)}"
            )
    else:
        chosen = [path for name in target_modules for path in _match_name(name, model, linears)]
    chosen = list(dict.fromkeys(chosen))
    if layers is not None:
        chosen = [path for path in chosen if layers[0] <= _layer_number(path) < layers[1]]
        last = max(_layer_number(path) for path in candidates)
        if not chosen or layers[1] > last + 1:
            raise ValueError(
                f"adapter.layers is {list(layers)}, but the model's layers are 0 to {last}; give [first, last) of "
                "these"
            )
    return _place(chosen, linears)


def _place(paths: list[str], linears: dict[str, nn.Module]) -> TargetMap:
    layer_numbers = sorted({_layer_number(path) for path in paths})
    projections = list(dict.fromkeys(_projection_of(path) for path in paths))
    targets = []
    for path in paths:
        d_in, d_out = widths(linears[path])
        layer, projection = layer_numbers.index(_layer_number(path)), projections.index(_projection_of(path))
        transposed = isinstance(linears[path], Conv1D)
        targets.append(
            Target(path=path, layer=layer, projection=projection, d_in=d_in, d_out=d_out, transposed=transposed)
        )
    targets.sort(key=lambda t: (t.layer, t.projection))
    return TargetMap(targets=tuple(targets), layers=tuple(layer_numbers), projections=tuple(projections))


def _match_expression(expression: str, candidates: set[str]) -> list[str]:
    if expression == ALL_LINEAR:
        return sorted(candidates, key=_natural)
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"adapter.target_modules {expression!r} is not a regular expression ({error}); "
            "write a list such as [q_proj, v_proj] for plain names"
        ) from None
    return sorted((path for path in candidates if pattern.fullmatch(path)), key=_natural)


def _match_name(name: str, model: nn.Module, linears: dict[str, nn.Module]) -> list[str]:
    matching = [(path, module) for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
    if not matching:
        raise ValueError(f"adapter.target_modules: {name!r} matches no module of this model; {_menu(linears)}")
    inside = [path for path, _ in matching if _layer_of(path) is not None]
    for path in inside or [matching[0][0]]:
        if path not in linears:
            raise ValueError(
                f"adapter.target_modules: {name!r} matches {path}, a {type(model.get_submodule(path)).__name__}, "
                f"which is not a linear module and cannot be adapted; {_menu(linears)}"
            )
    if not inside:
        raise ValueError(
            f"adapter.target_modules: {name!r} matches {matching[0][0]}, which belongs to no layer; {_menu(linears)}"
        )
    return inside


def _menu(linears: dict[str, nn.Module]) -> str:
    found: dict[str, str] = {}
    for path, module in linears.items():
        if _layer_of(path) is not None:
            d_in, d_out = widths(module)
            found.setdefault(_projection_of(path).split("*.")[-1], f"{d_in} -> {d_out}")
    if not found:
        return "the model has no linear module inside numbered layers"
    return "candidates: " + ", ".join(f"{name} ({size})" for name, size in found.items())


def _layer_of(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _layer_number(path: str) -> int:
    number = _layer_of(path)
    assert number is not None
    return number


def _projection_of(path: str) -> str:
    """Return the path with its layer number replaced by `*`."""
    parts = path.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join([*parts[:first], "*", *parts[first + 1 :]])


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
