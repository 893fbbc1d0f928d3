"""Draw the pictures of the studies again, from their committed results alone.

Without a NAME, all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.studies import real
from gram_mini.studies.drawing import draw
from gram_mini.studies.paper import STUDIES, Study
from gram_mini.studies.seeds import RESULTS

EXAMPLES = """\
  python -m gram_mini.studies.redraw table bon"""


def study_of(path: Path) -> Study | None:
    """The study that has a picture of these results; those of studies.real have any name."""
    if path.stem.endswith(("-table", "-curve")):
        record = json.loads(path.read_text())
        tests = record.get("about", record).get("data", {}).get("tests", {})
        return real.studies(path.stem.rpartition("-")[0], tests)[path.stem]
    return STUDIES.get(path.stem)


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a study, as its files are called")
    args = parser.parse_args(argv)
    found = [(path, study_of(path)) for path in sorted(RESULTS.glob("*.json"))]
    known = {path.stem: (path, study) for path, study in found if study}
    for name in args.names or known:
        if name not in known:
            raise UserError(f"{name}: no results of such a study; there are {', '.join(known)}")
        path, study = known[name]
        draw(name, study, json.loads(path.read_text())["rows"], path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    with clear_errors():
        main()
