"""The village's model with attention heads of 32 numbers for vLLM on a CPU, which knows no 24.

    python -m gram_mini.village.wide_heads EXPORTED OUT

The heads are filled up with zeros, so the model computes what it did before. Two things depend on
the width of a head and are set right: rotary positions turn the pair (i, i + width / 2) by
theta^(-2 i / width), so theta is raised to the power of new / old width; and attention divides by
the root of the width, so the queries are multiplied by the root of new / old. The result is a Llama
model with biases, since its config names the width.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.models import load_tokenizer
from gram_mini.runs.output import check_place
from gram_mini.runs.record import EXPORTED, read_record
from gram_mini.serving.export import make_readable
from gram_mini.serving.known import KNOWN

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WIDTH = 32


def widen(model) -> LlamaForCausalLM:
    """A Qwen2 model with heads of WIDTH numbers, in float32.

    Raises:
        UserError: another architecture, or heads that are not narrower.
    """
    old = model.config
    narrow = old.hidden_size // old.num_attention_heads
    if old.model_type != "qwen2" or not narrow < WIDTH:
        raise UserError(f"this is for the village's model, not for {old.model_type}, {narrow} wide")
    shared = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings "
        "bos_token_id eos_token_id pad_token_id"
    )
    theta = old.rope_parameters["rope_theta"] ** (WIDTH / narrow)
    config = LlamaConfig(
        **{name: getattr(old, name) for name in shared.split()},
        head_dim=WIDTH,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    # both halves of a head keep their pairs (i, i + width / 2)
    places = torch.cat([torch.arange(narrow // 2), torch.arange(narrow // 2) + WIDTH // 2])

    def rows(weight: torch.Tensor) -> torch.Tensor:  # (heads * narrow, ...) -> (heads * WIDTH, ...)
        by_head = weight.view(-1, narrow, *weight.shape[1:])
        wide = by_head.new_zeros(len(by_head), WIDTH, *weight.shape[1:])
        wide[:, places] = by_head
        return wide.flatten(0, 1)

    weights = model.float().state_dict()
    for name in list(weights):
        if ".q_proj." in name:
            weights[name] = rows(weights[name]) * (WIDTH / narrow) ** 0.5
        elif ".k_proj." in name or ".v_proj." in name:
            weights[name] = rows(weights[name])
        elif ".o_proj.weight" in name:
            weights[name] = rows(weights[name].T).T.contiguous()
            weights[name.replace("weight", "bias")] = torch.zeros(old.hidden_size)
    wide = LlamaForCausalLM(config)
    wide.load_state_dict(weights)
    return wide.eval()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gram_mini.village.wide_heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("exported", type=Path, help="folder of gram_mini.serving.export")
    parser.add_argument("out", type=Path, help="folder to write; must not be there")
    args = parser.parse_args(argv)
    read_record(args.exported, EXPORTED)
    if args.out.exists():
        raise UserError(f"{args.out}: is there already; give another folder")
    check_place(args.out, "OUT")
    model = AutoModelForCausalLM.from_pretrained(args.exported)
    dtype = model.dtype
    widen(model).to(dtype).save_pretrained(args.out)
    load_tokenizer(str(args.exported)).save_pretrained(args.out)
    for name in (EXPORTED, KNOWN):
        if (args.exported / name).is_file():
            shutil.copy(args.exported / name, args.out / name)
    make_readable(args.out)
    print(f"wrote {args.out}: the same model with heads of {WIDTH}")


if __name__ == "__main__":
    with clear_errors():
        main()
