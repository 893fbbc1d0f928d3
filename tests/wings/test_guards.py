"""What keeps the lesson short: imports, lengths of scripts and README, and real commands only."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gram_mini"
LESSON = sorted(path for path in PACKAGE.glob("*.py"))
WINGS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
SCRIPTS = ("train_pretrain.py", "train_reward.py", "score.py")
READMES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PACKAGE.glob("**/*.md")])


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """(module, names) of each import of ours, those within functions too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gram_mini":
            modules.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            modules += [(name, [name]) for name in names if name.startswith("gram_mini")]
    return modules


@pytest.mark.parametrize("path", LESSON, ids=lambda path: path.name)
def test_the_lesson_imports_the_lesson_runs_and_reading_only(path):
    lesson = {file.stem for file in LESSON}
    for module, names in imports(path):
        parts = module.split(".")[1:] or names
        assert parts[0] in lesson | {"runs", "reading"}, f"{path.name} imports {module}"


def test_the_lesson_is_a_dozen_files():
    assert len(LESSON) <= 12
    assert WINGS == ["baselines", "everyday", "reading", "runs", "serving", "studies", "village"]
    assert all((PACKAGE / wing / "README.md").is_file() for wing in WINGS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short(name):
    text = (ROOT / name).read_text()
    names = [name for _, names in imports(ROOT / name) for name in names]
    assert len(text.splitlines()) <= 120 and len(names) <= 20, (len(text.splitlines()), len(names))
    for word in ("accelerator", "revision", "recipe", "partial", "done["):
        assert word not in text


def test_both_training_scripts_have_the_same_headings_in_the_same_order():
    headings = [
        re.findall(r"^    # (\w+)", (ROOT / name).read_text(), re.MULTILINE) for name in SCRIPTS[:2]
    ]
    assert headings[0] == headings[1] == ["Pairs", "Judge", "Token", "Loop"]


def test_the_training_step_stands_in_the_scripts():
    for name, loss in zip(SCRIPTS[:2], ("chunked_pair_loss", "reward_loss")):
        loop = (ROOT / name).read_text().split("# Loop")[1]
        forward = ["hidden_states(", f"{loss}("]
        update = [".backward()", "clip_gradients(", "optimizer.step()", "schedule.step()"]
        places = [loop.index(step) for step in forward + update]
        assert places == sorted(places)
    assert ".sigmoid()" in (ROOT / "score.py").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


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


# ---- commands in READMEs -------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """(README, command) for every python and make command in code blocks and in inline code."""
    pairs = []
    for path in READMES:
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


@pytest.mark.parametrize(("readme", "command"), commands())
def test_every_command_in_a_readme_is_real(readme, command):
    """The program answers --help, and knows every option that the README gives it."""
    words = [
        word for word in shlex.split(command.replace("...", "")) if not re.match(r"[A-Z_]+=", word)
    ]
    words[0] = Path(words[0]).name
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert len(words) == 1 or words[1] in targets, f"{readme}: {command}"
        return
    if words[0] == "accelerate":
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if not scripts:  # inline code may name an option of accelerate alone; a block may not
            assert f"`{command}`" in (ROOT / readme).read_text(), f"{readme}: {command}: no script"
            pytest.skip("a fragment without a script")
        words = ["python", *words[scripts[0] :]]
    program = ["-m", words[2]] if words[1:2] == ["-m"] else words[1:2]
    others = ("venv", "pip", "pytest", "accelerate.commands.launch")
    if not program or program[-1] in others or program[-1].startswith("vllm."):
        return
    if program[0].startswith("tests/"):
        assert (ROOT / program[0]).is_file(), f"{readme}: {command}"
        return
    if program[-1] == "gram_mini.studies.speed":  # each of its studies has its own options
        program.append(words[3])
    text = help_of(*program)
    for option in [word for word in words if word.startswith("--")]:
        assert re.search(rf"{option.split('=')[0]}\b", text), (
            f"{readme}: {command}: no option {option}"
        )


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_a_readme_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
