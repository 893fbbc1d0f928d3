"""The language model under the reward model: load it (NF4 or not), put LoRA on it, read logits, save.

The embedded backbone and one from the hub take the same way through this file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces at import that an optional kernel is missing
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)  # peft, and 5.x names below

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from gram_mini.errors import UserError  # noqa: E402
from gram_mini.sources import looks_like_path  # noqa: E402

EMBEDDED = "embedded"
EXPORTED = "gram_run.json"  # a run's record in an exported model: with run.json the folder would be taken for a run
HEAD = "head.safetensors"  # beside the adapter of a run that trained one
EMBEDDED_FOLDER = Path(__file__).parent / "world" / "backbone"

transformers_logging.disable_progress_bar()


def pick_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one; of several, each process of ``accelerate launch`` takes its own.

    Raises:
        UserError: for a device that torch does not know or that this machine lacks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        if device == "meta":
            raise RuntimeError("it holds no numbers")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not to be had here: {str(error).splitlines()[0]}") from None


def compute_dtype(bits: int, device: torch.device) -> torch.dtype:
    """Type of activations and unquantised weights: bf16 on a GPU that has it, float32 elsewhere.

    ``bits=16`` is half precision everywhere: float16 on a GPU without bf16. NF4 computes in float32 there, which is slower,
    but never overflows.
    """
    if bits == 32 or (device.type == "cpu" and bits == 4):
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32 if bits == 4 else torch.float16
    return torch.bfloat16


def load_tokenizer(name: str, revision: str | None = None):
    """The tokenizer of a backbone or a run folder, with a padding token (or None where no token ends texts either).

    ``revision`` as in load_backbone.

    Raises:
        UserError: if there is none under this name.
    """
    folder = Path(name) if (Path(name) / "tokenizer.json").is_file() else local_folder(name)
    tokenizer = _from_pretrained(AutoTokenizer, name, folder, revision=revision or "main")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never attended to, any token will do
    return tokenizer


def quantization(bits: int, dtype: torch.dtype) -> dict:
    """What from_pretrained is told for ``bits=4``, NF4 with double quantisation that computes in ``dtype``; else nothing."""
    if bits != 4:
        return {}
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"quantization_config": BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)}


def load_backbone(name: str, bits: int = 4, device: torch.device = torch.device("cpu"), revision: str | None = None):
    """Load a causal language model with frozen weights; ``bits=4`` is NF4 with double quantisation (QLoRA).

    ``revision`` is the commit of a hub model; the newest by default.

    Raises:
        UserError: if there is no such model.
    """
    dtype = compute_dtype(bits, device)
    model = _from_pretrained(
        AutoModelForCausalLM,
        name,
        local_folder(name),
        dtype=dtype,
        device_map={"": device},
        revision=revision or "main",
        use_safetensors=True,  # a pickled checkpoint could run code
        **quantization(bits, dtype),
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first forward pass in eval mode;
        # gradients computed after that are wrong, silently. This keeps it from repacking.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    return model


def checkpoint_gradients(model) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, up to half more time."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_lora(model, rank: int) -> PeftModel:
    """A fresh LoRA adapter on every linear layer but the output matrix; alpha is twice the rank."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def add_head(model: PeftModel, labels: tuple[int, int] | None = None) -> None:
    """Put a trainable head on the last hidden state: a scalar reward (1, H), or, given the labels, a copy of their two
    rows of the output matrix (2, H)."""
    head = torch.nn.Linear(model.get_input_embeddings().weight.shape[1], 1 if labels is None else 2, bias=False)
    with torch.no_grad():
        if labels is None:
            head.weight.normal_(std=0.02)
        else:
            head.weight.copy_(model.get_output_embeddings().weight[list(labels)])
    model.head = head.to(model.device)


def freeze_all_but_head(model: PeftModel) -> None:
    """Leave backbone and adapter as they are: only the head is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))


def load_lora(model, folder: Path, trainable: bool = False) -> PeftModel:
    """Put the adapter of a run on its backbone.

    Raises:
        UserError: if the folder holds no adapter in safetensors.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: holds no adapter_model.safetensors; is this a finished run?")
    try:
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        if (folder / HEAD).is_file():
            weight = load_file(folder / HEAD)["weight"]  # (1, H) or (2, H)
            model.head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(model.device)
            model.head.load_state_dict({"weight": weight})
            model.head.requires_grad_(trainable)
        return model
    except Exception as error:  # as in _from_pretrained
        raise UserError(f"{folder}: the adapter cannot be loaded: {str(error).splitlines()[0]}") from None


