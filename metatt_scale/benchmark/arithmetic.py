"""`--table scaling`: the adapter's own arithmetic without a backbone, as one of L, M, r, D doubles.

Per optimizer step with N rows, forward and backward, in multiplications (each 2 FLOP):

    x A                      3 N D r          per layer: its projections read the same x
    thin, (h C) B            N (4 r^2 + 3 r D)  per module
    folded, h (C B)          3 N r D + 3 r^2 D  per module
    C = G2[l] G3[m]          3 r^3            per module

Shape legend: N rows, D width, L layers, M projections, P, Q bonds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metatt_scale.adapter import ChainAdapter, ChainSpec, Target, TargetMap
from metatt_scale.adapter.modes import KINDS
from metatt_scale.benchmark.report import Report, describe_machine, ratio_cells
from metatt_scale.benchmark.settings import Settings, settings_of
from metatt_scale.benchmark.timing import ratios, take_turns
from metatt_scale.plan.shape import read_shape
from metatt_scale.recipe import Recipe

_NOTES = (
    "fold, forward and backward of all modules, and pulling back; the frozen linears answer with a ready tensor.",
    "predicted: the ratio of FLOPs. A measured ratio below it means that the base is bound by something else "
    "(launching kernels, memory).",
)
_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Size:
    """One adapter of MetaTT-4D and the work it does."""

    L: int
    M: int
    r: int
    D: int
    rows: int
    """N, tokens of a step."""

    def flops(self, folded: bool) -> int:
        """Return the floating-point operations of a step by the formula above."""
        n, d, r = self.rows, self.D, self.r
        module = 3 * n * r * d + 3 * r * r * d if folded else n * (4 * r * r + 3 * r * d)
        return 2 * self.L * (3 * n * d * r + self.M * (module + 3 * r**3))


class _Given(nn.Module):
    """Stands for a frozen linear: answers with a tensor that is there already."""

    bias = None

    def __init__(self, y_ND: Tensor) -> None:
        super().__init__()
        self._y_ND = y_ND

    def forward(self, x_ND: Tensor) -> Tensor:
        return self._y_ND.detach()


class _Modules(nn.Module):
    """L layers of M linears each, all of which read their layer's input."""

    def __init__(self, size: Size, y_ND: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(_Given(y_ND) for _ in range(size.M)) for _ in range(size.L))
        self.place = nn.Parameter(torch.zeros(1, device=y_ND.device))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [module(x_ND) for layer, x_ND in zip(self.layers, inputs, strict=True) for module in layer]  # type: ignore[union-attr]


def measure(recipe: Recipe, settings: Settings, device: torch.device, show: Callable[[str], None]) -> Report:
    """Time the arithmetic of MetaTT-4D at the recipe's sizes, and with each of them doubled.

    The sizes are layers, projections, width and the largest rank; `adapter.kind` and the order of modes do not count.

    Raises:
        ValueError: what backbone and targets refuse.
    """
    dtype = getattr(torch, recipe.backbone.dtype)
    shape = read_shape(recipe)
    layers, projections = len(shape.target_map.layers), len(shape.target_map.projections)
    rows = settings.examples * settings.length
    base = Size(L=layers, M=projections, r=max(shape.spec.ranks), D=shape.hidden, rows=rows)
    sizes = {"base": base}
    for letter in ("L", "M", "r", "D"):
        sizes[f"2 {letter}"] = replace(base, **{letter: 2 * getattr(base, letter)})
    steps, orders = {}, {}
    for name, size in sizes.items():
        show(f"building: {name}")
        steps[name], orders[name] = build_step(size, dtype, device)
    seconds = take_turns(steps, settings.repeats, device, show)
    table = [_row(name, size, orders, sizes, seconds) for name, size in sizes.items()]
    return Report(
        table="scaling",
        title=f"the arithmetic of MetaTT-4D alone, {rows} rows, {recipe.backbone.dtype}; base: that of "
        f"{recipe.backbone.path}",
        machine=describe_machine(device),
        columns=("size", "L", "M", "r", "D", "order", "seconds", "/ base", "range", "predicted"),
        cells=tuple(_cells(row) for row in table),
        rows=tuple(table),
        settings=settings_of("scaling", settings, recipe),
        notes=_NOTES,
    )


def build_step(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], bool]:
    """Return an optimizer step of one adapter without its backbone, and whether it folds C into B."""
    targets = tuple(
        Target(path=f"layers.{layer}.{m}", layer=layer, projection=m, d_in=size.D, d_out=size.D)
        for layer in range(size.L)
        for m in range(size.M)
    )
    target_map = TargetMap(
        targets=targets, layers=tuple(range(size.L)), projections=tuple(f"layers.*.{m}" for m in range(size.M))
    )
    sizes = (size.D, size.L, size.M, size.D)
    spec = ChainSpec(modes=KINDS["metatt_4d"], sizes=sizes, ranks=(size.r,) * 3)
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(shape, generator=generator) * _STD for shape in spec.shapes]
    x_ND = torch.randn(size.rows, size.D, generator=generator).to(device, dtype)
    y_ND, dy_ND = torch.zeros_like(x_ND), torch.ones_like(x_ND)
    model = _Modules(size, y_ND)
    adapter = ChainAdapter(spec, cores, 1.0, target_map, dtype)
    adapter.attach(model, device)  # type: ignore[arg-type]
    adapter.rows_per_step = size.rows
    adapter.room = 1 << 62  # there is no backbone that would set the limit

    def step() -> None:
        # A tensor of its own for every layer: equal ones would be projected once for all.
        inputs = [x_ND.detach().requires_grad_() for _ in range(size.L)]
        outputs = model(inputs)
        torch.autograd.backward(outputs, [dy_ND] * len(outputs))
        adapter.pull_back()
        adapter.zero_grad()

    return step, adapter.folds_into_b


def _row(
    name: str, size: Size, orders: dict[str, bool], sizes: dict[str, Size], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    flops = size.flops(orders[name])
    return {
        "arm": name,
        **asdict(size),
        "order": "folded" if orders[name] else "thin",
        "flops": flops,
        "predicted_ratio": flops / sizes["base"].flops(orders["base"]),
        "seconds": seconds[name],
        "time_ratio": ratios(seconds[name], seconds["base"])._asdict(),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        *(str(row[letter]) for letter in ("L", "M", "r", "D")),
        row["order"],
        f"{statistics.median(row['seconds']):.4g}",
        *ratio_cells(row["time_ratio"]),
        f"{row['predicted_ratio']:.3f}",
    )
