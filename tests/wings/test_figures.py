"""The pictures of the studies: one colour a method, names that do not overlap, honest axes."""

import itertools
import json
import math
from functools import cache

from gram_mini.errors import UserError
from gram_mini.pairs import Pair
from gram_mini.studies import drawing, helpdesk, lab, pages, paper, real, style, tables
from gram_mini.studies.figures import figure_text

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

STUDIES = paper.STUDIES | real.STUDIES | helpdesk.STUDIES
COMMITTED = [path for path in sorted(pages.RESULTS.glob("*.json")) if path.stem in STUDIES]
# Without stage 1, beside METHODS.
PLAIN = {"zero-shot", "pick the longer", "nothing", "the longer response"}
DASHED = PLAIN | {name for name, (from_stage_1, *_) in lab.METHODS.items() if not from_stage_1}


@cache
def committed(path):
    """The study of a file of committed results, and its picture."""
    study, rows = STUDIES[path.stem], json.loads(path.read_text())["rows"]
    return study, drawing.picture_of(path.stem, study, rows)


def each(*kinds):
    """Parametrizes over the committed results of studies whose picture is of one of these kinds."""
    kind_of = lambda path: "dots" if STUDIES[path.stem].x is None else "lines"
    paths = [path for path in COMMITTED if kind_of(path) in kinds]
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def small(shown, rows, x="eps"):
    """A picture of rows (method, x, seed, figure, ...), the figures in the order of ``shown``."""
    names = ("method", x or "x", "seed", *shown)
    keys = ("method", x) if x else ("method",)
    study = paper.Study(None, keys, x, shown, ())
    return drawing.picture_of("small", study, [dict(zip(names, row)) for row in rows])


def texts_that_overlap_or_are_cut(figure):
    figure.draw_without_rendering()
    beyond = set()  # marks of an axis that matplotlib keeps but does not show
    for axis in figure.axes:
        for along in (axis.xaxis, axis.yaxis):
            low, high = sorted(along.get_view_interval())
            ticks = along.get_major_ticks() + along.get_minor_ticks()
            beyond |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    texts = figure.findobj(lambda one: isinstance(one, Text) and one.get_text())
    texts = [text for text in texts if text.get_visible() and text not in beyond]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    wrong = []
    for text, box in boxes:
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1:
            wrong.append(text)
    for (text, box), (other, its) in itertools.combinations(boxes, 2):
        wide = min(box.x1, its.x1) - max(box.x0, its.x0)
        high = min(box.y1, its.y1) - max(box.y0, its.y0)
        if wide > 1 and high > 1:
            wrong.append((text, other))
    return wrong


# ---- the committed results -----------------------------------------------------------


def test_all_committed_results_of_studies_have_a_picture():
    drawn = {path.stem for path in COMMITTED}
    assert drawn == {path.stem for path in pages.RESULTS.glob("*.png")}


@each("dots", "lines")
def test_texts_can_be_read_on_a_page(path):
    _, figure = committed(path)
    assert figure.get_figwidth() == 8  # about 800 pixels
    texts = figure.findobj(lambda one: isinstance(one, Text) and one.get_text())
    assert min(text.get_size() for text in texts) >= 9
    assert all(axis.get_gridspec().ncols <= 2 for axis in figure.axes)
    assert texts_that_overlap_or_are_cut(figure) == []


@each("dots", "lines")
def test_every_axis_has_its_unit_and_holds_all_points(path):
    study, figure = committed(path)
    for axis in figure.axes:
        assert axis.get_xlabel() and (axis.get_ylabel() or study.x is None)
        scale = drawing._scale(axis.get_title("left"))
        begin, end = axis.get_xlim() if study.x is None else axis.get_ylim()
        for line in axis.lines:
            if line.get_color() != drawing.GREY:
                values = line.get_xdata() if study.x is None else line.get_ydata()
                assert begin <= min(values) and max(values) <= end
        assert scale.begin is None or 0 <= begin <= scale.begin
        assert scale.end is None or end <= scale.end
        # A line for chance never stands on a position gap.
        chance = [line for line in axis.lines if line.get_color() == drawing.GREY]
        chance = [line for line in chance if line.get_label() != drawing.BOUND]
        of_choices = scale.unit in ("share judged right", "share of pairs in true order")
        assert len(chance) == (of_choices and begin < 0.5)  # not where it would lie on the frame


@each("dots", "lines")
def test_what_stands_below_names_the_marks_that_are_there(path):
    _, figure = committed(path)
    lines = [line for axis in figure.axes for line in axis.lines]
    dots = [line for line in lines if line.get_marker() == "o"]
    there = {
        "dashed": any(line.get_linestyle() == "--" for line in lines),
        "dotted": any(line.get_linestyle() == ":" for line in lines),
        "hollow": any(dot.get_markerfacecolor() == "white" for dot in dots),
    }
    (said,) = figure.findobj(lambda one: isinstance(one, Text) and "seeds; " in one.get_text())
    assert there == {mark: mark in said.get_text() for mark in there}


