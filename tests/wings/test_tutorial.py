"""The notebook runs, its outputs are those of its code, and its exercises grade as they should."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebook import ROOT, TUTORIAL, execute, key_numbers, read, smallest

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
NEEDED = ("setup", "unlabelled", "batch")  # cells that the exercises build on

# What students get wrong: (cell, right, wrong, the cells whose points that loses), one tuple
# for each student.
TYPICAL = (
    (
        (
            "mask",
            "[IGNORED] * (given - 1) + ids[given:] + [IGNORED]",
            "[IGNORED] * given + ids[given:]",
            {"mask-test"},
        ),
        (
            "loss",
            "torch.where(labels == 0, difference, -difference)",
            "difference",
            {"loss-test-labels"},
        ),
        ("gradient", "return 2 * eps", "return eps", {"torch-smoothing-test"}),
        (
            "both-orders",
            "second.softmax(0)[1]",
            "second.softmax(0)[0]",
            {"both-orders-test", "both-orders-test-position"},
        ),
        ("tournaments", "if better(i, j) >= 0.5", "if better(i, j) < 0.5", {"knock-out-test"}),
        ("group", "better(i, 0)", "better(0, i)", {"against-first-test"}),
        ("best-of-n", "math.log(n) - (n - 1) / n", "math.log(n)", {"best-of-n-kl-test"}),
    ),
    (
        (
            "judge-prompt",
            "if swap else (response_a, response_b)",
            "if not swap else (response_a, response_b)",
            {"judge-prompt-test"},
        ),
        ("loss", "eps * m", "eps / 2 * m", {"loss-test-smoothing"}),
        ("gradient", "-torch.sigmoid(-m) + eps", "-torch.sigmoid(m) + eps", {"gradient-test"}),
        (  # the softmax over the orders, not over the labels
            "both-orders",
            "second.softmax(0)[1].item()",
            "torch.stack([first, second]).softmax(0)[1, 1].item()",
            {"both-orders-test", "both-orders-test-position"},
        ),
        (
            "tournaments",
            "totals[i] + p, totals[j] + 1 - p",
            "totals[i] + (p > 0.5), totals[j] + (p < 0.5)",
            {"round-robin-test"},
        ),
        ("group", "1 - wins[i - 1]", "wins[i - 1]", {"circle-test"}),
        ("best-of-n", "key=lambda i: scores[i]", "key=lambda i: true[i]", {"best-of-n-test"}),
    ),
    (
        ("loss", "eps * m", "eps * difference", {"loss-test-labels"}),
        (  # the champion meets the next one
            "tournaments",
            "alive = [i if better(i, j) >= 0.5 else j for i, j in games] + alive[2 * len(games) :]",
            "alive = [games[0][0] if better(*games[0]) >= 0.5 else games[0][1]] + alive[2:]",
            {"knock-out-test"},
        ),
    ),
)


def grader(cell) -> dict:
    return cell.metadata.get("nbgrader", {})


def code_cells(book) -> list:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def exercises(book):
    """Only the exercises and what they build on; nothing that has to be trained."""
    book.cells = [
        cell
        for cell in book.cells
        if cell["id"] in NEEDED or (grader(cell) and "trained" not in cell.metadata.get("tags", []))
    ]
    return book


def test_cells_are_short_and_exercises_complete():
    book = read()
    for cell in code_cells(book):
        lines = [
            line
            for line in cell.source.splitlines()
            if line.strip() and not line.strip().startswith("###")
        ]
        assert len(lines) <= 12, cell["id"]
        assert (BEGIN in cell.source) == (END in cell.source) == bool(grader(cell).get("solution"))
        statements = [
            node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Expr)
        ]
        assert not any(isinstance(node.value, ast.Tuple) for node in statements), (
            f"{cell['id']}: one statement a line, not two joined by a comma"
        )
    names = [grader(cell)["grade_id"] for cell in book.cells if grader(cell)]
    assert (
        len(names) == len(set(names))
        and sum(cell.source.startswith("### Exercise") for cell in book.cells) == 9
    )
    points = {
        grader(cell)["grade_id"]: grader(cell)["points"]
        for cell in book.cells
        if grader(cell).get("grade")
    }
    in_text = [
        int(word)
        for cell in book.cells
        for word in _between(cell.source, "### Exercise", "(", " points")
    ]
    assert sum(points.values()) == sum(in_text)


def _between(text: str, start: str, opening: str, closing: str) -> list[str]:
    return [
        line.split(opening)[1].split(closing)[0]
        for line in text.splitlines()
        if line.startswith(start)
    ]


def test_stage_2_by_hand_uses_the_students_own_loss():
    by_hand = next(cell for cell in code_cells(read()) if cell["id"] == "by-hand")
    assert "smoothed_loss(" in by_hand.source and "reward_loss" not in by_hand.source


def test_committed_outputs_are_of_a_good_run():
    book = read()
    assert not [
        output
        for cell in code_cells(book)
        for output in cell.outputs
        if output.output_type == "error"
    ]
    assert not [
        output
        for cell in code_cells(book)
        for output in cell.outputs
        if output.get("name") == "stderr"
    ]
    for where, value, least, most in key_numbers(book):
        assert least <= value <= most, where


def test_runs_from_top_to_bottom(tmp_path):
    book = execute(smallest(read()), tmp_path)
    assert (tmp_path / "runs" / "tutorial" / "0" / "gram" / "run.json").is_file()
    pictures = [
        output
        for cell in code_cells(book)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 6


# ---- grading, as a teacher does it ----------------------------------------------------------


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course whose assignment is the exercises of the notebook."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "source" / "gram_mini").mkdir(parents=True)
    nbformat.write(exercises(read()), folder / "source" / "gram_mini" / "tutorial.ipynb")
    nbgrader(folder, "generate_assignment", "gram_mini")
    return folder


# nbgrader calls alembic by its bare name
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
}


def nbgrader(folder, *command: str) -> None:
    given = ["nbgrader", *command, f"--course-dir={folder}", "--Execute.timeout=300"]
    done = subprocess.run(given, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stderr


def scores(folder, student: str, book) -> dict[str, float]:
    """Hand in a notebook, have it graded, and read the points of each cell."""
    from nbgrader.api import Gradebook

    place = folder / "submitted" / student / "gram_mini"
    place.mkdir(parents=True)
    nbformat.write(book, place / "tutorial.ipynb")
    nbgrader(folder, "autograde", "gram_mini", "--student", student, "--create")
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as gradebook:
        submission = gradebook.find_submission_notebook("tutorial", "gram_mini", student)
        return {grade.name: grade.score for grade in submission.grades}


def hand_in(folder, source):
    """The student version with the solution cells of ``source`` filled in."""
    book = read(folder / "release" / "gram_mini" / "tutorial.ipynb")
    answers = {cell["id"]: cell.source for cell in source.cells if grader(cell).get("solution")}
    for cell in book.cells:
        cell.source = answers.get(cell["id"], cell.source)
    return book


def full_marks() -> dict[str, float]:
    return {
        grader(cell)["grade_id"]: grader(cell)["points"]
        for cell in exercises(read()).cells
        if grader(cell).get("grade")
    }


def test_the_student_version_holds_no_solution_and_fails_in_the_exercises_only(course, tmp_path):
    book = read(course / "release" / "gram_mini" / "tutorial.ipynb")
    text = "\n".join(cell.source for cell in book.cells)
    assert (
        BEGIN not in text
        and "HIDDEN TESTS" not in text
        and text.count("raise NotImplementedError") == 12
    )
    failed = {
        c["id"]
        for c in code_cells(execute(book, tmp_path, allow_errors=True))
        if any(o.output_type == "error" for o in c.outputs)
    }
    assert failed == set(full_marks())


def test_the_reference_solutions_earn_full_marks(course):
    assert scores(course, "reference", hand_in(course, exercises(read()))) == full_marks()


def test_an_empty_hand_in_earns_nothing(course):
    empty = read(course / "release" / "gram_mini" / "tutorial.ipynb")
    assert set(scores(course, "empty", empty).values()) == {0.0}


@pytest.mark.parametrize("student", range(len(TYPICAL)))
def test_typical_wrong_answers_lose_their_points_and_no_others(course, student):
    source, lost = exercises(read()), set()
    cells = {cell["id"]: cell for cell in source.cells}
    for name, right, wrong, loses in TYPICAL[student]:
        assert cells[name].source.count(right) == 1, name
        cells[name].source = cells[name].source.replace(right, wrong)
        lost |= loses
    earned = scores(course, f"wrong-{student}", hand_in(course, source))
    assert earned == {
        name: 0.0 if name in lost else points for name, points in full_marks().items()
    }


def test_make_assignment(tmp_path):
    """The recipe in the Makefile, on the whole notebook."""
    shutil.copy(TUTORIAL, tmp_path)
    recipe = (
        (ROOT / "Makefile").read_text().split("\nassignment:")[1].split("\n\n")[0].splitlines()[1:]
    )
    values = {"$(COURSE)": "course", "$(CURDIR)/$(BIN):": "", "$$": "$"}
    lines = [line.strip().lstrip("@") for line in recipe]
    for name, value in values.items():
        lines = [line.replace(name, value) for line in lines]
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    book = read(tmp_path / "course" / "release" / "gram_mini" / "tutorial.ipynb")
    assert sum("raise NotImplementedError" in cell.source for cell in code_cells(book)) == 9
    assert not [output for cell in code_cells(book) for output in cell.outputs]
