"""Figures of one group's chain over time: singular values of its bonds, gradients of its cores (Figures 3 to 5)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metatt_scale.report.groups import Group, mean_and_error
from metatt_scale.report.scores import label, main_score
from metatt_scale.report.theme import WIDTH, Theme, plain, thinned

_SLICE_HEIGHT, _CORE_HEIGHT = 0.16, 0.3
_MOST_NAMES = 16
_MOST_LINES = 128
_TALLEST = 40  # inches of one heat map: a PNG has at most 2^16 pixels
_SMALLEST = 1e-30  # nothing smaller is drawn on a logarithmic axis: a chain that starts as zero has such values


def spectra(group: Group, theme: Theme) -> Figure:
    """Draw the singular values of every bond, a line per index."""
    bonds = group.spectra()
    columns = 2 if len(bonds) == 4 else min(3, len(bonds))
    rows = -(-len(bonds) // columns)
    figure = Figure(figsize=(WIDTH, 2.8 * rows + 0.2))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel().tolist()
    most = max((values.shape[1] for _, values in bonds), default=1)
    shades, colormap = Normalize(1, max(2, most)), theme.colormap().reversed()
    for bond, axes in enumerate(panels):
        if bond >= len(bonds):
            axes.remove()
            continue
        x, values = bonds[bond]
        values = np.where(values > _SMALLEST, values, np.nan)
        for k in thinned(range(values.shape[1]), _MOST_LINES):
            axes.plot(x, values[:, k], color=colormap(shades(k + 1)), marker="o", markersize=3, linewidth=1.2)
        if np.isfinite(values).any():
            axes.set_yscale("log")
        for change in thinned(list(group.rank_changes()), _MOST_LINES):
            axes.axvline(change, color=theme.ink, linewidth=1, linestyle=":")
        axes.set_title(f"bond {bond + 1}")
        axes.set_xlabel(group.unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if bond % columns == 0:
            axes.set_ylabel("singular value")
    bar = figure.colorbar(_mappable(shades, colormap), ax=panels[: len(bonds)], label="index of the singular value")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def gradients(group: Group, theme: Theme) -> Figure:
    """Draw the score over time, and below it heat maps of gradients: by core, then slice by slice."""
    edges, by_mode = group.gradients()
    sliced = {mode: values for mode, values in by_mode.items() if len(values) > 1}
    heights = [1.5, _CORE_HEIGHT * len(by_mode) + 0.1]
    heights += [min(max(0.6, _SLICE_HEIGHT * len(values)), _TALLEST) for values in sliced.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.35 * len(heights) + 0.5))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights).ravel().tolist()
    _draw_score(panels[0], group, theme)
    cores = np.stack([mean_and_error(values)[0] for values in by_mode.values()])
    colours = _common_scale([cores, *sliced.values()])
    names = [f"G{k + 1} {mode}" for k, mode in enumerate(by_mode)]
    _heat_map(panels[1], edges, cores, names, colours, theme)
    panels[1].set_title("cores (mean over slices)")
    for axes, (mode, values) in zip(panels[2:], sliced.items(), strict=True):
        found = group.slice_names(mode)
        named = found if found and len(found) == len(values) else [str(i) for i in range(len(values))]
        _heat_map(axes, edges, values, named, colours, theme)
        axes.set_title(plain(f"G{list(by_mode).index(mode) + 1} by {mode}"))
    panels[-1].set_xlabel(group.unit)
    figure.colorbar(_mappable(colours, theme.colormap()), ax=panels[1:], label="‖∇G‖ / √|G|", fraction=0.04)
    return figure


def _draw_score(axes: Axes, group: Group, theme: Theme) -> None:
    key = main_score(group)
    curve = group.curve(key)
    if curve is not None:
        axes.plot(curve.x, curve.mean, color=theme.colours[0], marker="o", markersize=3)
        error = np.nan_to_num(curve.error)
        low, high = curve.mean - error, curve.mean + error
        axes.fill_between(curve.x, low, high, color=theme.colours[0], alpha=0.2, linewidth=0)
    for change in thinned(list(group.rank_changes()), _MOST_LINES):
        axes.axvline(change, color=theme.ink, linewidth=1, linestyle=":")
    axes.set_title(plain(label(key)))


def _heat_map(
    axes: Axes, edges: np.ndarray, values: np.ndarray, names: list[str], colours: Normalize, theme: Theme
) -> None:
    """Draw rows from top to bottom; a column without a value stays empty."""
    rows = np.arange(len(values) + 1)
    shown = np.ma.masked_invalid(np.where(values > 0, values, np.nan))
    axes.pcolormesh(edges, rows, shown, norm=colours, cmap=theme.colormap())
    every = -(-len(names) // _MOST_NAMES)
    axes.set_yticks(rows[:-1:every] + 0.5, [plain(name) for name in names[::every]])
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _common_scale(tables: list[np.ndarray]) -> Normalize:
    values = np.concatenate([table.ravel() for table in tables])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return Normalize(0, 1)
    low, high = values.min(), values.max()
    return LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)


def _mappable(norm: Normalize, colormap: Colormap) -> ScalarMappable:
    return ScalarMappable(norm=norm, cmap=colormap)
