"""The check of a GPU, tried on a CPU with tiny shapes; a GPU itself no test has."""

import re

from gram_mini.errors import UserError
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.studies import gpu_check
from gram_mini.studies.gpu_check import Failed, Setting

import pytest
import torch

CPU = torch.device("cpu")


def rows_of(page):
    """(section, step) -> (result, figures)."""
    rows, section = {}, ""
    for line in page.splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] != "step" and not set(cells[0]) <= {"-"}:
            rows[section, cells[0]] = (cells[1], cells[3])
    return rows


def setting(folder, **changes):
    given = {"device": CPU, "name": "tiny", "shape": gpu_check.TINY["tiny"], "folder": folder}
    return Setting(**{**given, "tiny": True, **changes})


@pytest.fixture(scope="module")
def wrong_scores(tmp_path_factory):
    """(exit status, page) of the whole check, with wrong 16-bit scores."""
    out = tmp_path_factory.mktemp("check") / "page.md"
    real, calls = gpu_check.log_odds, []

    def wrong(run, bits, device):
        calls.append(bits)
        return real(run, bits, device) + (calls.count(bits) == 1 and bits == 16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "log_odds", wrong)
        status = gpu_check.main(["--tiny", "--out", str(out)])
    return status, out.read_text()


def test_every_section_is_on_the_page(wrong_scores):
    _, page = wrong_scores
    headings = re.findall(r"^## (.*)", page, re.MULTILINE)
    assert headings == [*gpu_check.ABOUT, "Verdict"]
    assert page.splitlines()[2].split(": ", 1)[1].startswith(gpu_check.NO_GPU)
    rows = rows_of(page)
    steps = [(section, name) for section, name, _ in gpu_check.steps_of(setting(None))]
    assert list(rows) == steps and len(steps) == 20
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        assert f"{name} " in rows["Machine", "versions"][1]
    assert rows["Resuming", "stage 1, village, 4 bits"] == ("passed", "bit for bit")
    assert "tokens/s" in rows["Speed", "scoring, tiny"][1]


def test_what_fails_is_named_and_the_others_still_run(wrong_scores):
    status, page = wrong_scores
    assert status == 1
    rows = rows_of(page)
    failed = [step for step, (result, _) in rows.items() if result not in ("passed", "measured")]
    assert failed == [("Scores", "village, 16 bits")]
    assert "differ by 1.0e+00 in the mean" in rows[failed[0]][1]
    end = page.splitlines()[-1]
    assert "1 FAILED" in end and "Not shown: Scores: village, 16 bits." in end


def test_four_bits_turned_back_by_blocks_keep_the_adapter(tmp_path):
    """Scores are those of the same run in float32, up to what NF4 rounds; not the backbone's."""
    x = setting(tmp_path)
    gpu_check.train(x, "reward", "village", 16, tmp_path / "run", "--steps", "20")
    exact, nf4 = (gpu_check.log_odds(tmp_path / "run", bits, CPU) for bits in (32, 4))
    judge = load_judge("village", 32, "cpu")
    rows = judge.encode(gpu_check.village_pairs("out-of-distribution", 32))
    untrained = judge.log_odds(rows)[0]
    assert (nf4 - exact).abs().mean() < 0.2 < (untrained - exact).abs().mean()


def run_steps(monkeypatch, tmp_path, *steps, **changes):
    monkeypatch.setattr(gpu_check, "steps_of", lambda x: [("Speed", str(s), s) for s in steps])
    pages = []
    good = gpu_check.check(setting(tmp_path, **changes), pages.append)
    assert len(pages) == len(steps)
    return pages, good


def test_any_error_is_one_line_and_any_end_has_its_status(monkeypatch, tmp_path):
    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried | to allocate")

    def ends(x):
        raise SystemExit(2)

    pages, good = run_steps(monkeypatch, tmp_path, full, ends, gpu_check.versions)
    results = list(rows_of(pages[-1]).values())
    assert not good and [result for result, _ in results] == ["FAILED", "FAILED", "measured"]
    assert results[0][1] == "OutOfMemoryError: Tried / to allocate"
    pages, good = run_steps(monkeypatch, tmp_path, gpu_check.versions)
    assert good and pages[-1].endswith("**1 steps: 1 measured. All checks hold.**\n")
    monkeypatch.setattr(gpu_check, "MINUTES", -1)
    pages, good = run_steps(monkeypatch, tmp_path, gpu_check.versions, tiny=False)
    assert not good and "left out" in pages[-1].splitlines()[-1]


