"""Checks that a model computes what we assume. A model that does not is refused in one line.

Architectures differ in what they do after the last hidden state, in how they count positions, and
in what bitsandbytes can quantise. No list of names would stay true, so each model is tried on a few
tokens when it is loaded:

    check_weights        every weight comes from the file, and no adapter is dropped
    check_quantisation   how many weights are in 4 bits, and layers that cannot come back
    check_computation    our logits are the model's own; later tokens, padding and the rest of a
                         batch change nothing; shared beginnings give the same states
    check_modes          changes between training and evaluation change nothing
    check_adapter        an adapter's file holds what the model wants, no less and no more
    check_sizes          the tokenizer fits the embedding, and --max-length the positions
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

NEARLY_ALL = 0.95  # fraction of the weights in 4 bits above which nothing is said
warned: list[str] = []  # the model whose wrong scales were reported, once in each process
CLOSE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest logit


# ---- weights -------------------------------------------------------------------------


def check_weights(name: str, model, report: dict) -> None:
    """``report`` is the loader's: names of weights that are missing, left over or of other shapes.

    Raises:
        UserError: if there are any (they would be drawn at random, silently), or an adapter.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{name}: holds an adapter, which training would drop; merge it into its model first "
            "(peft: merge_and_unload), and give the merged folder"
        )
    problems = {
        "is missing from the file": sorted(report["missing_keys"]),
        "is in the file and not in the model": sorted(report["unexpected_keys"]),
        "has another shape in the file": sorted(str(key[0]) for key in report["mismatched_keys"]),
    }
    for problem, names in problems.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{name}: the weight {names[0]}{more} {problem}; download or save the model again, "
                "with the config.json that belongs to it"
            )


# ---- quantisation --------------------------------------------------------------------


def check_stored(name: str, config, bits: int) -> None:
    """See that a checkpoint that is stored in few bits is in NF4 or FP4; say that it stays rounded.

    Raises:
        UserError: for any other format.
    """
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if not (stored.get("load_in_4bit") or stored.get("_load_in_4bit")):
        method = stored.get("quant_method") or "a quantised format"
        raise UserError(
            f"{name}: is stored in {str(method).split('.')[-1].lower()}, from which a trained "
            "judge cannot be scored or exported; give the model as it was before that"
        )
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    say(f"{name}: is stored in 4 bits ({kind}): --bits {bits} cannot bring back what was rounded")


