"""The language model under the judge: 4-bit weights (NF4), a LoRA adapter, hidden states, logits.

NF4. A weight matrix W is stored as 4-bit numbers. Each block of 64 weights is divided by its
largest absolute value; each quotient is rounded to the nearest of 16 fixed levels, which are the
quantiles of a normal distribution, because weights are nearly normal. The blocks' scales are
quantised too (double quantisation), so a weight takes 4.13 bits. Before a product the matrix is
turned back into floating point. The rounding is never undone and the stored weights are never
trained. Source: Dettmers et al., QLoRA, arXiv 2305.14314, sections 2 and 3.

LoRA. Beside each frozen matrix W (out, in) stand two thin ones, A (r, in) and B (out, r), and the
layer computes

    y = W x + (alpha / r) B A x,        here alpha = 2 r.

Only A and B are trained: r (in + out) numbers instead of in * out. B begins as zero, so
training begins at the model as it was. Source: Hu et al., arXiv 2106.09685, section 4.

The village's model and one from the hub take the same way through this file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

# bitsandbytes announces at import that an optional kernel is missing; peft uses a deprecated name.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

from gram_mini.errors import UserError, last_line  # noqa: E402
from gram_mini.runs.loading import compute_dtype, from_pretrained, local_model  # noqa: E402

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging  # noqa: E402

transformers_logging.disable_progress_bar()


# ---- loading -------------------------------------------------------------------------


def load_tokenizer(name: str):
    """The tokenizer of a model or a run folder, with a padding token where it has one to give.

    Raises:
        UserError: if there is none under this name.
    """
    folder = Path(name) if (Path(name) / "tokenizer_config.json").is_file() else local_model(name)
    tokenizer = from_pretrained(AutoTokenizer, name, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never attended to, any token will do
    return tokenizer


def quantization(bits: int, dtype: torch.dtype) -> dict:
    """Options of from_pretrained: ``bits=4`` is NF4, double quantised, computed in ``dtype``."""
    if bits != 4:
        return {}
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"quantization_config": BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)}


def load_model(
    name: str,
    bits: int = 4,
    device: torch.device | str = "cpu",
    checkpointing: bool = False,
    scoring: bool = False,
):
    """Load a causal language model with frozen weights; ``bits=4`` is NF4 (QLoRA).

    ``name`` is a folder, a GGUF file, "village", or a name on the hub, which may end in @COMMIT.
    ``checkpointing`` keeps only each layer's input for the backward pass and computes the rest
    again: less memory, up to half more time. ``scoring`` says that there will be no backward pass.

    What the model computes is tried on a few tokens (runs/checks.py).

    Raises:
        UserError: if there is no such model, or it does not compute what we take it to compute.
    """
    from gram_mini.runs import checks  # not above: its checks call this file

    device = torch.device(device)
    dtype = compute_dtype(bits, device, name)
    # torch's attention for CPUs has a slow backward pass in bf16: a step takes a third longer. Its
    # forward pass is the faster one, by far with long texts, and takes less memory.
    plain = device.type == "cpu" and dtype == torch.bfloat16 and not scoring
    folder = local_model(name)
    checks.check_stored(name, from_pretrained(AutoConfig, name, folder), bits)
    model, report = from_pretrained(
        AutoModelForCausalLM,
        name,
        folder,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,  # a pickled checkpoint could run code
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused just below
        attn_implementation="eager" if plain else None,
        **quantization(bits, dtype),
    )
    checks.check_weights(name, model, report)
    if bits == 4:
        checks.check_quantisation(name, model)
    elif getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize().to(dtype)
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first forward pass in
        # eval mode. Gradients computed after that are wrong, silently. This keeps it from
        # repacking.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    checks.check_computation(name, model)
    if checkpointing:
        checkpoint_gradients(model)
    return model.requires_grad_(False)


def checkpoint_gradients(model) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_lora(model, rank: int) -> PeftModel:
    """A fresh LoRA adapter on every linear layer but the output matrix; alpha is twice the rank.

    Raises:
        UserError: if peft cannot adapt the model, or the model's code fails with an adapter.
    """
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"{model_name(model)}: LoRA cannot be put on it: {last_line(error)}"
        ) from error
    with evaluating(adapted):
        hidden_states(adapted, torch.zeros(1, 2, dtype=torch.long))  # some code fails only now
    return adapted


def load_lora(model, folder: Path, trainable: bool = True) -> PeftModel:
    """Put the adapter of a run on its model.

    Raises:
        UserError: if the folder holds no adapter in safetensors, or one of another model.
    """
    from gram_mini.runs import checks  # not above: its checks call this file

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder}: holds no adapter_model.safetensors; is this a finished run?")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:  # as in from_pretrained
        raise UserError(
            f"{folder}: the adapter cannot be loaded: {str(error).splitlines()[0]}"
        ) from None
    checks.check_adapter(str(folder), adapted, file)
    return adapted


# ---- hidden states -------------------------------------------------------------------


def rope_parts(model) -> list[dict]:
    """The parameters of a model's rotary positions, in one piece or by kind of layer."""
    rope = getattr(without_adapter(model).config.get_text_config(), "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict)]


def length_kind(model) -> Callable[[int], int]:
    """A function from length to kind; sequences of different kinds must not share a pass.

    Some models scale all positions of a batch by its longest row (LongRoPE beyond a switch, dynamic
    NTK beyond its limit). For all others every length is of one kind.
    """
    config = without_adapter(model).config.get_text_config()
    parts = rope_parts(model)
    kinds = {part.get("rope_type") for part in parts}
    limit = getattr(config, "original_max_position_embeddings", None) or next(
        (
            p["original_max_position_embeddings"]
            for p in parts
            if p.get("original_max_position_embeddings")
        ),
        getattr(config, "max_position_embeddings", 0),
    )
    if "dynamic" in kinds:
        return lambda length: length if length > limit else 0
    if "longrope" in kinds:
        return lambda length: int(length > limit)
    return lambda length: 0


def forget_lengths(model) -> None:
    """Take dynamic NTK's positions back to the scale of the beginning.

    transformers keeps the scale of the longest pass so far. Then a score would depend on what was
    judged before.
    """
    if not any(part.get("rope_type") == "dynamic" for part in rope_parts(model)):
        return
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)  # of the model, or of each kind of layer
        kinds = kinds if isinstance(kinds, dict) else {"": kinds}
        for layer in (f"{name}_" if name else "" for name in kinds if kinds[name] == "dynamic"):
            now = getattr(module, f"{layer}inv_freq")
            begun = getattr(module, f"{layer}original_inv_freq").to(now.device)
            setattr(module, f"{layer}inv_freq", begun)
            setattr(module, f"{layer}max_seq_len_cached", module.original_max_seq_len)


