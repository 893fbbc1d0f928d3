"""Loading: where a model comes from, the type that it computes in, its tokenizer and its adapter.

Each model is tried on a few tokens before it is used (checks.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from gram_mini.errors import UserError, first_line
from gram_mini.model import without_adapter
from gram_mini.reading.sources import looks_like_path
from gram_mini.runs import checks, gguf
from gram_mini.village import VILLAGE

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

# Their tokens tell two tokenizers apart that have the same vocabulary and template.
PROBE = "The Quick, brown fox: 12,345.67 (a+b)?\n\n\tnaïve 你好 😀 <|im_end|> [User Question] A B"
PROBES = (
    "\n\n1. First, 2024\n 2) x\r\n",
    "  Two  blanks ",
    "don't WE'LL",
    "é ﬁ Å ½",
    "a_b-c/d == 10**6;",
)
NO_BFLOAT16 = (
    "this GPU has no bf16, so 4-bit weights compute in float32, which is slow (on a T4 up to 8 "
    "times slower); prefer a GPU with bf16 (Ampere or newer) or a smaller model; --bits 16 "
    "computes in float16, where large numbers overflow and small gradients may vanish"
)
PLAIN_UP_TO = 512  # tokens of a sequence in training with plain attention; see keep_no_square
VILLAGE_FOLDER = Path(__file__).parents[1] / "village" / "backbone"


# ---- names ---------------------------------------------------------------------------


def local_model(name: str) -> Path | None:
    """The folder of a model, or its GGUF file (runs/gguf.py); None for a name on the hub.

    Raises:
        UserError: for what looks like a path, but is neither a folder with a model in it nor GGUF.
    """
    folder = VILLAGE_FOLDER if name == VILLAGE else Path(name)
    if gguf.is_gguf(folder) and folder.is_file():
        return folder
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "run.json").is_file():
            raise UserError(f"{name}: {checks.ADAPTER}")
        if not (folder / "config.json").is_file():
            raise UserError(f"{name}: holds no config.json; give the folder or file of a model")
        return folder
    if looks_like_path(name) or gguf.is_gguf(folder):
        raise UserError(
            f"{name}: no such folder or file; give a model folder, a run folder, a GGUF file or a "
            "name on the hub"
        )
    return None


def source(name: str, folder: Path | None) -> tuple[str, str]:
    """(folder or name on the hub, commit) of a model. A hub name may end in @COMMIT."""
    if folder and gguf.is_gguf(folder):
        folder = gguf.model_folder(folder)
    place, _, commit = (str(folder), "", "") if folder else name.partition("@")
    return place, commit or "main"


def from_pretrained(kind, name: str, folder: Path | None, **options):
    """What the hub or a folder holds."""
    place, commit = source(name, folder)
    try:
        return kind.from_pretrained(place, revision=commit, **options)
    except Exception as error:  # whatever the loader raises, this name gives no model
        raise UserError(f"{name!r} cannot be loaded: {first_line(error)}") from error


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself. Others emulate it, which is slow."""
    has = (
        getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16")
    )
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and any(test() for test in has)


def compute_dtype(bits: int, device: torch.device, name: str = "") -> torch.dtype:
    """Type of activations and unquantised weights: bf16 if the device is fast at it.

    On a GPU without bf16 ``bits=16`` is float16, and NF4 computes in float32, which is slower but
    never overflows. On a CPU without it everything is float32. So is the village's model in NF4 on
    any CPU, because it is too small to gain from bf16 and its figures are compared across machines.
    """
    if bits == 32:
        return torch.float32
    if device.type == "cpu":
        slow = not fast_bfloat16() or (bits == 4 and name == VILLAGE)
        return torch.float32 if slow else torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32 if bits == 4 else torch.float16
    return torch.bfloat16


# ---- tokenizer, model, adapter -------------------------------------------------------


def load_tokenizer(name: str):
    """The tokenizer of a model or a run folder. Without a padding token it takes its EOS token.

    Some classes of transformers 5 build a tokenizer anew and leave out a part of tokenizer.json
    (GPT2Tokenizer, which SmolLM2 names, splits no digits). Then the file is taken as it is.

    Raises:
        UserError: if there is none under this name.
    """
    folder = Path(name) if (Path(name) / "tokenizer_config.json").is_file() else local_model(name)
    tokenizer = from_pretrained(AutoTokenizer, name, folder)
    if not as_in_file(tokenizer, name, folder):
        tokenizer = from_pretrained(PreTrainedTokenizerFast, name, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never attended to, any token will do
    return tokenizer


def as_in_file(tokenizer, name: str, folder: Path | None) -> bool:
    """Whether a tokenizer makes the tokens of its tokenizer.json; True if there is no such file."""
    place, commit = source(name, folder)
    file = cached_file(
        place,
        "tokenizer.json",
        revision=commit,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None or not tokenizer.is_fast:
        return True
    options = {"add_special_tokens": False}
    of_file = Tokenizer.from_file(file)
    return all(
        tokenizer(text, **options)["input_ids"] == of_file.encode(text, **options).ids
        for text in (PROBE, *PROBES)
    )


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

    Raises:
        UserError: if there is no such model, or it does not compute what we take it to compute.
    """
    device = torch.device(device)
    dtype = compute_dtype(bits, device, name)
    # torch's attention for CPUs has a slow backward pass in bf16: with short texts a step takes up
    # to a third longer. Its forward pass is the faster one, and it takes less memory.
    plain = device.type == "cpu" and dtype == torch.bfloat16 and not scoring
    folder = local_model(name)
    config = from_pretrained(AutoConfig, name, folder)
    checks.check_stored(name, config)
    if device.type == "cuda" and bits == 4 and dtype == torch.float32:
        print(NO_BFLOAT16, file=sys.stderr)
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
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes would repack the weights at the first forward pass
        # in eval mode, and gradients after that would be wrong, silently.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    checks.check_computation(name, model)
    if checkpointing:
        checkpoint_gradients(model)
    return model.requires_grad_(False)


def keep_no_square(model, longest: int) -> None:
    """Train with torch's attention on a CPU if the longest sequence has over PLAIN_UP_TO tokens.

    Plain attention keeps several matrices (T, T) of each head and layer for the backward pass. With
    SmolLM2-135M and T = 1,024 they take most of a step's memory, and writing
    them takes longer than they save. Code that has no other attention stays as it is.
    """
    base = without_adapter(model)
    plain = model.device.type == "cpu" and base.config._attn_implementation == "eager"
    if plain and longest > PLAIN_UP_TO and getattr(base, "_supports_sdpa", False):
        base.set_attn_implementation("sdpa")


def checkpoint_gradients(model) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_lora(model, folder: Path, trainable: bool = True, adapter: str = "default") -> PeftModel:
    """Put the adapter of a run on its model, or a further one beside the adapters that it has.

    ``adapter`` is what peft calls it; a further one is not in use until it is chosen.

    Raises:
        UserError: if the folder holds no adapter in safetensors, or one of another model.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder}: holds no adapter_model.safetensors; is this a finished run?")
    try:
        if isinstance(model, PeftModel):
            adapted = model
            model.load_adapter(str(folder), adapter, is_trainable=trainable)
        else:
            adapted = PeftModel.from_pretrained(model, str(folder), adapter, trainable)
    except Exception as error:  # as in from_pretrained
        raise UserError(f"{folder}: the adapter cannot be loaded: {first_line(error)}") from None
    checks.check_adapter(str(folder), adapted, file, adapter)
    return adapted
