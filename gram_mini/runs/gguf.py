"""A GGUF file as a model folder: unpacked once, into the cache, and then a model like any other.

A GGUF file names its config and tokenizer by keys of its own, and a key that goes unread changes
the numbers without a word. So only what tests/wings/test_gguf.py shows to give the tokens and
logits of the model's own folder is read: SmolLM2, which `make real` takes. Anything else is
refused. Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from gram_mini.errors import UserError, last_line
from gram_mini.runs.checks import check_weights
from gram_mini.runs.output import check_place, sampled_hash
from gram_mini.runs.report import say

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

FORMAT = 1  # raise it with every change to what is unpacked; older folders are then left alone
CACHE = Path(HF_HOME) / "gram_mini"
HEADER = 1 << 26  # bytes from the beginning that hold all but weights: config, vocabulary, template
ELSE = "give the model's own folder or its name on the hub"
EXACT = ("F32", "F16", "BF16")  # types of weights; all others are rounded

PROVEN = {  # keys and the values that they must have
    "general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False,
}  # fmt: skip
CONFIG = (  # keys that transformers reads
    "llama.context_length", "llama.embedding_length", "llama.block_count",
    "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv",
    "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base",
)  # fmt: skip
TOKENS = "tokenizer.ggml.tokens"
NEEDED = (TOKENS, "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.chat_template")
SPECIAL = {  # keys that may be left out
    f"tokenizer.ggml.{key}_token_id": f"{name}_token"
    for key, name in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items()
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens; 1 is plain text


def is_gguf(path: Path) -> bool:
    """Whether a path is named like a GGUF file and is no folder."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def fingerprint(path: Path) -> str:
    """What identifies a GGUF file: a hash of its header and of samples of its weights."""
    with open(path, "rb") as file:
        return sampled_hash(file.read(HEADER), [path])


def model_folder(path: Path) -> Path:
    """The model folder of a GGUF file; it is made where it is not in the cache yet.

    Raises:
        UserError: the package gguf is missing, the file is not complete, it holds something that
            is not in the tables above, or the cache cannot be written to.
    """
    folder = CACHE / f"{path.stem[:100]}-{fingerprint(path)}-format{FORMAT}"
    if folder.is_dir():
        return folder
    check_place(CACHE, "the cache in HF_HOME")
    CACHE.mkdir(parents=True, exist_ok=True)
    # Of several processes, one unpacks.
    with FileLock(CACHE / f".{folder.name}.lock"), TemporaryDirectory(dir=CACHE) as partial:
        if not folder.is_dir():
            made = Path(partial) / "model"
            kind = _unpack(path, made)
            made.rename(folder)
            rounded = "" if kind in EXACT else f"; its weights were rounded to {kind}"
            say(f"{path}: unpacked into {folder}, where it can be deleted{rounded}")
    return folder


def _unpack(path: Path, folder: Path) -> str:
    """Make the model folder; returns the type of most of the matrices."""
    try:
        import gguf  # an optional package
    except ImportError:
        raise UserError(f"{path}: a GGUF file takes one more package; pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        keys = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever numpy makes of bytes that are not there
        raise UserError(
            f"{path}: cannot be read as GGUF ({last_line(error)}); it may not be complete: "
            "download it again"
        ) from error
    try:
        _check_keys(keys)
        tokenizer = _tokenizer(keys)
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused just below
        )
    except Exception as error:  # ours, or of a library for which something is too odd
        raise UserError(f"{path}: {last_line(error)}; {ELSE}") from error
    check_weights(str(path), model, report)
    weights = dict(model.named_parameters())  # without the output matrix if it is tied
    if len(reader.tensors) != len(weights):
        raise UserError(
            f"{path}: holds {len(reader.tensors)} weights, and the model has {len(weights)}; {ELSE}"
        )
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    kind = kinds.most_common(1)[0][0]
    for name, weight in weights.items():
        # The rounding of float16 is far below that of 8 bits, and it takes half of float32.
        weights[name] = weight.half() if weight.ndim > 1 and kind not in EXACT else weight
    folder.mkdir()
    vars(model.config).pop("quantization_config", None)  # it is not quantised any more
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return kind


def _check_keys(keys: dict) -> None:
    """Each key of the tables is there, and each other one says what we take for granted."""
    for key, value in PROVEN.items():
        if keys.get(key) != value:
            raise UserError(f"its {key} is {keys.get(key)}; only {value} is read")
    if missing := [key for key in (*CONFIG, *NEEDED) if key not in keys]:
        raise UserError(f"its key {missing[0]} is missing")
    head_dim = keys["llama.embedding_length"] // keys["llama.attention.head_count"]
    may_be = {
        "llama.rope.dimension_count": head_dim,
        "llama.vocab_size": len(keys[TOKENS]),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    for key in sorted(keys.keys() - {*PROVEN, *CONFIG, *NEEDED, *SPECIAL}):
        said = keys[key]
        if key.startswith(("llama.", "tokenizer.")) and said != may_be.get(key):
            raise UserError(f"its key {key} ({str(said)[:40]}) is not read")


def _tokenizer(keys: dict) -> PreTrainedTokenizerFast:
    """The tokenizer that the keys describe."""
    tokens, types = keys[TOKENS], keys["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
    vocabulary = {text: i for i, text in enumerate(tokens) if types[i] != UNUSED}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits, in_bytes = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = Sequence([digits, in_bytes]), decoders.ByteLevel()
    made = {first + second for first, second in merges}
    for text, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([AddedToken(text, normalized=False)])
        elif kind != UNUSED and len(text) > 1 and text not in made:
            raise UserError(f"its token {text!r} is typed as plain text, which no merge makes")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=keys["tokenizer.chat_template"],
        **{name: tokens[keys[key]] if key in keys else None for key, name in SPECIAL.items()},
    )