@each("lines")
def test_a_line_has_its_methods_colour_and_is_dashed_only_without_stage_1(path):
    study, figure = committed(path)
    methods = {row["method"] for row in json.loads(path.read_text())["rows"]}
    for axis in figure.axes:
        seen = set()
        for line in axis.lines:
            name, look = line.get_label(), (line.get_color(), line.get_linestyle())
            if name in methods:
                assert look == (style.COLORS[name], "--" if name in DASHED else "-")
                assert look not in seen and not seen.add(look)
            else:  # a seed, the bound or chance
                assert look[1] != "--" or look[0] in {style.COLORS[name] for name in DASHED}
        assert sorted(text.get_text() for text in axis.texts) == sorted(
            line.get_label() for line in axis.lines if not line.get_label().startswith("_")
        )


@each("dots")
def test_a_dot_has_its_methods_colour_and_is_hollow_only_without_stage_1(path):
    _, figure = committed(path)
    for axis in figure.axes:
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert dots and len(axis.texts) == len(dots)  # a number for each
        for dot in dots:
            method = dot.get_label().rpartition(": ")[2]
            assert dot.get_color() == style.COLORS[method]
            assert (dot.get_markerfacecolor() == "white") == (method in DASHED)


# ---- colours -------------------------------------------------------------------------


def test_every_method_has_a_colour():
    assert {*lab.METHODS, "zero-shot", "oracle", "true reward"} <= set(style.COLORS)
    assert {"likelihood", "GRAM + likelihood (ours)"} <= set(style.COLORS)
    assert len(style.COLORS) == sum(map(len, style.PALETTE.values()))  # each stands there once


