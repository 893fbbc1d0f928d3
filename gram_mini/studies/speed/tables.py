"""The tables of README.md here and of runs/your_model.md, from the committed results."""

import json

from gram_mini.studies.speed.common import RESULTS, table
from gram_mini.studies.speed.memory import choices


def tables() -> dict[str, str]:
    """Marker on the page -> the Markdown between it and its end."""
    written = {"speed-choices": choices()}
    for study in ("train", "score", "step"):
        records = json.loads((RESULTS / f"speed-{study}.json").read_text())
        names = {name: {"setting": name} if len(records) > 1 else {} for name in records}
        rows = [{**names[name], **row} for name in records for row in records[name]["rows"]]
        written[f"speed-{study}"] = table(rows)
    return written
