"""The language model under the judge: its adapter, hidden states and logits.

NF4. A weight matrix W is stored as 4-bit numbers. Each block of 64 weights is divided by its
largest absolute value; each quotient is rounded to the nearest of 16 fixed levels, which are the
quantiles of a normal distribution, because weights are nearly normal. The blocks' scales are
quantised too (double quantisation), so a weight takes 4.13 bits. Before a product the matrix is
turned back into floating point. The rounding is never undone and the stored weights are never
trained. Source: Dettmers et al., QLoRA, arXiv 2305.14314, sections 2 and 3. bitsandbytes does this
when gram_mini/runs/models.py loads a model.

LoRA. Each frozen matrix W (out, in) gets two thin ones beside it, A (r, in) and B (out, r), and the
layer computes

    y = W x + (alpha / r) B A x,        here alpha = 2 r.

Only A and B are trained: r (in + out) numbers instead of in * out. B begins as zero, so
training begins at the model as it was. Source: Hu et al., arXiv 2106.09685, section 4.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# bitsandbytes announces at import that an optional kernel is missing; peft uses a deprecated name.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

from gram_mini.errors import UserError, last_line  # noqa: E402

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402


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


# ---- hidden states -------------------------------------------------------------------


def hidden_states(model, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, T, H) of right-padded sequences (B, T), before the output matrix.

    Raises:
        UserError: if the model's own code fails.
    """
    try:
        with half_precision(model):
            return decoder(model)(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        raise UserError(
            f"{model_name(without_adapter(model))}: its own code fails: {last_line(error)}"
        ) from error


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
    """The transformers model that an adapter is put on, or the model itself if it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def model_name(model) -> str:
    """The name of a model in errors: where it was loaded from, else its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


# ---- logits --------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputHead:
    """How logits are made of hidden states: by the output matrix, and in some models by more."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    scale: float  # Cohere and Falcon-H1 multiply, Granite divides
    cap: float | None  # Gemma 2 bends the logits so that they stay within +-cap

    def __call__(self, hidden: torch.Tensor, tokens: tuple[int, ...] | None = None) -> torch.Tensor:
        """Next-token logits (..., V) of hidden states (..., H), or of ``tokens`` alone.

        For ``tokens`` only their rows of the matrix are used, and the logits (..., len(tokens)) are
        at least float32, because bfloat16 would round a logit of 10 to the next sixteenth.
        """
        weight, bias = self.weight, self.bias
        if tokens is not None:
            exact = torch.promote_types(weight.dtype, torch.float32)
            weight = weight[list(tokens)].to(exact)
            bias = None if bias is None else bias[list(tokens)].to(exact)
        logits = F.linear(hidden.to(weight.dtype), weight, bias)
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


# The names of the scale and the cap of the logits in the configs of models.
# gram_mini/runs/checks.py refuses a model whose own logits differ from ours.
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def output_head(model) -> OutputHead:
    """The output head of a causal language model, with or without an adapter."""
    base = without_adapter(model)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    caps = [getattr(config, name) for name in CAPS if getattr(config, name, None)]
    return OutputHead(head.weight, getattr(head, "bias", None), scale, caps[0] if caps else None)


def output_logits(
    model, hidden: torch.Tensor, tokens: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Next-token logits of hidden states, as :class:`OutputHead` makes them."""
    return output_head(model)(hidden, tokens)