def test_the_page_grows_with_every_step(monkeypatch, tmp_path):
    pages, _ = run_steps(monkeypatch, tmp_path, gpu_check.versions, gpu_check.driver)
    first, last = map(rows_of, pages)
    assert list(last)[:1] == list(first) and len(last) == 2
    assert pages[0].endswith("**Unfinished: 1 of 2 steps: 1 measured.**\n")


@pytest.mark.parametrize(
    ("away", "by_itself", "passes"),
    [(0.005, 0.0, True), (0.02, 0.0, False), (0.02, 0.01, True), (0.4, 0.3, False)],
)
def test_how_far_a_resumed_run_may_be(away, by_itself, passes, monkeypatch, tmp_path):
    distances = iter([away, by_itself])
    monkeypatch.setattr(gpu_check, "train", lambda *arguments: None)
    monkeypatch.setattr(gpu_check, "apart", lambda *runs: next(distances))
    if passes:
        assert gpu_check.resuming(setting(tmp_path), "reward")[0] == "passed"
    else:
        with pytest.raises(Failed, match="of what was learned"):
            gpu_check.resuming(setting(tmp_path), "reward")


@pytest.mark.parametrize("losses", ["1\n2\n3\n4\n5\n6", "3\n\n1"])
def test_a_loss_that_rises_or_is_missing_fails(losses, monkeypatch, tmp_path):
    def train(x, stage, model, bits, out, *more):
        out.mkdir()
        (out / "log.csv").write_text(f"step,loss\n{re.sub('^', '1,', losses, flags=re.M)}\n")

    monkeypatch.setattr(gpu_check, "train", train)
    with pytest.raises(Failed, match="does not fall|1 losses are not finite"):
        gpu_check.training(setting(tmp_path), "pretrain", "village", 4)


def test_a_peak_above_the_computed_one_fails(monkeypatch, tmp_path, fast_bfloat16):
    x, row = setting(tmp_path), (gpu_check.TINY["tiny"], 16, 2, 64)
    monkeypatch.setattr(gpu_check.memory, "measure", lambda *arguments: (10**9, 1.0))
    with pytest.raises(Failed, match=r"stage 1 0\.931, computed"):
        gpu_check.peaks(x, *row)
    monkeypatch.setattr(gpu_check, "compute_dtype", lambda bits, device: torch.float32)
    assert gpu_check.peaks(x, *row)[0] == "measured"
    monkeypatch.setattr(gpu_check.memory, "unless_full", lambda *arguments: None)
    with pytest.raises(Failed, match="stage 1 does not fit"):
        gpu_check.peaks(x, *row)


@pytest.mark.parametrize(
    ("gib", "first"), [(7.6, (32, "Qwen2.5-0.5B")), (79.1, (32, "Qwen2.5-0.5B")), (3, None)]
)
def test_recipes_are_those_of_the_card(gib, first, monkeypatch, tmp_path):
    """As the recipe table has them: 8 GB takes batches of 32, 32 and 16."""
    facts = lambda device: type("Facts", (), {"total_memory": gib * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", facts)
    rows = gpu_check.recipes(setting(tmp_path, tiny=False))
    if first:
        assert (rows[0][3], rows[0][0]) == first and len(rows) == 3
        assert rows[2][3] == (16 if gib < 8 else 32)
    pairs, length = gpu_check.sizes_of(
        setting(tmp_path, tiny=False, shape=gpu_check.MODELS["Qwen2.5-0.5B"])
    )
    assert length == 1024 and pairs == {7.6: 2, 79.1: 8, 3: 1}[gib]


def test_without_a_gpu_it_ends_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end, clear_errors():
        gpu_check.main([])
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out
    assert said.err == "error: there is no CUDA card here; --tiny tries this check on the CPU\n"


def test_what_it_refuses_to_write(tmp_path, capsys):
    with pytest.raises(UserError, match="results are of GPUs"):
        gpu_check.main(["--tiny", "--out", str(gpu_check.RESULTS / "mine.md")])
    (tmp_path / "page.md").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        gpu_check.main(["--tiny", "--out", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit):
        gpu_check.main(["--tiny", "--shape", "mid"])
    assert "--shape does not go with --tiny" in capsys.readouterr().err
