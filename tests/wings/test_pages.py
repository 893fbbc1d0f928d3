"""Every table and marked figure on a page is what the results say; no such table is typed."""

import json
import re

from gram_mini.errors import UserError
from gram_mini.runs.record import fingerprint
from gram_mini.studies import pages as command
from gram_mini.studies import tables
from gram_mini.studies.lab import recorded_methods
from gram_mini.studies.paper import STUDIES
from gram_mini.village import VILLAGE

import pytest

PAGES = command.pages()
NAMES = [str(path.relative_to(command.ROOT)) for path in PAGES]
TABLE = re.compile(r"(?:^\|.*\|$\n?)+", re.MULTILINE)
# A cell that begins with two decimals, anything with an interval, or three decimals anywhere.
MEASURED = re.compile(r"\| *[+-]?\d{1,3}\.\d\d+(?![\d.])|±|(?<![\d.])\d{1,3}\.\d{3}(?![\d.])")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Results of a study of our own, in place of the committed ones."""

    def write(name: str, **record) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.results.cache_clear()
    yield write
    tables.results.cache_clear()


def rows(method: str, values: list[float], **more) -> list[dict]:
    return [
        {"method": method, "seed": seed, "x": value, **more} for seed, value in enumerate(values)
    ]


def typed_by_hand(text: str) -> list[str]:
    """The first lines of tables with measured figures that stand outside markers."""
    outside = command.TABLE.sub("", text)
    found = []
    for table in TABLE.findall(outside):
        plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", table)
        if MEASURED.search(plain):
            found.append(table.splitlines()[0])
    return found


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_a_page_shows_what_the_results_say(path):
    text = path.read_text("utf-8")
    assert command.written(text) == text, "run python -m gram_mini.studies.pages"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_no_table_of_figures_is_typed_by_hand(path):
    assert typed_by_hand(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_no_line_begins_with_the_marker_of_a_figure(path):
    """Markdown takes such a line for HTML, and ends the paragraph before it."""
    assert not re.search(r"^\s*<!--[=/]", path.read_text("utf-8"), re.MULTILINE)


def test_every_table_that_the_command_knows_stands_on_a_page():
    text = "".join(path.read_text("utf-8") for path in PAGES)
    on_pages = {name for _, name, _, _ in command.TABLE.findall(text)}
    assert on_pages == set(tables.tables())


def test_all_studies_have_five_seeds_of_this_backbone_and_of_these_methods():
    """As the pages say."""
    methods = json.loads(json.dumps(recorded_methods()))
    for name in STUDIES:
        record = tables.results(name)
        about = record["about"]
        assert record["seeds"] == [1, 2, 3, 4, 5], name
        assert about["backbone"] == fingerprint(VILLAGE), name
        assert all(methods[each] == made for each, made in about["methods"].items()), name


def test_what_counts_as_a_table_of_figures():
    head = "| a | b |\n| --- | --- |\n"
    for line in ("| x | 0.87 |", "| x | 0.9 ± 0.1 |", "| x | loss 0.773 |", "| -1.25 | x |"):
        assert typed_by_hand(f"{head}{line}\n") == ["| a | b |"]
        assert typed_by_hand(f"<!-- table: t -->\n{head}{line}\n<!-- end -->\n") == []
    for line in ("| OpenRLHF 0.11 | 1.16.0 |", "| `--lr 0.125` | 0.1 |", "| 2506.14175 | 12 |"):
        assert typed_by_hand(f"{head}{line}\n") == []


# ---- the command ---------------------------------------------------------------------


def test_a_changed_figure_is_found_and_written_back(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    good = command.written(
        "<!-- table: table -->\n<!-- end -->\nThen "
        "<!--=table/GRAM/position_gap-->0.000 ± 0.000<!--/-->.\n"
    )
    page.write_text(good.replace("GRAM | 0.", "GRAM | 1."))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "pages", lambda: [page])
    command.main([])
    assert page.read_text() == good and "wrote page.md" in capsys.readouterr().out
    command.main([])
    assert not capsys.readouterr().out


def test_a_table_keeps_nothing_of_what_stood_there():
    text = "<!-- table: table -->\nanything\n<!-- end -->\n"
    assert "anything" not in command.written(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: nonsense -->\n<!-- end -->", "table nonsense: no such table"),
        ("<!-- table: table -->\n| a |\n", "has no end"),
        ("<!-- table: table -->\n<!-- table: bon -->\n<!-- end -->", "has no end"),
        ("<!--=table/GRAM/fact_only-->0.1", "has no end"),
        ("<!--=nonsense/GRAM/x-->0.1<!--/-->", "nonsense: no committed results"),
        ("<!--=table/GRAM/x-->0.1<!--/-->", "no such figures in table.json"),
        ("<!--=bon/GRAM/true_reward-->0.1<!--/-->", "9 such figures"),
        ("<!--=table/GRAM/fact_only-->much<!--/-->", "'much' is not a form"),
    ],
)
def test_what_cannot_be_written_ends_in_one_line(text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        command.written(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.000 ± 0.000", "0.123 ± 0.046"),
        ("7.77", "0.12"),
        ("+0.0 ± 9.9", "+0.1 ± 0.0"),
        ("50%", "12%"),
        ("50.0% ± 0.0%", "12.3% ± 4.6%"),
        ("-3", "0"),
    ],
)
def test_a_figure_takes_the_form_that_stands_there(old, new):
    assert command.in_the_form_of(old, [0.1234, 0.0456], "x") == new


def test_a_figure_without_an_interval_gets_none():
    for value in ([0.1, None], [0.1, 0.0, 0.2]):
        with pytest.raises(UserError, match="not a form"):
            command.in_the_form_of("0.1 ± 0.1", value, "x")


# ---- what is in the tables -----------------------------------------------------------


def test_figures_are_found_by_their_names(study):
    a, b = rows("A", [1.0, 2.0, 4.0], n=2), rows("B", [0.0, 1.0, 2.0], n=2)
    means = [{"method": "A", "n": 2, "x": [7 / 3, 1.0]}, {"method": "A", "n": 8, "x": [5.0, None]}]
    study("s", seconds={"1": 60, "2": [180, 120]}, means=means, rows=[*a, *b])
    assert command.figure("s/A/n=8/x") == [5.0, None]
    assert command.figure("s/A/seed=2/x") == [4.0, None]
    assert command.figure("s/minutes") == [2.0, None]
    # Within the seeds A is ahead by 1, 1, 2: the mean 4/3, and t(2) * sd / sqrt(3).
    change, half = command.figure("s/A minus B/x")
    assert change == pytest.approx(4 / 3)
    assert half == pytest.approx(4.302653 * (1 / 3) ** 0.5 / 3**0.5, rel=1e-3)


def test_cells():
    assert tables.cell({"x": [0.8694, 0.0121]}, "x") == "0.869 ± 0.012"
    assert tables.cell({"x": [0.5, None]}, "x") == tables.cell({"x": [0.5, 0.0]}, "x") == "0.500"
    assert tables.cell({"x": [0.589, 0.544, 0.637]}, "x") == "0.589 (0.544–0.637)"
    assert tables.cell({"x": [0.0, 0.0]}, "x") == "0"
    assert tables.cell({"true reward": [-1.0, 0.0]}, "true reward") == "-1.00"
    assert tables.cell({"way": "by id"}, "way") == "by id"
    assert tables.cell({}, "x") == ""


def test_a_crossed_table_says_how_many_seeds_where_they_are_not_the_same(study):
    even = [row for n in (1, 2) for row in rows("A", [0.1, 0.2], n=n)]
    study("even", rows=even)
    assert tables.crossed("even", "n", {1: "one", 2: "two"}, "x") == (
        "| method, n | one | two |\n|---|---|---|\n| A | 0.150 ± 0.635 | 0.150 ± 0.635 |"
    )
    study("uneven", rows=[*even, *rows("B", [0.3], n=2)])
    assert tables.crossed("uneven", "n", (1, 2, 1000), "x").splitlines() == [
        "| method, n | 1 | 2 | 1,000 |",
        "|---|---|---|---|",
        "| A | 0.150 (2) | 0.150 (2) |  |",
        "| B |  | 0.300 (1) |  |",
    ]


def test_judges_of_the_helpful_labels_leave_out_the_session_with_other_rates():
    table = tables.real_helpful()
    (line,) = re.findall(r"^\| D-Baseline .*", table, re.MULTILINE)
    record = json.loads((tables.RESULTS / "real-labels.json").read_text())
    held_out = [
        row["held out"]
        for row in record["rows"]
        if row["labels"] == "helpful" and row["method"] == "D-Baseline" and row["session"] != 1
    ]
    assert len(held_out) == 3
    assert line.startswith(f"| D-Baseline | {sum(held_out) / 3:.3f} ±") and "(3)" in line
