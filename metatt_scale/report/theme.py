"""How figures look: a light and a dark theme with colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy import linspace

from metatt_scale.report.scores import readable

WIDTH = 9.6
"""Of every figure, in inches."""
_DPI = 150
_MARKERS = "osD^vP*"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_LONGEST_NAME = 110
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a figure; those of the page around it are in `page.py`."""

    name: str
    paper: str
    ink: str
    faint: str
    colours: tuple[str, ...]
    """Of groups of runs: the palette of Okabe and Ito (2008), darker or lighter where the paper asks for it."""
    sequence: tuple[float, float]
    """The part of viridis whose lines stand out from the paper."""

    def style(self, index: int) -> dict[str, Any]:
        """Return colour, marker and dashes of a group: none is told apart by its colour alone."""
        return {
            "color": self.colours[index % len(self.colours)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _DASHES[index % len(_DASHES)],
        }

    def colormap(self) -> Colormap:
        """Return viridis without the end that is as light or as dark as the paper."""
        return ListedColormap(matplotlib.colormaps["viridis"](linspace(*self.sequence, 256)))

    def settings(self) -> dict[Any, Any]:
        """Return matplotlib's settings."""
        inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
        return {
            **dict.fromkeys(inked, self.ink),
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), self.paper),
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": self.faint,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#24292f",
    faint="#e3e6e9",
    colours=("#0072b2", "#d55e00", "#009e73", "#c0609a", "#b8860b", "#3fa0d8", "#5a5f66"),
    sequence=(0.0, 0.85),
)
DARK = Theme(
    name="dark",
    paper="#15181c",
    ink="#d7dce2",
    faint="#2c3239",
    colours=("#4c9fe6", "#ff8a47", "#2fc79a", "#e59ac8", "#f0c24b", "#a8dcf8", "#b4bac2"),
    sequence=(0.25, 1.0),
)


def render(draw: Callable[[Theme], Figure]) -> dict[str, bytes]:
    """Return a figure as PNG in every theme."""
    result = {}
    for theme in (LIGHT, DARK):
        # classic.mplstyle and the like of the user's own would make figures that fit neither page.
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in another script
            matplotlib.rcdefaults()
            for name, value in theme.settings().items():
                matplotlib.rcParams[name] = value
            buffer = io.BytesIO()
            draw(theme).savefig(buffer, format="png", dpi=_DPI)
        result[theme.name] = buffer.getvalue()
    return result


def thinned(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return at most so many of some items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def plain(text: str) -> str:
    """Return text as it is to be read: not as a formula, on one line, and not too long for a legend."""
    line = readable(" ".join(text.split()))
    line = line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…"
    return line.replace("$", r"\$")


def legend(figure: Figure, theme: Theme, names: Sequence[str]) -> None:
    """Write the names of the groups under a figure."""
    handles = [Line2D([], [], label=" " + plain(name), **theme.style(index)) for index, name in enumerate(names)]
    columns = max(1, min(4, len(names), _LONGEST_NAME // max(map(len, names))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def grid(count: int, row_height: float = 2.9) -> tuple[Figure, Iterator[Axes]]:
    """Return a figure and axes for so many panels, two in a row."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, row_height * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, iter(axes[:count])