def check_quantisation(name: str, model) -> None:
    """Say how many of the weights are in 4 bits, if they are not nearly all.

    Embeddings, output matrix, norms and biases are never quantised and do not count.

    Raises:
        UserError: if no layer is, or if layers cannot be turned back (GPT-2's Conv1D).
    """
    in_four, others = 0, 0
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module in model.modules():
        if id(module) in ends or isinstance(module, torch.nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if state := getattr(parameter, "quant_state", None):
                in_four += state.shape.numel()
            elif parameter.ndim >= 2:
                others += parameter.numel()
        source = getattr(module, "source_cls", None)
        if source is not None and source.__name__ == "Conv1D":
            raise UserError(
                f"{name}: its layers (Conv1D) come back transposed from 4 bits; give --bits 16"
            )
    if in_four == 0:
        raise UserError(f"{name}: none of its layers can be put into 4 bits; give --bits 16")
    share = in_four / (in_four + others)
    if share < NEARLY_ALL:
        say(
            f"{name}: {share:.0%} of the weights of its layers are in 4 bits, the others in "
            f"{str(model.dtype).removeprefix('torch.')}"
        )
    _check_dequantisation(name, model)


def _check_dequantisation(name: str, model) -> None:
    """Say so if bitsandbytes reads a matrix back with the scales of other blocks.

    Its CPU kernel does (0.50.2, AVX-512) if a row is not a whole number of blocks of 64. Then
    another machine computes other numbers from the same files.
    """
    from bitsandbytes.functional import dequantize_4bit

    if warned:
        return
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None or state.shape[-1] % state.blocksize == 0:
            continue
        if not torch.allclose(dequantize_4bit(parameter.data, state), read_by_blocks(parameter)):
            warned.append(name)
            say(
                f"{name}: bitsandbytes reads 4-bit weights back with wrong scales on this CPU, as "
                f"rows of {state.shape[-1]} weights are not whole blocks of {state.blocksize}: "
                "training and scoring here agree, but a GPU gives other figures"
            )
        return


def read_by_blocks(parameter) -> torch.Tensor:
    """A 4-bit matrix turned back block by block, which is right on every machine."""
    from bitsandbytes.functional import dequantize_4bit

    state = parameter.quant_state
    shape = state.shape
    try:
        state.shape = torch.Size([shape.numel() // state.blocksize, state.blocksize])
        return dequantize_4bit(parameter.data, state).view(shape)
    finally:
        state.shape = shape


# ---- adapters ------------------------------------------------------------------------


def check_adapter(name: str, model, file: Path, adapter: str = "default") -> None:
    """See that an adapter's file holds the weights that the adapted model wants, and no others.

    ``adapter`` is what peft calls it.

    Raises:
        UserError: if not, because peft would go on with fresh weights, which change nothing.
    """
    with safe_open(file, "pt") as stored:
        there = set(stored.keys())
    wanted = set(
        get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    )
    if there != wanted:
        odd = min(there ^ wanted)
        raise UserError(
            f"{name}: its adapter is of another model, or of another version of transformers or "
            f"peft: {len(there ^ wanted)} weights do not match, such as {odd} "
            f"({'only' if odd in there else 'missing'} in the file); run.json names the backbone "
            "and the versions"
        )


# ---- computation ---------------------------------------------------------------------


@torch.no_grad()
def check_computation(name: str, model) -> None:
    """Try the model on a few tokens, and note on it whether shared beginnings give the same states.

    Raises:
        UserError: if its own code fails; if its logits differ from those of output_head; if later
            tokens, padding or the rest of a batch change what stands before or beside them.
    """
    base, training = without_adapter(model), model.training
    base.sharing_is_exact = True
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(48, device=model.device).view(2, 24) * 7 % size  # (2, 24)
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] * 3 + 1) % size
    model.eval()
    try:
        with half_precision(model):
            own, again, later = (
                base(input_ids=tokens, use_cache=False).logits.float()  # (2, 24, V)
                for tokens in (ids, ids, other)
            )
        if not own.isfinite().all():
            raise UserError(f"{name}: its logits are no numbers; its weights may be broken")
        close = CLOSE.get(base.dtype, 1e-4) * own.abs().max().item() + 1e-7

        def same(a: torch.Tensor, b: torch.Tensor) -> bool:
            return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= close

        if not same(again, own):
            raise UserError(f"{name}: its logits are not the same twice; it cannot be a judge")
        # Of a causal model they are the same to the last bit, or as near as the same tokens again.
        equal_again = float((again[:, :12] == own[:, :12]).float().mean())
        equal_later = float((later[:, :12] == own[:, :12]).float().mean())
        if not same(later[:, :12], own[:, :12]) or equal_later < equal_again / 2:
            raise UserError(
                f"{name}: is no causal language model: a token changes what stands before it; give "
                "a decoder that generates text from left to right"
            )
        try:
            right = same(output_logits(model, hidden_states(model, ids)), own)
        except Exception:  # no decoder, no output matrix, other names
            right = False
        if not right:
            raise UserError(
                f"{name}: makes its logits in a way that we do not know (no output matrix with a "
                "bias, a scale and a cap); it cannot be a judge"
            )
        padded = torch.cat([ids[:1], ids.new_zeros(1, 9)], dim=1)  # (1, 33)
        if not same(output_logits(model, hidden_states(model, padded))[:, :24], own[:1]):
            raise UserError(
                f"{name}: padding on the right changes its logits; it cannot be batched"
            )
        if not same(output_logits(model, hidden_states(model, ids[1:])), own[1:]):
            raise UserError(f"{name}: the rest of a batch changes its logits; it cannot be batched")
        if can_share(model):
            base.sharing_is_exact = _shares(model, ids, same)
    except UserError:
        raise
    except Exception as error:
        advice = "; give --bits 16" if getattr(model, "is_loaded_in_4bit", False) else ""
        raise UserError(f"{name}: its own code fails: {last_line(error)}{advice}") from error
    finally:
        model.train(training)


@torch.no_grad()
def check_modes(name: str, model) -> None:
    """See that changes between training and evaluation leave what the model computes.

    Raises:
        UserError: if they do not (RWKV rewrites its weights), or its code fails after one.
    """
    size = model.get_input_embeddings().num_embeddings
    ids = torch.arange(24, device=model.device)[None] * 7 % size  # (1, 24)
    training, seen = model.training, []
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            for mode in (False, True, False, True, False):
                model.train(mode)
                states = hidden_states(model, ids)  # (1, 24, H)
                if not mode:
                    seen.append(states)
        same = all(torch.equal(states, seen[0]) for states in seen)
    except UserError:
        same = False
    finally:
        model.train(training)
    if not same:
        raise UserError(
            f"{name}: changes between training and evaluation change what it computes; give "
            "--bits 16"
        )


def _shares(model, ids: torch.Tensor, same) -> bool:
    """Whether states of sequences with a shared beginning are those of whole sequences."""
    question = tuple(ids[0].tolist())
    ends = [tuple(ids[1, k : k + n].tolist()) for k, n in ((0, 3), (5, 5), (9, 4))]
    sequences: list[Segments] = [(question, a, b) for a in ends for b in ends]
    shared = end_states(model, sequences)  # (9, H)
    whole = [torch.tensor([sum(s, ())], device=model.device) for s in sequences]
    alone = torch.cat([hidden_states(model, s)[:, -1] for s in whole])  # (9, H)
    return same(output_logits(model, shared), output_logits(model, alone))


# ---- sizes ---------------------------------------------------------------------------


def check_sizes(name: str, model, tokenizer, max_length: int) -> None:
    """See before any work that tokens and positions fit.

    Raises:
        UserError: if the tokenizer has more tokens than the embedding rows, or sequences of
            ``max_length`` more positions than the model has embeddings for.
    """
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"{name}: its tokenizer has {largest + 1} tokens and its embedding {rows} rows; give "
            "the tokenizer that belongs to the model, or enlarge the embedding"
        )
    config = model.config.get_text_config()
    switch = length_switch(config)
    if switch and max_length > switch:
        raise UserError(
            f"{name}: scales its positions otherwise in texts of more than {switch} tokens, and "
            f"--max-length is {max_length}; give --max-length {switch} or less"
        )
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is None or max_length <= limit:
        return
    learned = [
        key
        for key, module in without_adapter(model).named_modules()
        if isinstance(module, torch.nn.Embedding)
        and limit <= module.num_embeddings <= limit + 2
        and module is not model.get_input_embeddings()
    ]
    if learned:
        raise UserError(
            f"{name}: has {limit} positions and --max-length is {max_length}; give --max-length "
            f"{limit} or less"
        )
    if getattr(config, "rope_parameters", None):
        say(
            f"{name}: was made for {limit} tokens and --max-length is {max_length}: what stands "
            "beyond may be read badly"
        )


def length_switch(config) -> int | None:
    """The length beyond which a model scales the positions of a whole batch by its longest row.

    Dynamic NTK and LongRoPE do. Up to it each sequence is computed by itself, whatever stands
    beside it. None for all other models.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]  # by kind of layer
    switching = [part for part in parts if part.get("rope_type") in ("dynamic", "longrope")]
    if not switching:
        return None
    own = [getattr(config, "original_max_position_embeddings", None)]
    own += [part.get("original_max_position_embeddings") for part in switching]
    known = [length for length in own if length]
    return min(known) if known else getattr(config, "max_position_embeddings", None)