# Machado, Oliveira and Fernandes (2009): linear RGB as the color-blind see it.
SIGHT = {
    "all cones": np.eye(3),
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


def lab_of(color, sight):
    """A colour in CIELAB, in which equal distances look about equally far."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ seen / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_the_color_blind_can_tell_the_lines_of_a_panel_apart(sight):
    panels = [axis for path in COMMITTED for axis in committed(path)[1].axes]
    looks = [{(line.get_color(), line.get_linestyle()) for line in axis.lines} for axis in panels]
    likely = (*lab.MAIN, "likelihood", "GRAM + likelihood (ours)", "true reward")
    looks.append({(style.COLORS[name], style.dash_of(name)) for name in likely})
    for look in looks:
        for (a, dash), (b, other) in itertools.combinations(look, 2):
            if dash == other and dash in ("-", "--"):
                assert np.linalg.norm(lab_of(a, sight) - lab_of(b, sight)) > 15, (a, b)


# ---- small rows ----------------------------------------------------------------------


def test_names_of_many_lines_that_end_in_one_point_do_not_overlap():
    rows = [(name, x, 1, 0.9, x / 9) for name in lab.METHODS for x in (0.0, 0.4)]
    shown = ("accuracy", "position gap")
    figure = small(shown, rows)
    assert texts_that_overlap_or_are_cut(figure) == []
    short = small(shown, [row for row in rows if row[0] != "GRAM" or row[1] == 0.0])
    assert texts_that_overlap_or_are_cut(short) == []


def test_places_are_moved_apart_as_little_as_can_be():
    assert style.apart([0.0, 5.0, 9.0], 1.0, 0.0, 10.0) == [0.0, 5.0, 9.0]
    assert style.apart([5.0, 5.0, 5.0], 1.0, 0.0, 10.0) == [4.0, 5.0, 6.0]
    assert style.apart([5.2, 5.0, 1.0], 1.0, 0.0, 10.0) == pytest.approx([5.6, 4.6, 1.0])
    assert style.apart([9.9, 9.9], 1.0, 0.0, 10.0) == pytest.approx([9.0, 10.0])
    assert style.apart([], 1.0, 0.0, 10.0) == []


def test_seeds_are_dots_and_over_a_kl_thin_lines():
    rows = [("GRAM", x, seed, 0.6 + x + seed / 10) for seed in (1, 2) for x in (0.0, 0.1)]
    dots = small(("accuracy",), rows).axes[0].lines
    thin = small(("accuracy",), rows, x="KL").axes[0].lines
    for seeds, stroke in ((dots, "None"), (thin, "-")):
        *each_seed, mean = (line for line in seeds if line.get_color() != drawing.GREY)
        assert [line.get_linestyle() for line in each_seed] == [stroke] * 2
        assert [list(line.get_ydata()) for line in each_seed] == [
            [pytest.approx(0.6 + x + seed / 10) for x in (0.0, 0.1)] for seed in (1, 2)
        ]
        assert mean.get_ydata() == pytest.approx([0.75, 0.85]) and mean.get_linewidth() > 1


def test_the_mean_of_a_path_is_of_its_steps():
    """The KL of a seed may go back and forth."""
    rows = [
        {"method": "GRAM", "step": step, "seed": seed, "KL": kl + seed, "true reward": kl}
        for seed in (1, 2)
        for step, kl in enumerate((0.0, 2.0, 1.0))
    ]
    study = paper.Study(None, ("method", "step"), "KL", ("true reward",), ())
    figure = drawing.picture_of("small", study, rows)
    assert list(figure.axes[0].lines[-1].get_xdata()) == [1.5, 3.5, 2.5]


def test_one_seed_and_what_some_rows_lack():
    rows = [("D-Baseline", 0, 1, 0.7), ("GRAM", 0, 1, 0.8, 0.1), ("GRAM", 0, 2, 0.9, 0.1)]
    figure = small(("accuracy", "position gap", "margin"), rows, x=None)
    accuracy, gap = figure.axes
    assert figure.get_suptitle() == "small (1 to 2 seeds)"
    assert [text.get_text() for text in accuracy.texts] == ["0.700", "0.850 ± 0.635"]
    assert [text.get_text() for text in gap.texts] == ["0.100"]
    assert accuracy.get_xlim() == (0.5, 1.0) and gap.get_xlim()[0] == 0


def test_an_axis_begins_at_its_scale_or_below_all_values():
    assert drawing._limits(drawing.ACCURACY, [0.86, 0.87]) == (0.5, 1.0)
    assert drawing._limits(drawing.ACCURACY, [0.29, 0.87]) == (0.2, 1.0)
    assert drawing._limits(drawing.SCALES["no answer"], [0.0, 1.0]) == (0.0, 1.0)
    assert drawing._limits(drawing.SCALES["margin"], [-0.01, 1.0])[0] == -0.1
    begin, end = drawing._limits(drawing.SCALES["true reward"], [-1.0, 3.0])
    assert begin < -1 and end > 3


# ---- the bound of smoothing, and the command -----------------------------------------


def test_the_best_margin_is_averaged_over_the_noise_of_the_labels():
    pairs = [Pair("x", "a", "b", 0, probability=p) for p in (0.8, 0.2, 0.5)]
    target = 0.8 * 0.9 + 0.2 * 0.1  # of the better response, for a and for b alike
    expected = 2 / 3 * math.log(target / (1 - target))
    assert paper.best_mean_margin(pairs, 0.1) == pytest.approx(expected)
    assert paper.best_mean_margin(pairs, 0.0) == pytest.approx(2 / 3 * math.log(4))


def test_the_bound_is_a_solid_grey_line_of_the_margin_alone():
    rows = [("GRAM", eps, 1, 0.9, 0.5, 1.2) for eps in (0.0, 0.4)]
    accuracy, margin, _ = small(("accuracy", "margin", "bound"), rows).axes
    assert not [line for line in accuracy.lines if line.get_label() == drawing.BOUND]
    (bound,) = (line for line in margin.lines if line.get_label() == drawing.BOUND)
    assert (bound.get_linestyle(), bound.get_color()) == ("-", drawing.GREY)
    assert list(bound.get_ydata()) == [1.2, 1.2] and margin.get_ylim()[1] > 1.2


def test_the_command_draws_what_is_named(tmp_path, monkeypatch):
    rows = [{"seed": seed, "method": "GRAM", "held out": 0.8} for seed in (1, 2)]
    (tmp_path / "real-table.json").write_text(json.dumps({"rows": rows[:1]}))
    (tmp_path / "real-start.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "speed-train.json").write_text("{}")
    for module in (pages, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "pages", lambda: [])
    tables.results.cache_clear()
    pages.main(["--draw", "real-start"])
    assert [path.name for path in tmp_path.glob("*.png")] == ["real-start.png"]
    pages.main(["--draw"])
    assert len(list(tmp_path.glob("*.png"))) == 2
    with pytest.raises(UserError, match="speed-train: no results of such a study; there are real"):
        pages.main(["--draw", "speed-train"])
    tables.results.cache_clear()


def test_a_figure_that_rounds_to_zero_has_no_sign():
    assert figure_text([-0.004, 0.39], ".2f") == "0.00 ± 0.39"
    assert figure_text([-0.004, None], ".2f") == "0.00"
    assert figure_text([-1.0, None], ".2f") == "-1.00" and figure_text([0.0, None]) == "0"
