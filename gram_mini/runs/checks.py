"""Checks that a model computes what we assume. A model that does not is refused in one line.

Architectures differ in what they compute, and no list of names would stay true. So each model is
tried on a few tokens when it is loaded.
"""

from __future__ import annotations

from pathlib import Path

from gram_mini.batches import Segments
from gram_mini.errors import UserError, last_line
from gram_mini.model import half_precision, hidden_states, output_logits, without_adapter
from gram_mini.runs.report import say
from gram_mini.runs.sharing import can_share, end_states

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open

ADAPTER = (
    "holds an adapter and no run.json of a finished run; merge it into its model first (peft: "
    "merge_and_unload), and give the merged folder"
)
NEARLY_ALL = 0.95  # fraction of the weights in 4 bits above which nothing is said
CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest logit


# ---- weights -------------------------------------------------------------------------


def check_weights(name: str, model, report: dict) -> None:
    """``report`` is the loader's: names of weights that are missing, left over or of other shapes.

    Raises:
        UserError: if there are any (they would be drawn at random, silently), or an adapter.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name}: {ADAPTER}")
    shapes = {key[0] for key in report["mismatched_keys"]}
    if odd := {*report["missing_keys"], *report["unexpected_keys"], *shapes}:
        raise UserError(
            f"{name}: its file does not belong to its config.json: {len(odd)} weights are missing, "
            f"left over or of another shape, such as {min(odd)}; download or save the model again"
        )


# ---- quantisation --------------------------------------------------------------------


def check_stored(name: str, config) -> None:
    """Refuse a checkpoint that is stored in few bits: a judge of it could not be exported."""
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{name}: is stored in few bits, as its quantization_config says; give the model as it "
            "was before that"
        )


def check_quantisation(name: str, model) -> None:
    """Say how many of the weights are in 4 bits, if they are not nearly all.

    Embeddings, output matrix, norms and biases are never quantised and do not count.

    Raises:
        UserError: if no layer is, or if some cannot be turned back: GPT-2's Conv1D, and rows that
            are no whole blocks, which bitsandbytes 0.50.2 misreads on CPUs with AVX-512.
    """
    in_four, others = 0, 0
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module in model.modules():
        if id(module) in ends or isinstance(module, torch.nn.Embedding):
            continue
        if getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D":
            raise UserError(
                f"{name}: its layers (Conv1D) come back transposed from 4 bits; give --bits 16"
            )
        for parameter in module.parameters(recurse=False):
            if state := getattr(parameter, "quant_state", None):
                in_four += state.shape.numel()
                if (row := state.shape[-1]) % state.blocksize:
                    raise UserError(
                        f"{name}: has rows of {row} weights, no whole blocks of {state.blocksize}, "
                        "which some CPUs read back wrongly from 4 bits; give --bits 16"
                    )
            elif parameter.ndim >= 2:
                others += parameter.numel()
    if in_four == 0:
        raise UserError(f"{name}: none of its layers can be put into 4 bits; give --bits 16")
    share = in_four / (in_four + others)
    if share < NEARLY_ALL:
        say(f"{name}: only {share:.0%} of the weights of its layers are in 4 bits")


# ---- adapters ------------------------------------------------------------------------


def check_adapter(name: str, model, file: Path, adapter: str = "default") -> None:
    """See that an adapter's file holds the weights that the adapted model wants, and no others.

    Raises:
        UserError: if not, because peft would go on with fresh weights, which change nothing.
    """
    with safe_open(file, "pt") as stored:
        there = set(stored.keys())
    wanted = set(
        get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    )
    if there != wanted:
        raise UserError(
            f"{name}: its adapter is of another model, or of another version of transformers or "
            f"peft: {len(there ^ wanted)} weights do not match, such as {min(there ^ wanted)}; "
            "run.json names the backbone and the versions"
        )


# ---- computation ---------------------------------------------------------------------


@torch.no_grad()
def check_computation(name: str, model) -> None:
    """Try the model on a few tokens, and note on it whether shared beginnings give the same states.

    Raises:
        UserError: if its own code fails; if its logits differ from those of output_head; if later
            tokens, padding, the rest of a batch or the mode change what it computes.
    """
    training = model.training
    model.eval()
    try:
        fault = _fault(model)
    except UserError:
        raise
    except Exception as error:
        advice = "; give --bits 16" if getattr(model, "is_loaded_in_4bit", False) else ""
        raise UserError(f"{name}: its own code fails: {last_line(error)}{advice}") from error
    finally:
        model.train(training)
    if fault:
        raise UserError(f"{name}: {fault}")


def _fault(model) -> str:
    """What is wrong with the computation of a model in evaluation; "" if nothing is."""
    base = without_adapter(model)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(48, device=model.device).view(2, 24) * 7 % size  # (2, 24)
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] * 3 + 1) % size
    padded = torch.cat([ids[:1], ids.new_zeros(1, 9)], dim=1)  # (1, 33)
    with half_precision(model):
        own, again, later = (
            base(input_ids=tokens, use_cache=False).logits.float()  # (2, 24, V)
            for tokens in (ids, ids, other)
        )
    if not own.isfinite().all():
        return "its logits are no numbers; its weights may be broken"
    close = CLOSE.get(base.dtype, 1e-4) * own.abs().max().item() + 1e-7

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= close

    def ours(tokens: torch.Tensor) -> torch.Tensor:
        return output_logits(model, hidden_states(model, tokens))

    if not same(again, own):
        return "its logits are not the same twice; it cannot be a judge"
    # Of a causal model they are the same to the last bit, or as near as the same tokens again.
    equal_again = float((again[:, :12] == own[:, :12]).float().mean())
    equal_later = float((later[:, :12] == own[:, :12]).float().mean())
    if not same(later[:, :12], own[:, :12]) or equal_later < equal_again / 2:
        return (
            "is no causal language model: a token changes what stands before it; give a decoder "
            "that generates text from left to right"
        )
    try:
        right = same(ours(ids), own)
    except Exception:  # no decoder, no output matrix, other names
        right = False
    if not right:
        return (
            "makes its logits in a way that we do not know (no output matrix with a bias, a scale "
            "and a cap); it cannot be a judge"
        )
    if not same(torch.cat([ours(padded)[:, :24], ours(ids[1:])]), own):
        return "padding or the rest of a batch changes its logits; it cannot be batched"
    states = hidden_states(model, ids)  # (2, 24, H)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        for _ in range(2):  # RWKV rewrites its weights, which NF4 cannot undo
            hidden_states(model.train(), ids)
            if not torch.equal(hidden_states(model.eval(), ids), states):
                return "changes between training and evaluation change what it computes"
    base.sharing_is_exact = True
    if can_share(model):
        question = tuple(ids[0].tolist())
        ends = [tuple(ids[1, k : k + n].tolist()) for k, n in ((0, 3), (5, 5), (9, 4))]
        sequences: list[Segments] = [(question, a, b) for a in ends for b in ends]
        whole = [torch.tensor([sum(s, ())], device=model.device) for s in sequences]
        alone = torch.cat([ours(s)[:, -1] for s in whole])  # (9, V)
        shared = output_logits(model, end_states(model, sequences))  # (9, V)
        base.sharing_is_exact = same(shared, alone)
    return ""


# ---- sizes ---------------------------------------------------------------------------


def check_sizes(name: str, model, tokenizer, max_length: int) -> None:
    """See before any work that tokens and positions fit.

    Raises:
        UserError: if they do not.
    """
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{name}: its tokenizer has {largest + 1} tokens and its embedding {rows} rows; give "
            "the tokenizer that belongs to the model, or enlarge the embedding"
        )
    limit = position_limit(model.config.get_text_config())
    if limit and max_length > limit:
        raise UserError(
            f"{name}: has {limit} positions and --max-length is {max_length}; give --max-length "
            f"{limit} or less"
        )


def position_limit(config) -> int | None:
    """The most positions of a sequence; None if the config names none.

    Dynamic NTK and LongRoPE go on beyond a first length, but scale the positions of a whole batch
    by its longest row there. Up to that length each sequence is computed by itself.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]  # by kind of layer
    switching = [part for part in parts if part.get("rope_type") in ("dynamic", "longrope")]
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    if switching:
        name = "original_max_position_embeddings"
        known += [getattr(config, name, None), *(part.get(name) for part in switching)]
    return min((length for length in known if length), default=None)
