"""Write the figures on the project's pages, from the committed results of the studies.

A table stands between <!-- table: NAME --> and <!-- end -->; tables.py says what is in it. A figure
in a sentence stands between <!--=NAME--> and <!--/-->. Its text is written in the form that it has
there: 0.869, 0.87, 0.869 ± 0.012, +0.01 or 87%. Its NAME, with _ for each space, is one of

  table/GRAM/position gap                 STUDY/METHOD/FIGURE
  bon/GRAM/n=256/true reward              the same, where a method has several rows; seed=1, too
  orders/GRAM minus GRAM, 2 epochs/margin the difference of two methods within a seed
  orders/minutes                          the time that a seed took
"""

from __future__ import annotations

import re
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.output import write_whole
from gram_mini.studies import helpdesk, real
from gram_mini.studies.drawing import picture_of
from gram_mini.studies.paper import STUDIES
from gram_mini.studies.tables import RESULTS, mean, results, select, tables

EXAMPLES = """\
  python -m gram_mini.studies.pages                     # git diff shows what was written
  python -m gram_mini.studies.pages --draw table bon"""
ROOT = Path(__file__).parents[2]
TABLE = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"(<!--=(.+?)-->)(.*?)(<!--/-->)")
FORM = re.compile(r"(\+?)-?\d+(?:\.(\d+))?(%?)( ± .*)?")


def pages() -> list[Path]:
    """README.md and the pages of the wings, but for those that a command writes as a whole."""
    found = [ROOT / "README.md", *sorted((ROOT / "gram_mini").glob("**/*.md"))]
    return [path for path in found if path.parent.name != "results"]


def written(text: str) -> str:
    """The text of a page with its tables and figures as the results have them.

    Raises:
        UserError: a marker without its end, or a name that is none.
    """
    known = tables()

    def table(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        if name not in known:
            raise UserError(f"table {name}: no such table; there are {', '.join(known)}")
        return f"{begin}{known[name]}\n{end}"

    def sentence(match: re.Match) -> str:
        begin, name, old, end = match.groups()
        name = name.replace("_", " ")
        return f"{begin}{in_the_form_of(old, figure(name), name)}{end}"

    for pattern, begin in ((TABLE, "<!-- table:"), (FIGURE, "<!--=")):
        inside = [match[3] for match in pattern.finditer(text)]
        if text.count(begin) != len(inside) or any(begin in part for part in inside):
            raise UserError(f"{begin}...-->: one of them has no end")
    return FIGURE.sub(sentence, TABLE.sub(table, text))


def figure(name: str) -> list:
    """[mean, half of its interval] of a figure by its name; see above.

    Raises:
        UserError: there is no such figure, or more than one.
    """
    study, *path, key = name.split("/")
    record = results(study)
    if key == "minutes" and not path:
        times = record["seconds"].values()
        seconds = [x for time in times for x in (time if isinstance(time, list) else [time])]
        return [sum(seconds) / len(seconds) / 60, None]
    method, *conditions = path or [""]
    where = {key: value for key, _, value in (text.partition("=") for text in conditions)}
    if " minus " not in method:
        rows = record["rows" if "seed" in where else "means"]
        found = [row[key] for row in select(rows, method=method, **where) if key in row]
    else:
        of, against = (select(record["rows"], method=m, **where) for m in method.split(" minus "))
        before = {row["seed"]: row[key] for row in against if key in row}
        changes = [{key: row[key] - before[row["seed"]]} for row in of if row["seed"] in before]
        found = [mean(changes, key)] if changes else []
    if len(found) != 1:
        raise UserError(f"figure {name}: {len(found) or 'no'} such figures in {study}.json")
    return found[0] if isinstance(found[0], list) else [found[0], None]


def in_the_form_of(old: str, value: list, name: str) -> str:
    """The figure with the decimals, the interval, the sign and the % of the old text."""
    form = FORM.fullmatch(old)
    has_half = len(value) == 2 and value[1] is not None
    if not form or (form[4] and not has_half):
        raise UserError(f"figure {name}: {old!r} is not a form that it has, as 0.869 or 87%")
    unit = 100 if form[3] else 1
    decimals = len(form[2] or "")
    text = f"{value[0] * unit:{'+' if form[1] else ''}.{decimals}f}{form[3]}"
    return f"{text} ± {value[1] * unit:.{decimals}f}{form[3]}" if form[4] else text


def draw(names: list[str]) -> None:
    """Draw the pictures of these studies again, or of all.

    Raises:
        UserError: a study without results.
    """
    studies = STUDIES | real.STUDIES | helpdesk.STUDIES
    known = [name for name in studies if (RESULTS / f"{name}.json").is_file()]
    for name in names or known:
        if name not in known:
            raise UserError(f"{name}: no results of such a study; there are {', '.join(known)}")
        picture = RESULTS / f"{name}.png"
        picture_of(name, studies[name], results(name)["rows"]).savefig(picture, dpi=100)
        print(f"wrote {picture}")


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    text = "draw the pictures of these studies again, or of all"
    parser.add_argument("--draw", nargs="*", metavar="STUDY", help=text)
    args = parser.parse_args(argv)
    if args.draw is not None:
        draw(args.draw)
    for path in pages():
        name, before = str(path.relative_to(ROOT)), path.read_text("utf-8")
        try:
            after = written(before)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if after != before:
            write_whole(path, [after], name)
            print(f"wrote {name}")


if __name__ == "__main__":
    with clear_errors():
        main()
