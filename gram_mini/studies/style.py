"""How methods look in every picture, the notebook's too: their colours, and names at the lines.

A dashed line or a hollow dot means "without stage 1". Colours are those of Okabe and Ito
(jfly.uni-koeln.de/color), and Paul Tol's muted ones (personal.sron.nl/~pault) for what is not a
method; the color-blind can tell them apart.
"""

from __future__ import annotations

import statistics

from gram_mini.studies.lab import METHODS

from matplotlib.colors import to_rgb

PALETTE = {  # methods of one kind share a colour; of those in a panel of lines one is dashed
    "#AAAAAA": ("zero-shot", "nothing", "the longer response", "pick the longer"),
    "#56B4E9": ("D-Baseline", "D-Freeze", "D-Regularisation", "D-Label-Smoothing"),
    "#0072B2": ("D from stage 1",),
    "#E69F00": ("G-Baseline", "G-Label-Smoothing", "G-Freeze"),
    "#D55E00": ("GRAM", "G from stage 1, eps = 0", "GRAM, 2 epochs", "in domain"),
    "#F4A582": ("GRAM, full rate",),
    "#009E73": ("G, both orders (ours)", "GRAM, both orders (ours)", "GRAM, both orders"),
    "#CC79A7": (
        *("likelihood", "likelihood per token", "likelihood over the backbone"),
        "likelihood, in domain",
    ),
    "#E8B9D3": ("likelihood, out of domain",),
    "#882255": (
        *("GRAM + likelihood (ours)", "GRAM + likelihood (ours), in domain"),
        *("random, GRAM + likelihood (ours)", "GRAM, both orders + likelihood (ours)"),
    ),
    "#8C6D31": ("stage 1 alone",),
    "#000000": ("oracle", "true reward", "the best scalar", "all"),
    "#332288": ("random, eps 0.0", "out of domain", "reference", "noisy, 2 epochs"),
    "#9C8FD9": ("random, eps 0.1", "noisy, 32 epochs"),
    "#117733": ("clearest, eps 0.0", "circle", "certain, 2 epochs"),
    "#7FC08F": ("clearest, eps 0.1", "certain, 32 epochs"),
    "#AA4499": ("hardest, eps 0.0", "Swiss", "cue, 2 epochs"),
    "#DDA5D3": ("hardest, eps 0.1", "cue, 32 epochs"),
    "#CC6677": ("first",),
    "#DDCC77": ("knock-out",),
    "#88CCEE": ("circle, fitted",),
    "#44AA99": ("part of all",),
    "#999933": ("Swiss, fitted",),
}
COLORS = {name: color for color, names in PALETTE.items() for name in names}


def color_of(name: str) -> str:
    """The colour of a method, or of one on a kind of pairs ("context: GRAM"); else grey."""
    return COLORS.get(name.rpartition(": ")[2], "#777777")


def without_stage_1(name: str) -> bool:
    """Whether a method does not begin from stage 1; the plain backbone does not, either."""
    method = name.rpartition(": ")[2]
    return not METHODS[method][0] if method in METHODS else method in PALETTE["#AAAAAA"]


def dash_of(name: str) -> str:
    return "--" if without_stage_1(name) else "-"


def name_lines(figure) -> None:
    """Write the label of each line at the right of its panel, a thin stroke from the line's end.

    The figure's layout must be "constrained", which makes room for the names.
    """
    names = []
    for axis in figure.axes:
        for line in axis.lines:
            if line.get_label().startswith("_"):  # matplotlib's mark of a line without a label
                continue
            dark = [0.65 * part for part in to_rgb(line.get_color())]  # legible on white
            stroke = {"arrowstyle": "-", "color": line.get_color(), "alpha": 0.6, "lw": 0.5}
            name = axis.annotate(
                line.get_label(),
                line.get_xydata()[-1],
                xytext=(1.04, 0.5),
                textcoords="axes fraction",
                annotation_clip=False,  # a line may end on the edge of its panel
                arrowprops={**stroke, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0},
                color=dark,
                va="center",
            )
            names.append(name)
    figure.draw_without_rendering()  # now the panels have their sizes
    for axis in figure.axes:
        of_axis, box = [name for name in names if name.axes is axis], axis.get_window_extent()
        gap = max((1.25 * name.get_size() * figure.dpi / 72 for name in of_axis), default=0)
        ends = [axis.transData.transform(name.xy)[1] for name in of_axis]
        for name, y in zip(of_axis, apart(ends, gap, box.y0 + gap / 2, box.y1 - gap / 2)):
            name.xyann = name.xyann[0], (y - box.y0) / box.height


def apart(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved so that any two are at least ``gap`` apart, in their order.

    They stay within ``low`` and ``high`` if there is room for all. The moves are the least by their
    squares: isotonic regression, in its form as a maximum of minima.
    """
    n, order = len(places), sorted(range(len(places)), key=places.__getitem__)
    # Less the gaps below each, all that is asked is that they do not fall.
    y = [places[i] - rank * gap for rank, i in enumerate(order)]
    moved = list(places)
    for rank, i in enumerate(order):
        least = max(
            min(statistics.fmean(y[j:k]) for k in range(rank + 1, n + 1)) for j in range(rank + 1)
        )
        moved[i] = max(low, min(least, high - (n - 1) * gap)) + rank * gap
    return moved
