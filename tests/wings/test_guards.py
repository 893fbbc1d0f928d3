"""What keeps lesson and pages short: imports, lengths, and real commands and links only."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import constraints
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gram_mini"
LESSON = sorted(path for path in PACKAGE.glob("*.py"))
WINGS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
SCRIPTS = ("train_pretrain.py", "train_reward.py", "score.py")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PACKAGE.glob("**/*.md")])
# A command writes those in results as a whole, so their length is not ours.
OF_WINGS = [path for path in PAGES if PACKAGE in path.parents and path.parent.name != "results"]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [ROOT / name for name in SCRIPTS] + sorted(PACKAGE.glob("**/*.py"))
MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, those within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports by dots are not read here"
            named = [f"{node.module}.{alias.name}" for alias in node.names]  # may be modules
            found |= {name if name in MODULES else node.module for name in named}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES


def test_no_circle_of_imports():
    try:
        TopologicalSorter({module_of(path): imports(path) for path in FILES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_no_file_of_the_lesson_imports_a_wing():
    lesson = {module_of(path) for path in LESSON}
    arrows = [f"{path.name} -> {module}" for path in LESSON for module in imports(path) - lesson]
    assert not arrows, sorted(arrows)


def test_the_lesson_is_a_dozen_files():
    assert len(LESSON) <= 12
    lines = sum(
        len(path.read_text().splitlines()) for path in (*LESSON, *map(ROOT.joinpath, SCRIPTS))
    )
    assert lines <= 1700
    assert WINGS == [
        "baselines",
        "helpdesk",
        "likelihood",
        "reading",
        "runs",
        "serving",
        "studies",
        "village",
    ]
    assert all((PACKAGE / wing / "README.md").is_file() for wing in WINGS)


def test_both_training_scripts_have_the_same_headings_in_the_same_order():
    headings = [
        re.findall(r"^    # (\w+)", (ROOT / name).read_text(), re.MULTILINE) for name in SCRIPTS[:2]
    ]
    assert headings[0] == headings[1] == ["Pairs", "Model", "Token", "Loop"]


def test_the_training_step_stands_in_the_scripts():
    for name, loss in zip(SCRIPTS[:2], ("chunked_pair_loss", "reward_loss")):
        loop = (ROOT / name).read_text().split("# Loop")[1]
        forward = ["hidden_states(", f"{loss}("]
        update = [".backward()", "clip_gradients(", "optimizer.step()", "schedule.step()"]
        places = [loop.index(step) for step in forward + update]
        assert places == sorted(places)
    assert ".sigmoid()" in (ROOT / "score.py").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", OF_WINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_has_at_most_250_lines(path):
    assert len(path.read_text().splitlines()) <= 250


def test_the_pages_of_the_wings_have_at_most_15_000_words():
    """As `wc -w` counts them, what a command writes included."""
    pages = [path for path in PACKAGE.glob("*/**/*.md") if path.is_file()]
    words = {str(path.relative_to(PACKAGE)): len(path.read_text().split()) for path in pages}
    assert sum(words.values()) <= 15_000, words


def test_the_top_level_is_what_our_user_fixed():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    tracked = listed.stdout.splitlines()
    if not tracked:
        pytest.skip("no git checkout")
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    usual = {"Makefile", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"}
    assert top - usual == {
        "README.md", "requirements.txt", "gram_mini", "tests", "tutorial.ipynb",
        "train_pretrain.py", "train_reward.py", "score.py",
    }  # fmt: skip


# ---- commands and links on pages -----------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """(page, command) for every python and make command in code blocks and in inline code."""
    pairs = []
    for path in PAGES:
        text = path.read_text().replace("\\\n", " ")
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in lines:
            command = line.split("  #")[0].strip()
            if re.match(
                r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python|make|accelerate launch)\b", command
            ):
                pairs.append((str(path.relative_to(ROOT)), command))
    return sorted(set(pairs))


@cache
def help_of(*program: str) -> str:
    """What a program says to --help, run in this process: starting one takes seconds each."""
    said, arguments = io.StringIO(), sys.argv
    sys.argv = [program[1] if program[0] == "-m" else program[0], *program[2:], "--help"]
    try:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
            if program[0] == "-m":
                runpy.run_module(program[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
    finally:
        sys.argv = arguments
    assert end.value.code == 0
    return said.getvalue()


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_on_a_page_is_real(page, command):
    """The program answers --help, and knows every option that the page gives it."""
    words = [
        word for word in shlex.split(command.replace("...", "")) if not re.match(r"[A-Z_]+=", word)
    ]
    words[0] = Path(words[0]).name
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert len(words) == 1 or words[1] in targets, f"{page}: {command}"
        return
    if words[0] == "accelerate":
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if not scripts:  # inline code may name an option of accelerate alone; a block may not
            assert f"`{command}`" in (ROOT / page).read_text(), f"{page}: {command}: no script"
            pytest.skip("a fragment without a script")
        words = ["python", *words[scripts[0] :]]
    program = ["-m", words[2]] if words[1:2] == ["-m"] else words[1:2]
    others = ("venv", "pip", "pytest", "accelerate.commands.launch")
    if not program or program[-1] in others or program[-1].startswith("vllm."):
        return
    if program[0].startswith("tests/"):
        assert (ROOT / program[0]).is_file(), f"{page}: {command}"
        return
    text = help_of(*program)
    for option in [word for word in words if word.startswith("--")]:
        assert re.search(rf"{option.split('=')[0]}\b", text), (
            f"{page}: {command}: no option {option}"
        )


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub calls them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = (re.sub(r"\]\([^)]*\)", "", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", word.lower()).replace(" ", "-") for word in words}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_on_a_page_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        if target.startswith(("http", "mailto")):
            continue
        page = path.parent / target if target else path
        assert page.exists(), f"{path.name}: {target}"
        if anchor and page.suffix == ".md":
            assert anchor in anchors(page), f"{path.name}: {target}#{anchor}"


@pytest.mark.parametrize(
    "requires, marker",
    [
        (">=3.9", ""),
        ("", ""),
        (">= 3.11, <4", '; python_version >= "3.11"'),
        (">3.10", '; python_version >= "3.11"'),
        (">=3.11.0", '; python_version >= "3.11"'),
        (">=3.11.5", '; python_full_version >= "3.11.5"'),  # Debian 12 has 3.11.2
    ],
)
def test_a_version_is_left_out_where_python_is_too_old_for_it(requires, marker):
    assert constraints.marker_of(requires) == marker
