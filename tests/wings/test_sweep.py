"""Every causal architecture of the installed transformers: right, or refused in one line (slow).

    python tests/wings/test_sweep.py            # 5 minutes on one core; prints the list of both

Each is built small, with the village's tokenizer, trained for two steps in 32, 16 and 4 bits,
reloaded, merged and exported, and its log-odds are held against transformers' own forward pass of
the exported folder. ``pytest --slow`` runs it; else three architectures are tried.
"""

import contextlib
import io
import json
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[2])]

import train_reward  # noqa: E402
from gram_mini.batches import join  # noqa: E402
from gram_mini.errors import UserError  # noqa: E402
from gram_mini.pairs import Pair  # noqa: E402
from gram_mini.runs import models  # noqa: E402
from gram_mini.runs.load import load_judge  # noqa: E402
from gram_mini.runs.models import load_tokenizer  # noqa: E402
from gram_mini.serving import export  # noqa: E402

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers import __version__ as VERSION  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

SMALL = {
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embedding_size": 64,
    "word_embed_proj_dim": 64, "intermediate_size": 128, "ffn_dim": 128, "d_ff": 128, "d_inner":
    128, "decoder_ffn_dim": 128, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2,
    "n_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "moe_intermediate_size": 64, "num_local_experts": 4, "num_experts": 4, "n_routed_experts":
    4, "num_experts_per_tok": 2, "max_position_embeddings": 512, "n_positions": 512, "n_ctx":
    512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "q_lora_rank": 64,
    "kv_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "rotary_dim": 8, "mamba_d_state": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head":
    16, "shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1,
    "attention_hidden_size": 64,
}  # fmt: skip
PAIRS = [Pair("What does Anna eat?", "Anna eats soup.", "Fish " * 9), Pair("Who?", "A.", "B. No.")]
CLOSE = {32: 1e-4, 16: 0.1, 4: 2e-3}  # of log-odds; bf16 rounds each logit
SECONDS = 90
LARGEST = 20_000_000  # parameters of what is built small


class TooLong(Exception):
    """An architecture took more than SECONDS."""


def build(kind: str, folder: Path) -> None:
    """A small model of an architecture in a folder, with the village's tokenizer."""
    tokenizer = load_tokenizer("village")
    config = AutoConfig.for_model(kind)
    known = config.to_dict()
    sizes = {name: value for name, value in SMALL.items() if isinstance(known.get(name), int)}
    if "kv_lora_rank" in known or "qk_rope_head_dim" in known:  # heads of latent attention
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        if known.get("num_experts_per_tok", 0) is None:
            sizes["num_experts_per_tok"] = 2
    config = AutoConfig.for_model(kind, **sizes, vocab_size=len(tokenizer))
    if hasattr(config, "text_config"):
        raise ValueError("has a part that is no language model")
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"has {size / 1e6:.0f} million parameters even so")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def try_one(folder: Path, place: Path, bits: int) -> str:
    """Train, reload, merge, export; "" where everything is right, else how it was refused.

    Raises:
        AssertionError: if log-odds differ.
    """
    rows = [{"prompt": p.prompt, "chosen": p.response_a, "rejected": p.response_b} for p in PAIRS]
    data = place / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = ["--model", str(folder), "--bits", str(bits), "--max-length", "256", "--lr", "1e-2"]
    more = [
        "--steps",
        "2",
        "--held-out",
        "0",
        "--lora-rank",
        "4",
        "--data",
        str(data),
        "--overwrite",
    ]
    try:
        train_reward.main([*same, *more, "--out", str(place / "run")])
        judges = {
            name: load_judge(place / "run", merge=m)
            for name, m in (("apart", False), ("merged", True))
        }
        export.export(place / "run", place / "exported", "float32", overwrite=True)
        judges["exported"] = load_judge(place / "exported")
    except UserError as error:
        assert "\n" not in str(error)
        return str(error).replace(str(folder), "MODEL").replace(str(place), "RUN")
    own = AutoModelForCausalLM.from_pretrained(place / "exported").eval()
    odds = {name: judge.log_odds(judge.encode(PAIRS))[0] for name, judge in judges.items()}
    judge = judges["exported"]
    with torch.no_grad():
        for pair, row in enumerate(judge.encode(PAIRS)):
            ids = torch.tensor([join(judge.prompt, row)])
            z = own(input_ids=ids, use_cache=False).logits[0, -1, list(judge.labels)]
            difference = abs(float(z[0] - z[1]) - float(odds["exported"][pair, 0]))
            assert difference < 1e-4, f"exported: log-odds {difference:.1g} off its own forward"
    for name in ("merged", "exported"):
        difference = float((odds[name] - odds["apart"]).abs().max())
        assert difference < CLOSE[bits], f"{bits} bits: {name} {difference:.1g} off the adapter"
    return ""


def sweep(kinds) -> dict[str, list[str]]:
    """What each architecture says in 32, 16 and 4 bits; "" is right."""

    def stop(*_):
        raise TooLong(f"took more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    results: dict[str, list[str]] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            signal.alarm(SECONDS)
            quiet = io.StringIO()
            try:
                with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                    build(kind, place / "model")
            except Exception as error:
                signal.alarm(0)
                results[kind] = [
                    f"not built: {(str(error) or type(error).__name__).splitlines()[0][:90]}"
                ]
                continue
            answers = []
            for bits in (32, 16, 4):
                signal.alarm(SECONDS)
                try:
                    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                        answers.append(try_one(place / "model", place, bits))
                except Exception as error:
                    answers.append(f"WRONG: {type(error).__name__}: {str(error)[:150]}")
                signal.alarm(0)
            results[kind] = answers
            print(kind, answers, file=sys.__stdout__, flush=True)
    return results


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_an_architecture_is_right_or_refused_in_one_line(kind):
    answers = sweep([kind])[kind]
    assert not [answer for answer in answers if answer.startswith(("WRONG", "not built"))]
    assert answers[0] == "" and ("Conv1D" in answers[2]) == (kind == "gpt2")


@pytest.mark.slow
def test_all_architectures_are_right_or_refused_in_one_line():
    results = sweep(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    assert not {kind: a for kind, a in results.items() if any(x.startswith("WRONG") for x in a)}


def cells(answers: list[str]) -> list[str]:
    """What the list says of 32, 16 and 4 bits."""
    said = [answer or "right" for answer in answers]
    return [said[0], *("the same" if answer == said[0] else answer for answer in said[1:])]


def main() -> None:
    models.fast_bfloat16 = lambda: False  # every CPU alike, as in conftest.py
    results = sweep(sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    right = [kind for kind, answers in results.items() if answers == ["", "", ""]]
    refused = {kind: a for kind, a in results.items() if len(a) == 3 and kind not in right}
    unbuilt = {kind: a[0] for kind, a in results.items() if len(a) == 1}
    print(f"\ntransformers {VERSION}")
    print(f"\nright in 32, 16 and 4 bits: {len(right)}\n{', '.join(right)}")
    print(f"\nright or refused in one line: {len(refused)}")
    for kind, answers in refused.items():
        print(f"{kind}: {'; '.join(cells(answers))}")
    print(f"\nnot built small from the default config: {len(unbuilt)}")
    for kind, why in unbuilt.items():
        print(f"{kind}: {why}")


if __name__ == "__main__":
    main()
