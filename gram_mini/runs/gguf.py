"""A GGUF file as a model folder: unpacked once, into the cache, and then a model like any other.

bitsandbytes cannot quantise what transformers reads from a GGUF file, and transformers cannot save
it. So the file is dequantised, and saved as a folder with config, tokenizer and safetensors. The
folder is named after a fingerprint of the file; it can be deleted at any time.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from gram_mini.errors import UserError, last_line
from gram_mini.runs.checks import check_weights
from gram_mini.runs.output import check_place, hash_of_files, put_in_place

import torch
import transformers
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CACHE = Path(HF_HOME) / "gram_mini"
SUFFIX = ".gguf"
# As what the weights are kept, by the type that most of them have in the file. Any other is a
# quantised one: float16, whose rounding is far below that of 8 bits, takes half of float32.
KEPT_AS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HEADER = 1 << 26  # bytes from the beginning that hold all but weights: config, vocabulary, template
ELSE = "give the model that it was made from, as a folder with safetensors or a name on the hub"
_said: set[str] = set()  # what say_lost has said: once for each process


def is_gguf(path: Path) -> bool:
    """Whether a path is named like a GGUF file and is no folder."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def check_file(path: Path) -> None:
    """See that a GGUF file can be read here, as far as its name and first bytes tell.

    Raises:
        UserError: no such file, one part of a split file, or no GGUF.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a GGUF file on this machine, or download it")
    if re.search(r"-\d+-of-\d+$", path.stem) and not path.stem.endswith("-00001-of-00001"):
        raise UserError(
            f"{path}: is one part of a split GGUF file, which transformers cannot read; put the "
            "parts together (llama.cpp: llama-gguf-split --merge), and give the whole"
        )
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                f"{path}: is no GGUF file, as it does not begin with these letters; download it "
                "again"
            )


def fingerprint(path: Path) -> str:
    """What identifies a GGUF file: a hash of its header and samples of its weights."""
    with open(path, "rb") as file:
        header = file.read(HEADER)
    return hash_of_files(header, [path])


def model_folder(path: Path) -> Path:
    """The model folder of a GGUF file; it is made where it is not in the cache yet.

    Raises:
        UserError: the package gguf is missing, the file is not complete, transformers cannot read
            it or only a part of it, or the cache cannot be written to.
    """
    # Another version of transformers may read the same file in another way.
    name = f"{path.stem[:100]}-{fingerprint(path)}-{transformers.__version__}"
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
                _say(f"{path}: unpacked into {folder} ({size:,.0f} MB), where it can be deleted")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path}: a GGUF file takes one more package; pip install gguf") from None
    try:
        reader = GGUFReader(path)
    except Exception as error:  # whatever numpy makes of bytes that are not there
        raise UserError(
            f"{path}: cannot be read as GGUF ({last_line(error)}); it may not be complete: "
            "download it again"
        ) from error
    sizes: Counter = Counter()  # weights of each type
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = sizes.most_common(1)[0][0] if sizes else "F32"

    source, options = str(path.parent), {"gguf_file": path.name}
    _load(path, "config", AutoConfig, source, **options)
    tokenizer = _load(path, "tokenizer", AutoTokenizer, source, **options)
    if hasattr(transformers, "GgufConfig"):  # newer versions leave some weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, report = _load(
        path,
        "model",
        AutoModelForCausalLM,
        source,
        dtype=KEPT_AS.get(kind, torch.float16),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused just below
        **options,
    )
    check_weights(str(path), model, report)
    unread = _unread(path, reader, model)

    model.hf_quantizer = None  # or save_pretrained refuses
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.gram_gguf = {"type": kind, "unread": unread}  # for say_lost
    folder.mkdir()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load(path: Path, part: str, kind, source: str, **options):
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # as in models.py
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"{path}: transformers makes no {part} of it: {reason.rstrip('.')}; {ELSE}"
        ) from error


def _unread(path: Path, reader, model) -> str:
    """What the file says of stretched positions, where transformers has read nothing of it.

    Raises:
        UserError: if it has left out other weights (it says nothing of them).
    """
    tied = model.config.get_text_config().tie_word_embeddings
    rotary = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    skipped = {*rotary, "output.weight" if tied else None}
    given = sum(int(t.n_elements) for t in reader.tensors if t.name not in skipped)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if given != taken:
        raise UserError(
            f"{path}: holds {given:,} weights, and transformers makes a model of {taken:,} of it; "
            f"{ELSE}"
        )
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    keys = [key for key in reader.fields if key.endswith(".rope.scaling.factor")]
    return ", ".join(rotary + keys) if rope.get("rope_type", "default") == "default" else ""


def say_lost(name: str, config, bits: int) -> None:
    """Say once a process what a GGUF file has lost of the model that it was made from."""
    lost = getattr(config, "gram_gguf", {"type": "F32", "unread": ""})
    lines = []
    if lost["type"] not in KEPT_AS:
        again = ", and --bits 4 rounds them once more" if bits == 4 else ""
        lines.append(f"{name}: its weights were rounded to {lost['type']} in a GGUF file{again}")
    if lost["unread"]:
        lines.append(
            f"{name}: transformers does not read {lost['unread']} of a GGUF file: positions count "
            "a little otherwise than in the model that it was made from"
        )
    for line in lines:
        if line not in _said:
            _said.add(line)
            _say(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
