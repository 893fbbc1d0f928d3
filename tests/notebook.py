"""Run tutorial.ipynb: as it stands, written back with its outputs (make notebook), or as small
as can be (the tests).

python tests/notebook.py        # 5 to 15 minutes on 2 cores
"""

import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "tutorial.ipynb"

# What makes it small: (cell, what stands there, what takes its place).
SMALLEST = (
    ("train", "STEPS = []", 'STEPS = ["--steps", "2", "--limit", "64"]'),
    ("scalar-hand", "HEAD_STEPS = 40", "HEAD_STEPS = 10"),
    ("scalar-hand-loop", "draw_batches(answer_rows, 64", "draw_batches(answer_rows[:160], 16"),
    ("compared", "compare_many(village_pairs(split))", "compare_many(village_pairs(split, 30))"),
    ("compared", "return village_pairs(split),", "return village_pairs(split, 30),"),
    ("by-hand", 'labelled_rows, options["batch_size"]', "labelled_rows[:160], 16"),
    ("by-hand-setup", "HAND_STEPS = 40", "HAND_STEPS = 10"),
    ("bon-scores", "80 if FULL else 20", "2"),
    ("few-labels", "(SEED, SEED + 1, SEED + 2)", "(SEED, SEED + 1)"),
    ("few-labels", ", *ADAPT[method].options", ""),  # its epochs contradict --steps
    ("scalars", '"--epochs", "2", ', ""),
    ("rl", "steps=150", "steps=10"),
    ("group-games", "[::5]", "[::40]"),
)

# Key numbers with seed 0: (cell, what is printed, least, most).
RANGES = (
    ("stage1-facts", r"village +right in (\S+)", 0.40, 0.60),
    ("stage1-facts", r"pretrain +right in (\S+)", 0.62, 1.00),
    ("ceiling", r"'accuracy': ([\d.]+)", 0.72, 0.75),
    ("ceiling", r"'loss': ([\d.]+)", 0.54, 0.58),
    ("ceiling", r"'margin': ([\d.]+)", 0.62, 0.68),
    ("table", r"labels alone +\S+ ± \S+ +(\S+) ±", 0.50, 0.72),
    ("table", r"GRAM +\S+ ± \S+ +(\S+) ±", 0.76, 0.95),
    ("table", r"labels alone(?: +\S+ ± \S+){2} +(\S+) ±", 0.40, 0.60),
    ("table", r"GRAM(?: +\S+ ± \S+){2} +(\S+) ±", 0.70, 1.00),
    ("table", r"scalar head(?: +\S+ ± \S+){2} +(\S+) ±", 0.40, 0.66),
    ("table", r"scalar from stage 1(?: +\S+ ± \S+){2} +(\S+) ±", 0.65, 1.00),
    ("joint-table", r"likelihood(?: +\S+ ± \S+){2} +(\S+) ±", 0.90, 1.00),
    ("joint-table", r"GRAM \+ likelihood +\S+ ± \S+ +(\S+) ±", 0.85, 1.00),
    ("places", r"after stage 2: ([\d.]+)% from place A", 80, 100),
    ("bon-kl", r"256 .* (\S+)\n", 4.00, 4.28),
    ("few-table", r"GRAM +\+ 200: (\S+)", 0.76, 0.95),
    ("open-test-more", r"by (\S+) ±", 0.02, 0.20),
    ("rl", r"GRAM .* (\S+) at the end", 2.0, 3.0),
    ("fool-test", r"GRAM gives it (\S+),", 0.50, 1.00),
    ("group-rewards", r"first +7 comparisons, (\S+) of", 0.75, 0.95),
    ("group-rewards", r"circle +8 comparisons, (\S+) of", 0.70, 0.90),
)


def read(path: Path = TUTORIAL):
    return nbformat.read(path, as_version=4)


def smallest(book):
    """The same notebook, quick to run: nothing is learned, so what only a trained model can pass
    is left out."""
    cells = {cell["id"]: cell for cell in book.cells}
    for name, there, instead in SMALLEST:
        assert there in cells[name].source, f"cell {name} no longer holds {there}"
        cells[name].source = cells[name].source.replace(there, instead)
    book.cells = [cell for cell in book.cells if "trained" not in cell.metadata.get("tags", [])]
    return book


def execute(book, folder: Path):
    """Run all cells with the repository on the path.

    Returns the notebook with its outputs, without progress bars. A picture has the alternative text
    of its cell.
    """
    first = nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    book.cells.insert(0, first)
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(book, timeout=1800, coalesce_streams=True, resources=place)
    try:
        client.execute()
    finally:
        book.cells.pop(0)
    loud = [
        cell["id"]
        for cell in book.cells
        if cell.cell_type == "code"
        and cell.metadata.get("nbgrader", {}).get("grade")
        and any(output.get("name") == "stderr" for output in cell.outputs)
    ]
    assert not loud, (
        f"nbgrader gives no points for cells that write to stderr, as progress bars do: {loud}"
    )
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in pictures(cell):
                output.metadata["image/png"] = {"alt": cell.metadata["alt"]}
            cell.metadata.pop("execution", None)
    return book


def pictures(cell) -> list:
    return [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


def printed(book, name: str) -> str:
    cell = next(cell for cell in book.cells if cell["id"] == name)
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def key_numbers(book) -> list[tuple[str, float, float, float]]:
    """(where, value, least, most) of each of RANGES."""
    numbers = []
    for name, pattern, least, most in RANGES:
        match = re.search(pattern, printed(book, name))
        assert match, f"cell {name} prints nothing like {pattern}"
        numbers.append((f"{name}: {pattern}", float(match[1]), least, most))
    return numbers


def main() -> None:
    began = time.perf_counter()
    book = execute(read(), ROOT)
    nbformat.write(book, TUTORIAL)
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(book.cells)} cells in {minutes:.1f} minutes, written to {TUTORIAL.name}")
    wrong = [line for line in key_numbers(book) if not line[2] <= line[1] <= line[3]]
    for where, value, least, most in wrong:
        print(f"{where}: {value} is not within {least} to {most}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
