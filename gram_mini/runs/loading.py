"""Where a model comes from, and the type that it computes in."""

from __future__ import annotations

from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.reading.sources import looks_like_path
from gram_mini.runs import gguf
from gram_mini.village import VILLAGE

import torch

VILLAGE_FOLDER = Path(__file__).parents[1] / "village" / "backbone"


# ---- names ---------------------------------------------------------------------------


def local_model(name: str) -> Path | None:
    """The folder of a model, or its GGUF file (runs/gguf.py); None for a name on the hub.

    Raises:
        UserError: for what looks like a path, but is neither a folder with a model in it nor GGUF.
    """
    folder = VILLAGE_FOLDER if name == VILLAGE else Path(name)
    if gguf.is_gguf(folder):
        gguf.check_file(folder)
        return folder
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "run.json").is_file():
            raise UserError(
                f"{name}: holds an adapter, which training would drop; merge it into its model "
                "first (peft: merge_and_unload), and give the merged folder"
            )
        if not (folder / "config.json").is_file():
            files = sorted(folder.glob("*.gguf"))
            instead = f"; give the GGUF file itself, such as {files[0]}" if files else ""
            raise UserError(f"{name}: holds no config.json, so it is no model folder{instead}")
        return folder
    if looks_like_path(name):
        raise UserError(
            f"{name}: no such folder; give a model folder, a run folder, a file that ends in .gguf "
            "or a name on the hub"
        )
    return None


def from_pretrained(kind, name: str, folder: Path | None, **options):
    """What the hub or a folder holds; a hub name may end in @COMMIT, which pins the version."""
    if folder and gguf.is_gguf(folder):
        folder = gguf.model_folder(folder)
    source, _, commit = (str(folder), "", "") if folder else name.partition("@")
    try:
        return kind.from_pretrained(source, revision=commit or "main", **options)
    except Exception as error:  # whatever the loader raises, this name gives no model
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{name!r} cannot be loaded: {reason}") from error


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself (AMX or AVX512-BF16). Others emulate it,
    which is slower than float32.
    """
    has = (
        getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16")
    )
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and any(test() for test in has)


def compute_dtype(bits: int, device: torch.device, name: str = "") -> torch.dtype:
    """Type of activations and unquantised weights: bf16 where the device is fast at it.

    On a GPU without bf16 ``bits=16`` is float16. NF4 computes in float32 there, which is slower,
    but never overflows. On a CPU without it everything is float32. So is the village's model in
    NF4 on any CPU: it is too small to gain from bf16, and its figures are compared across machines.
    """
    if bits == 32:
        return torch.float32
    if device.type == "cpu":
        slow = not fast_bfloat16() or (bits == 4 and name == VILLAGE)
        return torch.float32 if slow else torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32 if bits == 4 else torch.float16
    return torch.bfloat16
