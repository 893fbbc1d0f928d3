"""A GGUF file as a model folder: unpacked once, into the cache, and then a model like any other.

A GGUF file names its config and tokenizer by keys of its own, and a key that goes unread changes
the numbers without a word. So only what tests/wings/test_gguf.py shows to give the tokens and
logits of the model's own folder is read: SmolLM2, which `make real` takes. Anything else is
refused. Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from gram_mini.errors import UserError, last_line
from gram_mini.runs.output import check_place, put_in_place, sampled_hash

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FORMAT = 1  # raise it with every change to what is unpacked; older folders are then left alone
CACHE = Path(HF_HOME) / "gram_mini"
SUFFIX = ".gguf"
HEADER = 1 << 26  # bytes from the beginning that hold all but weights: config, vocabulary, template
ELSE = "give the model's own folder or its name on the hub"
# As what weights are kept. Any other type is a quantised one: float16, whose rounding is far below
# that of 8 bits, takes half of float32.
KEPT_AS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

PROVEN = {  # keys and the values that they must have
    "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
}  # fmt: skip
KEYS = {  # keys of an architecture, each of which must be there, and their names in its config
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
}  # fmt: skip
SAID_TWICE = {  # keys that may be there, and must then say what the config says anyway
    "rope.dimension_count": "head_dim", "vocab_size": "vocab_size",
}  # fmt: skip
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens; 1 is plain text

_said: set[str] = set()  # what say_lost has said: once for each process


def is_gguf(path: Path) -> bool:
    """Whether a path is named like a GGUF file and is no folder."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def check_file(path: Path) -> None:
    """See that a GGUF file is there, as far as its first bytes tell.

    Raises:
        UserError: no such file, or no GGUF.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a GGUF file on this machine, or download it")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: does not begin as a GGUF file does; download it again")


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
    name = f"{path.stem[:100]}-{fingerprint(path)}-format{FORMAT}"
    folder = CACHE / name
    if folder.is_dir():
        return folder
    check_place(CACHE, "the cache in HF_HOME")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f".{name}.lock"):  # of several processes, one unpacks
        partial = CACHE / f"{name}.partial"
        try:
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                _unpack(path, partial)
                put_in_place(partial, folder)
                size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
                line = f"{path}: unpacked into {folder} ({size:,.0f} MB), where it can be deleted"
                print(line, file=sys.stderr)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
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
        tokenizer = _tokenizer(keys)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(keys, tensors)
        weights = _weights(gguf, config, tensors)
    except Exception as error:  # ours, or of a library for which something is too odd
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        raise UserError(f"{path}: {last_line(error)}; {ELSE}") from error
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    config.gram_gguf = {  # for say_lost
        "type": types.most_common(1)[0][0],
        "template": bool(tokenizer.chat_template),
    }
    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _read(keys: dict, prefix: str, wanted, may_be) -> dict:
    """The values under a prefix. Each key of ``wanted`` is there, each other one ``may_be``."""
    values = {key[len(prefix) :]: keys[key] for key in keys if key.startswith(prefix)}
    others = {key for key in values if not may_be(key, values[key])}
    for key in sorted(set(wanted) ^ others):
        what = f"({str(values[key])[:40]}) is not read" if key in values else "is missing"
        raise UserError(f"its key {prefix}{key} {what}")
    return values


def _tokenizer(keys: dict) -> PreTrainedTokenizerFast:
    """The tokenizer that the keys describe; first of all, whether the file is one of PROVEN."""
    for key, value in PROVEN.items():
        if keys.get(key) != value:
            raise UserError(f"its {key} is {keys.get(key)}; only {value} is read")
    ggml = _read(
        keys,
        "tokenizer.ggml.",
        ("model", "pre", "tokens", "token_type", "merges"),
        lambda key, value: key == "scores" or key.endswith("_token_id") or value is False,
    )
    tokens, types = ggml["tokens"], ggml["token_type"]
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
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

    if "add_bos_token" not in ggml:  # if it is there, it is False
        raise UserError("its key tokenizer.ggml.add_bos_token is missing")

    def marker(name: str) -> str | None:
        i = ggml.get(f"{name}_token_id")
        return tokens[i] if i is not None and types[i] in (CONTROL, USER_DEFINED) else None

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=keys.get("tokenizer.chat_template"),
        bos_token=marker("bos"),
        eos_token=marker("eos"),
        unk_token=marker("unknown"),  # if there is none it must say so: some classes have their own
        pad_token=marker("padding"),
    )


def _config(keys: dict, tensors: dict):
    """The config that the keys describe."""
    architecture = keys["general.architecture"]
    prefix = f"{architecture}."
    values = _read(keys, prefix, KEYS, lambda key, value: key in SAID_TWICE)
    rope = {"rope_type": "default", "rope_theta": values["rope.freq_base"]}
    config = AutoConfig.for_model(
        architecture,
        **{name: values[key] for key, name in KEYS.items() if name != "rope_theta"},
        head_dim=values["embedding_length"] // values["attention.head_count"],
        vocab_size=len(keys["tokenizer.ggml.tokens"]),
        rope_parameters=rope,
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=keys.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=keys.get("tokenizer.ggml.eos_token_id"),
    )
    for key in values.keys() & SAID_TWICE.keys():
        if values[key] != (ours := getattr(config, SAID_TWICE[key])):
            raise UserError(f"its key {prefix}{key} ({values[key]}) is not read: {ours} is used")
    return config


def _weights(gguf, config, tensors: dict) -> dict[str, torch.Tensor]:
    """The weights by their names in a model folder, each of the shape that the config asks for."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights, left = {}, dict(tensors)
    for name, wanted in model.named_parameters():  # without the output matrix if it is tied
        tensor = left.pop(names.get_name(name, (".weight", ".bias")), None)
        if tensor is None:
            raise UserError(f"its weight {name} is missing")
        if (shape := tensor.shape.tolist()[::-1]) != list(wanted.shape):
            raise UserError(f"its weight {name} has the shape {shape}, not {list(wanted.shape)}")
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if re.search(r"\.[qk]_proj\.", name):
            # We turn one half of a head by the other. llama.cpp turns neighbours, and so writes
            # the rows of queries and keys in another order.
            pairs = weight.view(-1, config.head_dim // 2, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        kept_as = KEPT_AS.get(tensor.tensor_type.name, torch.float16)
        weights[name] = weight.to(kept_as).contiguous()
    if left:
        raise UserError(f"its weight {min(left)} is none of the model's")
    return weights


def say_lost(name: str, config, bits: int) -> None:
    """Say once a process what a GGUF file has lost of the model that it was made from."""
    lost = getattr(config, "gram_gguf", {})
    lines = []
    if lost.get("type", "F32") not in KEPT_AS:
        again = ", and --bits 4 rounds them once more" if bits == 4 else ""
        lines.append(f"{name}: its weights were rounded to {lost['type']} in a GGUF file{again}")
    if not lost.get("template", True):
        lines.append(
            f"{name}: the GGUF file has no chat template, so prompts are plain text; if the model "
            f"has one, {ELSE}"
        )
    for line in lines:
        if line not in _said:
            _said.add(line)
            print(line, file=sys.stderr)
