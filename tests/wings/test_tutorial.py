"""The notebook runs, its outputs are those of its code, and its exercises grade as they should."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebook import ROOT, execute, key_numbers, pictures, read, smallest

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
# Cells that the exercises build on.
NEEDED = ("anywhere", "setup", "train", "c07", "scalar-batch", "unlabelled", "batch", "templates")

LIKELIHOOD_TESTS = {"log-likelihood-test", "log-likelihood-test-lengths"}
# What students get wrong: (cell, right, wrong, the cells whose points that loses), one tuple
# for each student.
TYPICAL = (
    (
        (  # the last position, which may be padding
            "scalar",
            "[torch.arange(len(ids)), last]",
            "[:, -1]",
            {"scalar-test"},
        ),
        (
            "mask",
            "zip(ids[1:], trained[1:])] + [IGNORED]",
            "zip(ids, trained)]",
            {"mask-test", "mask-test-turns"},
        ),
        (
            "judge-prompt",
            "return a, b",
            "return a.strip(), b.strip()",
            {"judge-prompt-test"},
        ),
        (
            "loss",
            "share_a * (1 - eps) + (1 - share_a) * eps",
            "1 - eps",
            {"loss-test-plain", "loss-test-smoothing", "loss-test-shares"},
        ),
        ("gradient", "return K * eps / (K - 1)", "return 2 * eps", {"torch-smoothing-test"}),
        (
            "both-orders",
            "second.softmax(0)[1]",
            "second.softmax(0)[0]",
            {"both-orders-test", "both-orders-test-position"},
        ),
        ("tournaments", "if better(i, j) >= 0.5", "if better(i, j) < 0.5", {"knock-out-test"}),
        ("group", "better(i, 0)", "better(0, i)", {"against-first-test"}),
        ("log-likelihood", "< end[:, None]", "<= end[:, None]", LIKELIHOOD_TESTS),
        (
            "best-of-n",
            "math.log(p * len(kept))",
            "math.log(p)",
            {"best-of-n-kl-test"},
        ),
    ),
    (
        (  # first and second answers one after the other
            "scalar",
            "head(states)[:, 0].view(2, -1)",
            "head(states)[:, 0].view(-1, 2).T",
            {"scalar-test", "scalar-test-labels"},
        ),
        ("mask", "trained[1:]", "trained", {"mask-test", "mask-test-turns"}),
        (
            "judge-prompt",
            '(a.strip(), b.strip()) != ("A", "B")',
            "a == b",
            {"judge-prompt-test-fused"},
        ),
        ("loss", "+ (1 - share_a) * eps", "", {"loss-test-smoothing", "loss-test-shares"}),
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
        ("log-likelihood", "ids[:, 1:, None]", "ids[:, :-1, None]", {"log-likelihood-test"}),
        ("best-of-n", "** n) / equal", "** n)", {"best-of-n-ties-test"}),
    ),
    (
        (
            "scalar",
            "torch.where(labels == 0, r_a - r_b, r_b - r_a)",
            "r_a - r_b",
            {"scalar-test", "scalar-test-labels"},
        ),
        (
            "loss",
            "(-F.logsigmoid(m) + (1 - target) * m)",
            "-(target * torch.sigmoid(m).log() + (1 - target) * torch.sigmoid(-m).log())",
            {"loss-test-plain"},
        ),
        (  # the champion meets the next one
            "tournaments",
            "alive = [i if better(i, j) >= 0.5 else j for i, j in games] + alive[2 * len(games) :]",
            "alive = [games[0][0] if better(*games[0]) >= 0.5 else games[0][1]] + alive[2:]",
            {"knock-out-test"},
        ),
        ("log-likelihood", ".sum(1)", ".sum(1) / inside.sum(1)", LIKELIHOOD_TESTS),
        ("best-of-n", "for p in kept if p > 0", "for p in kept", {"best-of-n-kl-test"}),
    ),
)
# Solutions that are the library's own functions: no exercise is to ask for one of them.
LIBRARY = {
    "scalar": "from gram_mini.losses import reward_loss as scalar_loss",
    "mask": "from gram_mini.batches import IGNORED, next_tokens as with_targets",
    "judge-prompt": "from gram_mini.prompts import label_tokens",
    "loss": "from gram_mini.losses import reward_loss\nsmoothed_loss = lambda z, share, eps: "
    "reward_loss(z, 1 - share, eps)",
    "gradient": "from gram_mini.losses import best_margin as loss_gradient\n"
    "torch_smoothing = lambda eps, K: 2 * eps",
    "log-likelihood": "from gram_mini.evaluation import pair_losses as log_likelihood",
    "best-of-n": "from gram_mini.village.policy import best_of_n, best_of_n_kl as kl_to_uniform",
    "tournaments": "from gram_mini.runs.ranking import knock_out, round_robin",
    "group": "from gram_mini.studies.rewards import against_the_first as against_first, circle",
}


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


def test_every_picture_has_an_alternative_text():
    with_pictures = [cell for cell in read().cells if pictures(cell)]
    assert len(with_pictures) > 9
    for cell in with_pictures:
        for output in pictures(cell):
            assert output.metadata["image/png"]["alt"] == cell.metadata["alt"], cell["id"]


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
    headings = [cell for cell in book.cells if cell.source.startswith("### Exercise")]
    assert [cell.source.split()[2] for cell in headings] == [f"{k}:" for k in range(1, 13)]
    names = [grader(cell)["grade_id"] for cell in book.cells if grader(cell)]
    assert len(names) == len(set(names))
    points = [grader(cell)["points"] for cell in book.cells if grader(cell).get("grade")]
    in_text = [
        int(word)
        for cell in book.cells
        for start in ("### Exercise", "**In words**")
        for word in _between(cell.source, start, "(", " points")
    ]
    assert sum(points) == sum(in_text)
    assert f"All together they have {sum(points)} points." in book.cells[0].source


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


# nbgrader calls alembic by its bare name
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course whose assignment is the exercises of the notebook, by the recipe in the Makefile."""
    folder = tmp_path_factory.mktemp("repository")
    nbformat.write(exercises(read()), folder / "tutorial.ipynb")
    recipe = (ROOT / "Makefile").read_text().split("\nassignment:")[1].split("\n\n")[0]
    values = {"$(COURSE)": "course", "$(CURDIR)/$(BIN):": "", "$(SEED)": "7", "$$": "$"}
    values["$(ADDRESS)"] = "https://example.org/gram_mini"
    lines = [line.strip().lstrip("@") for line in recipe.splitlines()[1:]]
    for name, value in values.items():
        lines = [line.replace(name, value) for line in lines]
    command = ["bash", "-euc", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "course"


def nbgrader(folder, *command: str) -> None:
    given = ["nbgrader", *command, f"--course-dir={folder}", "--Execute.timeout=300"]
    done = subprocess.run(given, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stderr


def hand_in(folder, source):
    """The student version with the solution cells of ``source`` filled in."""
    book = read(folder / "release" / "gram_mini" / "tutorial.ipynb")
    answers = {cell["id"]: cell.source for cell in source.cells if grader(cell).get("solution")}
    for cell in book.cells:
        cell.source = answers.get(cell["id"], cell.source)
    return book


def points_of(book) -> dict[str, float]:
    """The points of each cell that is graded by its tests, without nbgrader, which takes longer."""
    space: dict = {}
    points = full_marks()
    for cell in code_cells(book):
        try:
            exec(cell.source, space)
        except Exception:
            assert cell["id"] in points, f"{cell['id']}: only a test may fail"
            points[cell["id"]] = 0.0
    return points


def full_marks() -> dict[str, float]:
    """The points of the cells that are graded by their tests."""
    return {
        grader(cell)["grade_id"]: grader(cell)["points"]
        for cell in code_cells(exercises(read()))
        if grader(cell).get("grade")
    }


def test_the_student_version_holds_no_solution_and_fails_in_the_exercises_only(course):
    book = read(course / "release" / "gram_mini" / "tutorial.ipynb")
    text = "\n".join(cell.source for cell in book.cells)
    assert BEGIN not in text and "HIDDEN TESTS" not in text
    assert text.count("raise NotImplementedError") == 14
    assert set(points_of(book).values()) == {0.0}


def test_nbgrader_gives_the_reference_solutions_full_marks(course):
    from nbgrader.api import Gradebook

    place = course / "submitted" / "reference" / "gram_mini"
    place.mkdir(parents=True)
    nbformat.write(hand_in(course, exercises(read())), place / "tutorial.ipynb")
    nbgrader(course, "autograde", "gram_mini", "--create")
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        submission = gradebook.find_submission_notebook("tutorial", "gram_mini", "reference")
        points = {grade.name: grade.score for grade in submission.grades}
    assert {name: points[name] for name in full_marks()} == full_marks()


@pytest.mark.parametrize("student", range(len(TYPICAL)))
def test_typical_wrong_answers_lose_their_points_and_no_others(student):
    book = exercises(read())
    cells = {cell["id"]: cell for cell in book.cells}
    for name, right, wrong, _ in TYPICAL[student]:
        assert cells[name].source.count(right) == 1, name
        cells[name].source = cells[name].source.replace(right, wrong)
    lost = {name for *_, loses in TYPICAL[student] for name in loses}
    assert points_of(book) == {
        name: 0.0 if name in lost else points for name, points in full_marks().items()
    }


def test_the_functions_of_the_library_solve_no_exercise():
    book = exercises(read())
    for cell in book.cells:
        cell.source = LIBRARY.get(cell["id"], cell.source)
    passed = {name for name, points in points_of(book).items() if points}
    assert passed == {"both-orders-test", "both-orders-test-position"}  # the library has none


def test_make_assignment_takes_out_solutions_and_outputs_and_sets_seed_and_address(course):
    book = read(course / "release" / "gram_mini" / "tutorial.ipynb")
    solutions = [cell for cell in code_cells(exercises(read())) if BEGIN in cell.source]
    unsolved = [c for c in code_cells(book) if "raise NotImplementedError" in c.source]
    assert [cell["id"] for cell in unsolved] == [cell["id"] for cell in solutions]
    assert not [output for cell in code_cells(book) for output in cell.outputs]
    text = "\n".join(cell.source for cell in code_cells(book))
    assert 'ADDRESS = "https://example.org/gram_mini"' in text and "\nSEED = 7 " in text
