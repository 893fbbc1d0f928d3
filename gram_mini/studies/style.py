"""How methods look in every picture, the notebook's too.

A dashed line or a hollow dot means "without stage 1". Colours are those of Okabe and Ito
(jfly.uni-koeln.de/color), and Paul Tol's muted ones (personal.sron.nl/~pault) for what is not a
method; the color-blind can tell them apart.
"""

from __future__ import annotations

from gram_mini.studies.lab import METHODS

PALETTE = {  # methods of one kind share a colour; of those in a panel of lines one is dashed
    "#AAAAAA": ("zero-shot", "nothing", "the longer response"),
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
        "random, GRAM + likelihood (ours)",
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