def hidden_states(model, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, T, H) of right-padded sequences (B, T), before the output matrix.

    Of a model that makes its logits in a way of its own these are the logits, (B, T, V).

    Raises:
        UserError: if the model's own code fails.
    """
    base = without_adapter(model)
    forget_lengths(base)
    try:
        with half_precision(model):
            if getattr(base, "own_logits", False):
                return base(input_ids=ids.to(model.device), use_cache=False).logits
            return decoder(model)(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        raise UserError(f"{model_name(base)}: its own code fails: {last_line(error)}") from error


@contextmanager
def evaluating(model):
    """Context without gradients and without dropout; afterwards the model is in its old mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def half_precision(model):
    """Context in which the adapter of a bfloat16 model computes in bfloat16 too.

    Without it peft casts the input of each adapter layer to float32. The adapter's parameters and
    gradients stay float32. Nothing changes on a float32 model.
    """
    in_bfloat16 = model.get_input_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16)


def decoder(model):
    """The layers of a causal language model, with their adapter, without the output matrix."""
    return without_adapter(model).get_decoder()


def without_adapter(model):
    """The transformers model that an adapter is put on; the model itself where it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_name(model) -> str:
    """What an error calls a model: where it was loaded from, else its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


# ---- logits --------------------------------------------------------------------------


def output_logits(
    model, hidden: torch.Tensor, tokens: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Next-token logits (..., V) of hidden states (..., H), or (..., len(tokens)) of ``tokens``."""
    return output_head(model)(hidden, tokens)


# What Gemma 2 and 3, RecurrentGemma and xLSTM call the cap of their logits.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class OutputHead:
    """What makes logits of hidden states: the output matrix, and what some models do after it."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    scale: float  # Cohere multiplies, Granite divides
    cap: float | None  # Gemma 2 bends the logits so that they stay within +-cap

    def __call__(self, hidden: torch.Tensor, tokens: tuple[int, ...] | None = None) -> torch.Tensor:
        """Logits as in :func:`output_logits`; of the matrix only the rows of ``tokens`` are used.

        The logits of ``tokens`` are at least float32: bfloat16 would round a logit of 10 to the
        next sixteenth.
        """
        weight, bias = self.weight, self.bias
        if tokens is not None:
            exact = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = (
                None if x is None else x[list(tokens)].to(exact) for x in (weight, bias)
            )
        logits = F.linear(hidden.to(weight.dtype), weight, bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


@dataclass(frozen=True)
class OwnLogits:
    """The head of a model whose hidden states are its logits already (see hidden_states)."""

    weight: torch.Tensor  # (V, H); only its length is asked for
    cap: bool = True  # as a cap does, it says that logits must not be written over

    def __call__(self, hidden: torch.Tensor, tokens: tuple[int, ...] | None = None) -> torch.Tensor:
        """Logits as in :func:`output_logits`."""
        if tokens is None:
            return hidden
        return hidden[..., list(tokens)].to(torch.promote_types(hidden.dtype, torch.float32))


def output_head(model) -> OutputHead | OwnLogits:
    """The output head of a causal language model, with or without an adapter."""
    base = without_adapter(model)
    if getattr(base, "own_logits", False):
        return OwnLogits(base.get_input_embeddings().weight)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    cap = next(filter(None, (getattr(config, name, None) for name in CAPS)), None)
    return OutputHead(head.weight, getattr(head, "bias", None), scale, cap)
