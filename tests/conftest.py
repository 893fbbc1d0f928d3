"""Shared fixtures: the village's tokenizer and model."""

import os

# Tests need no network: a missing model is an error at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny, and a forked process would wait for threads that it does not have. This holds
# for the scripts that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"

from gram_mini.runs.models import load_model, load_tokenizer
from gram_mini.runs.sharing import SharingJudge
from gram_mini.village import VILLAGE

import pytest
import torch

LONGEST = "memory tutorial resume scripts studies architectures writing".split()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests of several minutes too")


def pytest_collection_modifyitems(config, items):
    # With two processes the longest files come first, so that neither waits for one in the end.
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(scope="session", autouse=True)
def every_cpu_alike():
    """Tests compute in float32 on a CPU that is fast in bf16, too, unless they ask for bf16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gram_mini.runs.models.fast_bfloat16", lambda: False)
        yield


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A CPU that multiplies bf16 matrices itself, as far as our code can tell."""
    monkeypatch.setattr("gram_mini.runs.models.fast_bfloat16", lambda: True)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(VILLAGE)


@pytest.fixture(scope="session")
def village_judge(tokenizer):
    """The plain backbone in float32 as a zero-shot judge; tests must not change it."""
    return SharingJudge(load_model(VILLAGE, bits=32), tokenizer)


@pytest.fixture
def nf4_model():
    """A fresh NF4 backbone for each test."""
    torch.manual_seed(0)
    return load_model(VILLAGE, bits=4)