def load_merged(model, folder: Path):
    """The backbone in float32 with the adapter of a run in its weights; NF4 weights keep the values they have.

    Raises:
        UserError: as :func:`load_lora`.
    """
    if getattr(model, "is_loaded_in_4bit", False):  # into a 4-bit matrix an adapter can only be merged with a loss
        before = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it warns of the type that it casts to
        try:
            model = model.dequantize()
        finally:
            transformers_logging.set_verbosity(before)
    adapted = load_lora(model.float(), folder)
    head = getattr(adapted, "head", None)
    merged = adapted.merge_and_unload()
    if head is not None:
        merged.head = head
    return merged


def save_adapter(model: PeftModel, tokenizer, backbone: str, folder: Path) -> None:
    """Write adapter, head (where there is one) and tokenizer, as safetensors and JSON."""
    model.peft_config["default"].base_model_name_or_path = backbone
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if hasattr(model, "head"):
        save_file({"weight": model.head.weight.detach().contiguous()}, folder / HEAD)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card
    tokenizer.save_pretrained(str(folder))


def logits_at_end(model, input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Next-token logits (B, V) after position ``last`` (B,) of each of the sequences (B, T)."""
    hidden = hidden_states(model, input_ids)  # (B, T, H)
    at_end = hidden[torch.arange(len(hidden)), last]  # (B, H)
    return output_logits(model, at_end)


def hidden_states(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, T, H) of right-padded sequences (B, T), before the output matrix."""
    with half_precision(model):
        return decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state


def half_precision(model):
    """Context in which the adapter computes in bfloat16 like its backbone, and not, input by input, in float32; its
    parameters and their gradients stay float32. Nothing changes on a float32 backbone."""
    in_bfloat16 = model.get_input_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16)


def decoder(model):
    """The layers of a causal language model, with or without an adapter, without its output matrix."""
    return without_adapter(model).get_decoder()


def without_adapter(model):
    """The transformers model that an adapter is put on; the model itself where it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def output_logits(model, hidden: torch.Tensor, tokens: tuple[int, ...] | None = None) -> torch.Tensor:
    """Next-token logits of hidden states (..., H): (..., V), or (..., len(tokens)) for these tokens only."""
    return output_head(model)(hidden, tokens)


@dataclass(frozen=True)
class OutputHead:
    """What makes logits of the last hidden states: the output matrix, and what some architectures do after it."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    scale: float  # Cohere multiplies, Granite divides
    cap: float | None  # Gemma 2 bends the logits so that they stay within +-cap

    def __call__(self, hidden: torch.Tensor, tokens: tuple[int, ...] | None = None) -> torch.Tensor:
        """Logits as in :func:`output_logits`; only the rows of the matrix that are asked for are multiplied.

        A few tokens' logits are at least float32: bfloat16 would round a logit of 10 to the next sixteenth.
        """
        weight, bias = self.weight, self.bias
        if tokens is not None:
            exact = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = (None if x is None else x[list(tokens)].to(exact) for x in (weight, bias))
        logits = F.linear(hidden.to(weight.dtype), weight, bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def output_head(model) -> OutputHead:
    """The output head of a causal language model, with or without an adapter."""
    base = without_adapter(model)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return OutputHead(head.weight, getattr(head, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def local_folder(name: str) -> Path | None:
    """The folder of a backbone: the embedded one, or one on this machine; None for a name on the hub.

    Raises:
        UserError: for what looks like a path, but is no folder with a model in it.
    """
    folder = EMBEDDED_FOLDER if name == EMBEDDED else Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{name}: holds no config.json, so it is no model folder")
        return folder
    if looks_like_path(name):
        raise UserError(f"{name}: no such folder; give a model folder, a run folder or a name on the hub")
    return None


def fingerprint(name: str, model=None) -> str | None:
    """What identifies a backbone: a hash over config and weights of its folder, or its commit on the hub.

    The commit is read off the loaded ``model``; without one it is None for a name on the hub.
    """
    folder = local_folder(name)
    if folder is None:
        return getattr(model.config, "_commit_hash", None) if model is not None else None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            for part in range(256):  # 64 KB at 256 places tell two models apart without reading 16 GB
                stream.seek(part * size // 256)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:16]


def _from_pretrained(kind, name: str, folder: Path | None, **options):
    try:
        return kind.from_pretrained(str(folder or name), **options)
    except Exception as error:  # files of any origin: whatever the loader raises, this name gives no model
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{name!r} cannot be loaded: {reason}") from None


def read_run(folder: Path, name: str = "run.json") -> dict:
    """The record of a run folder; an exported model keeps it under the name EXPORTED.

    Raises:
        UserError: if the folder holds none or it cannot be read.
    """
    try:
        run = json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {name}, so it is no finished run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / name}, line {error.lineno}: invalid JSON: {error.msg}") from None
    if not isinstance(run, dict) or not {"stage", "backbone", "options", "prompt", "labels"} <= run.keys():
        raise UserError(f"{folder / name}: is not the record of a run")
    return run
