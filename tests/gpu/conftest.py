"""A page of what the GPU tests find: on a card runs/gpu.md, elsewhere a file that nobody keeps."""

import gc
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from gram_mini.runs.memory import GIB
from gram_mini.runs.output import write_whole

import pytest
import torch

PAGE = Path("runs/gpu.md")
MINUTES = 9  # after which no test is begun on a card
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class Page:
    """Rows of results. They are written after each test, so a crash leaves those before it."""

    def __init__(self, file: Path):
        self.file = file
        self.began = time.monotonic()
        self.rows: list[tuple[str, str]] = []

    def add(self, test: str, result: str, figures: str) -> None:
        figures = " ".join(figures.replace("|", "/").split())
        self.rows.append((test, figures if result == "passed" else f"{result}: {figures}"))
        self.file.parent.mkdir(exist_ok=True)
        write_whole(self.file, [self.text()], "the page of the GPU tests")

    def text(self) -> str:
        versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        head = f"{card()}; {versions}; {time.strftime('%Y-%m-%d')}."
        lines = [("test", "figures"), ("---", "---"), *self.rows]
        table = "\n".join(f"| {test} | {figures} |" for test, figures in lines)
        return f"# GPU tests\n\n`python -m pytest -m gpu`: {head}\n\n{table}\n"


def card() -> str:
    """The device that computes."""
    if not torch.cuda.is_available():
        return "no GPU: tiny shapes on a CPU"
    facts = torch.cuda.get_device_properties(0)
    return (
        f"{facts.name}, {facts.total_memory / GIB:.1f} GiB, "
        f"compute capability {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"
    )


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    on_gpu = torch.cuda.is_available()
    return Page(PAGE if on_gpu else tmp_path_factory.mktemp("page") / PAGE.name)


@pytest.fixture
def note(page, request) -> Callable[[str], None]:
    """A function that takes the figures of a test; they go to the page with its result."""
    name = request.node.name.removeprefix("test_")
    if torch.cuda.is_available() and time.monotonic() - page.began > 60 * MINUTES:
        page.add(name, "left out", f"{MINUTES} minutes were over")
        pytest.fail(f"{MINUTES} minutes were over")
    figures: list[str] = []
    yield figures.append
    report = request.node.report
    reason = [report.longrepr.reprcrash.message] if report.failed else []
    page.add(name, report.outcome, "; ".join(figures + reason))
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Keep the report of a test where its fixtures find it."""
    report = yield
    if report.when != "teardown":
        item.report = report
    return report


def pytest_terminal_summary(terminalreporter):
    if torch.cuda.is_available() and PAGE.is_file():
        terminalreporter.write_line(f"results of the GPU tests: {PAGE}")
