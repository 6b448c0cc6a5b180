"""Figures of numbers over time, all groups in one: loss and scores (paper, Figure 2), ranks, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from metatt_scale.recipe.scores import is_loss
from metatt_scale.report.groups import Curve, Group, span
from metatt_scale.report.scores import label, score_keys
from metatt_scale.report.theme import Theme, grid, legend, plain, thinned

_MOST_POINTS = 150  # of a curve with a value at every logged step; more would be a band of noise
_MOST_ARROWS, _MOST_POINTERS = 8, 100  # with text, and all
_MOST_PANELS = 40


def scores(groups: Sequence[Group], theme: Theme) -> Figure:
    """Draw the training loss and everything evaluations gave, with arrows where ranks change."""
    keys = ["loss", *score_keys(groups)][:_MOST_PANELS]
    figure, panels = grid(len(keys))
    for key, axes in zip(keys, panels, strict=True):
        for index, group in enumerate(groups):
            curve = group.curve(key, most=_MOST_POINTS if key == "loss" else None)
            if curve is None:
                continue
            _plot(axes, curve, theme.style(index), marked=key != "loss")
            if key != "loss" or len(keys) == 1:
                _point_at_changes(axes, group, curve, theme, index, above=is_loss(key))
        _finish(axes, groups, label(key))
    legend(figure, theme, [group.name for group in groups])
    return figure


def ranks(groups: Sequence[Group], theme: Theme) -> Figure:
    """Draw the rank of every bond over time, in one panel where the bonds of every chain have the same."""
    curves = [group.rank_curves() for group in groups]
    same = all(np.array_equal(bonds[0].mean, curve.mean, equal_nan=True) for bonds in curves for curve in bonds)
    figure, panels = grid(1 if same else max(map(len, curves)), row_height=2.3)
    for bond, axes in enumerate(panels):
        for index, bonds in enumerate(curves):
            if bond < len(bonds):
                _plot(axes, bonds[bond], theme.style(index), marked=False, drawstyle="steps-post")
        _finish(axes, groups, "rank of every bond" if same else f"rank of bond {bond + 1}")
        _start_at_zero(axes)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    legend(figure, theme, [group.name for group in groups])
    return figure


def speed(groups: Sequence[Group], theme: Theme) -> Figure:
    """Draw throughput and memory over time."""
    figure, panels = grid(2)
    titles = {"tokens_per_second": "throughput (tokens/s)", "memory_gib": "peak memory so far (GiB)"}
    for (key, title), axes in zip(titles.items(), panels, strict=True):
        for index, group in enumerate(groups):
            curve = group.curve(key, most=_MOST_POINTS)
            if curve is not None:
                _plot(axes, curve, theme.style(index), marked=False)
        _finish(axes, groups, title)
        _start_at_zero(axes)
    legend(figure, theme, [group.name for group in groups])
    return figure


def _plot(axes: Axes, curve: Curve, style: dict[str, Any], *, marked: bool, **how: Any) -> None:
    """Draw a mean with a band of its standard error."""
    single = len(curve.x) == 1  # a line of one point would not be seen
    axes.plot(curve.x, curve.mean, **{**style, **({} if marked or single else {"marker": None})}, **how)
    error = np.nan_to_num(curve.error)
    if error.any():
        step = "post" if "drawstyle" in how else None
        low, high = curve.mean - error, curve.mean + error
        axes.fill_between(curve.x, low, high, color=style["color"], alpha=0.2, linewidth=0, step=step)


def _point_at_changes(axes: Axes, group: Group, curve: Curve, theme: Theme, index: int, *, above: bool) -> None:
    """Let arrows show where a group's ranks change, and to what, from the side to which the curve jumps then."""
    changes, colour = group.rank_changes(), theme.style(index)["color"]
    away = 24 + 14 * (index % 3)  # groups that change together have their labels above one another
    for place, (x, found) in thinned(list(enumerate(changes.items())), _MOST_POINTERS):
        told = len(changes) <= _MOST_ARROWS or place == len(changes) - 1
        note = axes.annotate(
            f"r = {span(found)}" if told else "",
            (x, float(np.interp(x, curve.x, curve.mean))),
            xytext=(0, away if above else -away),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color=colour,
            fontsize=9,
            arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 4},
        )
        note.set_path_effects([withStroke(linewidth=3, foreground=theme.paper)])
    if changes:
        axes.margins(y=0.35)


def _start_at_zero(axes: Axes) -> None:
    """Show zero, and room above the highest value."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * top if 0 < top < np.inf else 1)


def _finish(axes: Axes, groups: Sequence[Group], title: str) -> None:
    axes.set_title(plain(title))
    axes.set_xlabel(groups[0].unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
