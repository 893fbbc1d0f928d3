"""A GGUF file as --model: the tokens and figures of the model's own folder, and clear refusals."""

import json
import os
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import score
import train_pretrain
import train_reward
from gram_mini import prompts
from gram_mini.errors import UserError
from gram_mini.model import hidden_states
from gram_mini.runs import gguf as unpacking
from gram_mini.runs.defaults import SCORED
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import VILLAGE_FOLDER, load_model, load_tokenizer
from gram_mini.runs.record import fingerprint
from gram_mini.serving import export

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, HEADS, KEY_VALUE_HEADS, HIDDEN, INNER, HEAD = 2, 4, 2, 64, 128, 16
ROWS = 730  # of the embedding; some of them belong to no token
IDS = torch.arange(40).view(2, 20) + 20
PAIR = ("What does Anna eat?", "Anna eats soup.", "Stop bothering me. Anna eats fish.")
SHORT = "--limit 60 --steps 2 --batch-size 8 --lora-rank 4 --lr 5e-3 --bits 32".split()


# ---- a tiny model, as a folder and as a file -----------------------------------------

# Pieces that show how a text was split, and "zqx", which the merges alone never make of z, q, x.
MERGES = ["Ċ Ċ", "Ġ Ġ", "1 2", "12 3", ". Ċ", "e Ì", "eÌ ģ", "Ã ©", "q x", "z q", "zq x"]
BOS, EOS, PAD, PREFIX = "<｜begin of text｜>", "<|im_end|>", "<|pad|>", "<|fim_prefix|>"
SPECIAL = [BOS, "<|im_start|>", EOS, PAD, "<｜User｜>"]
ADDED = ["<tool call>", "</think>"]  # not special, as PREFIX
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "What does Anna eat?", "\n\n1.", "  two blanks  ", " \n a\n\n\nb\r\n\r\n", "123 1234 a12\n\n34",
    "zqx zqx", "It's I'LL.\n", "é e\u0301", "naïve 你好 😀", "｜a｜<｜ ｜>", "a\t\tb", "",
    *(f"x{token} {token}\n" for token in (*SPECIAL, *ADDED, PREFIX)), "".join(SPECIAL + ADDED),
    *re.findall(r"'([^']+)'", CHAT),
]  # fmt: skip


def vocabulary() -> tuple[list[str], list[str], list[str]]:
    """The pieces and merges of the village's tokenizer with those above, and the added tokens."""
    model = json.loads((VILLAGE_FOLDER / "tokenizer.json").read_text())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)[4:]  # after its own special tokens
    new = [merge for merge in MERGES if merge.replace(" ", "") not in pieces]
    pieces += [merge.replace(" ", "") for merge in new]
    return pieces, [" ".join(pair) for pair in model["merges"]] + new, [*SPECIAL, *ADDED, PREFIX]


def make_tokenizer(folder: Path) -> None:
    """The tokenizer as the model's makers publish it."""
    pieces, merges, added = vocabulary()
    vocab, pairs = {piece: i for i, piece in enumerate(pieces)}, [tuple(m.split()) for m in merges]
    in_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    in_bytes["use_regex"] = True
    file = {
        "added_tokens": [
            {"id": len(pieces) + i, "content": token, "special": token in SPECIAL, "lstrip": False,
             "rstrip": False, "single_word": False, "normalized": False}
            for i, token in enumerate(added)
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, in_bytes],
        },
        "decoder": in_bytes, "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file))
    config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": CHAT}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_folder(folder: Path, tied=True) -> Path:
    """A tiny model as a folder. None of its values is what a config would have by itself."""
    folder.mkdir()
    make_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=ROWS, hidden_size=HIDDEN, head_dim=HEAD,
        intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS, rms_norm_eps=1e-2, initializer_range=0.2,
        tie_word_embeddings=tied, max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.ndim == 1:  # norms and biases, which begin as ones and zeros
            weight.data += torch.randn_like(weight) / 4
    model.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The weights by llama.cpp's names; Llama's rows as llama.cpp turns them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    named = {}
    for name, value in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        array = value.detach().numpy()
        heads = {"q_proj": HEADS, "k_proj": KEY_VALUE_HEADS}.get(name.split(".")[-2])
        if heads:
            turned = array.reshape(heads, 2, len(array) // heads // 2, HIDDEN)
            array = turned.swapaxes(1, 2).reshape(array.shape)
        named[names.get_name(name, (".weight", ".bias"))] = array
    return named


def write(path, tensors, architecture="llama", changed=None, kinds=None) -> Path:
    """Write a GGUF file. Tensors that ``kinds`` does not name are F32. A key of ``changed`` has
    another value, or is left out (None).
    """
    pieces, merges, added = vocabulary()
    own = {
        "block_count": LAYERS, "context_length": 16384, "embedding_length": HIDDEN,
        "feed_forward_length": INNER, "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_VALUE_HEADS, "attention.layer_norm_rms_epsilon": 1e-2,
        "rope.freq_base": 300.0,
    }  # fmt: skip
    unused = [f"[PAD{i}]" for i in range(len(pieces + added), ROWS)]
    types = [1] * len(pieces) + [3 if t in SPECIAL else 4 for t in added] + [5] * len(unused)
    keys = {
        **{f"{architecture}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces + added + unused, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(pieces), "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.eos_token_id": len(pieces) + added.index(EOS),
        "tokenizer.ggml.padding_token_id": len(pieces) + added.index(PAD),
        "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": CHAT,
        **(changed or {}),
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}  # fmt: skip
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name, Type.F32)
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "folder")


@pytest.fixture(scope="module")
def tensors(llama):
    return weights(llama)


@pytest.fixture(scope="module")
def file(llama, tensors):
    return write(llama.parent / "tiny.gguf", tensors)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpacking, "CACHE", tmp_path_factory.mktemp("cache") / "gram_mini")
        yield unpacking.CACHE


def matrices(tensors, kind) -> dict:
    """All matrices in one type, as ``kinds`` of write."""
    return {name: kind for name, array in tensors.items() if array.ndim == 2}


# ---- the same model ------------------------------------------------------------------


def same_tokens(here, there) -> None:
    for text, added, split in product(TEXTS, (False, True), (False, True)):
        options = dict(add_special_tokens=added, split_special_tokens=split)
        assert here(text, **options)["input_ids"] == there(text, **options)["input_ids"], text
    assert here.get_vocab() == there.get_vocab() and here.chat_template == there.chat_template
    assert here.eos_token == there.eos_token and here.pad_token == there.pad_token
    for make in (prompts.pair_prompt, prompts.judge_prompt, prompts.label_tokens):
        assert make(here) == make(there)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tokens_and_logits_are_those_of_the_own_folder(tmp_path, tied):
    folder = make_folder(tmp_path / "folder", tied)
    file = write(tmp_path / f"{tied}.gguf", weights(folder))
    same_tokens(*(load_tokenizer(str(path)) for path in (file, folder)))
    here, own = (load_model(str(path), 32)(IDS).logits for path in (file, folder))
    assert torch.equal(here, own) and own.std() > 0.1


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_states_and_scores_are_those_of_the_own_folder(file, llama, bits):
    states = [hidden_states(load_model(str(path), bits), IDS) for path in (file, llama)]
    assert torch.equal(*states) and states[0].std() > 0.1
    here, there = (load_judge(path, bits).compare(*PAIR) for path in (file, llama))
    assert here == there and abs(here.log_odds_first) > 1e-3


def test_a_file_is_unpacked_once_and_says_where(tensors, tmp_path, cache, monkeypatch, capsys):
    file = write(tmp_path / "once.gguf", tensors)
    load_model(str(file), 32)
    (folder,) = cache.glob("once-*")
    assert f"unpacked into {folder}, where it can be deleted\n" in capsys.readouterr().err
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja"}
    assert not list(cache.glob("*.partial"))
    monkeypatch.setattr(unpacking, "_unpack", None)  # a call would fail
    load_model(str(file), 32)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(unpacking, "FORMAT", unpacking.FORMAT + 1)  # as after a correction
    with pytest.raises(TypeError):
        load_model(str(file), 32)


def test_what_was_rounded_is_said_where_it_is_unpacked(tensors, tmp_path, capsys):
    file = write(tmp_path / "small.gguf", tensors, kinds=matrices(tensors, Type.Q8_0))
    model = load_model(str(file), 32)
    assert "deleted; its weights were rounded to Q8_0\n" in capsys.readouterr().err
    array = gguf.dequantize(gguf.quantize(tensors["token_embd.weight"], Type.Q8_0), Type.Q8_0)
    kept = model.get_input_embeddings().weight.numpy()
    assert np.array_equal(kept, array.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_a_file_that_is_not_quantised_loses_nothing(tensors, tmp_path, capsys, kind):
    file = write(tmp_path / f"{kind.name}.gguf", tensors, kinds=matrices(tensors, kind))
    model = load_model(str(file), 32)
    assert "rounded" not in capsys.readouterr().err
    array = gguf.dequantize(gguf.quantize(tensors["token_embd.weight"], kind), kind)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(array))
    assert (kind == Type.F32) == np.array_equal(array, tensors["token_embd.weight"])
    norm = model.model.norm.weight.numpy()  # F32 in each of the files
    assert np.array_equal(norm, tensors["output_norm.weight"])


# ---- runs ----------------------------------------------------------------------------


def test_both_stages_scores_and_export(tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path / "folder")
    file = write(tmp_path / "a.gguf", weights(folder))
    monkeypatch.chdir(tmp_path)
    train_pretrain.main(["--model", file.name, *SHORT, "--out", "one"])
    train_reward.main(["--model", file.name, *SHORT, "--init", "one", "--out", "two"])
    for run in ("one", "two"):
        record = json.loads(Path(run, "run.json").read_text())
        assert record["backbone"] == {"name": str(file), "fingerprint": fingerprint(str(file))}

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # run.json has the whole path
    run = load_judge("../two").compare(*PAIR)
    assert run.log_odds_first != load_judge(file, bits=32).compare(*PAIR).log_odds_first
    capsys.readouterr()
    score.main(["--model", "../two", "--prompt", PAIR[0], "--response", "a", "--response", "b"])
    assert "P(A better) = " in capsys.readouterr().out

    export.main(["../two", "exported", "--dtype", "float32"])
    names = {path.suffix for path in Path("exported").iterdir()}
    assert names == {".json", ".safetensors", ".jinja"}
    for path in (file, "../two", "exported"):
        judge = load_judge(path)
        assert judge.batch_size == SCORED[1]  # its backbone is not the village's
        same_tokens(judge.tokenizer, load_tokenizer(str(folder)))
    exported = judge.compare(*PAIR)
    assert exported.log_odds_first == pytest.approx(run.log_odds_first, abs=1e-4)
    assert exported.log_odds_second == pytest.approx(run.log_odds_second, abs=1e-4)


def test_another_file_under_the_same_name_is_refused(file, tensors, tmp_path, monkeypatch):
    own = tmp_path / "own.gguf"
    shutil.copy(file, own)
    train_reward.main(["--model", str(own), *SHORT, "--out", str(tmp_path / "run")])
    write(own, {**tensors, "output_norm.weight": tensors["output_norm.weight"] * 2})
    with pytest.raises(UserError, match="was trained on another version of the backbone"):
        load_judge(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name in (str(own), "own.gguf"):
        with pytest.raises(UserError, match="--init .* another version of the backbone"):
            train_reward.main(["--model", name, *SHORT, "--init", "run", "--out", "next"])


def test_a_name_that_is_a_link_is_kept(file, tmp_path):
    """As in the hub's cache, where the file that a link leads to has no suffix."""
    shutil.copy(file, tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "link.gguf")
    train_reward.main(["--model", f"{tmp_path}/link.gguf", *SHORT, "--out", f"{tmp_path}/run"])
    assert load_judge(tmp_path / "run").compare(*PAIR)


# ---- what is refused -----------------------------------------------------------------


def refused(path) -> str:
    """The line that refuses it; nothing is left of it in the cache."""
    with pytest.raises(UserError) as error:
        load_judge(path)
    assert not list(unpacking.CACHE.glob(f"{path.stem}-*"))
    line = str(error.value)
    assert "\n" not in line and line.startswith(str(path)) and "; " in line
    return line


def test_a_tokenizer_that_adds_a_token_is_refused(tensors, tmp_path):
    for value in (True, None):
        file = write(
            tmp_path / "bos.gguf", tensors, changed={"tokenizer.ggml.add_bos_token": value}
        )
        assert f"add_bos_token is {value}; only False is read" in refused(file)


NOT_PROVEN = [  # architecture, tokenizer.ggml.model, tokenizer.ggml.pre
    *((architecture, "gpt2", "smollm") for architecture in ("qwen2", "phi3", "rwkv7", "Llama")),
    *(("llama", model, "smollm") for model in ("llama", "t5", None)),
    *(("llama", "gpt2", pre) for pre in ("llama-bpe", "qwen2", "default", None)),
]


@pytest.mark.parametrize("architecture, model, pre", NOT_PROVEN)
def test_a_combination_that_is_not_proven(tensors, tmp_path, architecture, model, pre):
    changed = {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre}
    line = refused(write(tmp_path / "other.gguf", tensors, architecture, changed=changed))
    assert re.search(f" is ({architecture}|{model}|{pre}); only (llama|gpt2|smollm) is read", line)
    assert line.endswith("; give the model's own folder or its name on the hub")


KEYS = {  # keys that are refused: their values, and how
    "llama.rope.scaling.type": ("linear", "(linear) is not read"),
    "llama.rope.scaling.factor": (4.0, "(4.0) is not read"),
    "llama.rope.dimension_count": (HEAD // 2, "(8) is not read"),  # partial rotary
    "llama.attention.value_length": (8, "(8) is not read"),
    "llama.vocab_size": (9, "(9) is not read"),
    "llama.attention.sliding_window": (512, "(512) is not read"),
    "llama.attention.causal": (False, "(False) is not read"),
    "llama.attn_logit_softcapping": (50.0, "(50.0) is not read"),
    "llama.final_logit_softcapping": (30.0, "(30.0) is not read"),
    "llama.logit_scale": (0.5, "(0.5) is not read"),
    "llama.expert_count": (8, "(8) is not read"),
    "llama.rope.freq_base": (None, "is missing"),
    "tokenizer.ggml.add_space_prefix": (True, "(True) is not read"),
    "tokenizer.ggml.add_eos_token": (True, "(True) is not read"),
    "tokenizer.chat_template": (None, "is missing"),
    "tokenizer.ggml.merges": (None, "is missing"),
    "tokenizer.ggml.token_type": (None, "is missing"),
    "tokenizer.ggml.precompiled_charsmap": ([1, 2], "([1, 2]) is not read"),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_not_read(tensors, tmp_path, key):
    value, words = KEYS[key]
    line = refused(write(tmp_path / "key.gguf", tensors, changed={key: value}))
    assert f"its key {key} {words}" in line


def test_a_marker_that_is_typed_as_plain_text(tensors, tmp_path):
    pieces, _, added = vocabulary()
    types = [1] * len(pieces) + [3 if token in (BOS, EOS, PAD) else 1 for token in added]
    types += [5] * (ROWS - len(types))
    path = write(tmp_path / "typed.gguf", tensors, changed={"tokenizer.ggml.token_type": types})
    assert "its token '<|im_start|>' is typed as plain text, which no merge makes" in refused(path)


def test_weights_that_do_not_fit(tensors, tmp_path):
    less = {name: array for name, array in tensors.items() if "0.attn_q" not in name}
    line = refused(write(tmp_path / "less.gguf", less))
    assert "1 weights are missing, left over or of another shape, such as model.layers.0." in line
    other = {**tensors, "blk.0.attn_q.weight": np.ones((32, HIDDEN), np.float32)}
    line = refused(write(tmp_path / "other.gguf", other))
    assert "of another shape, such as model.layers.0.self_attn.q_proj.weight" in line
    for name in ("blk.0.attn_q.bias", "rope_freqs.weight", "cls.output.weight"):
        line = refused(write(tmp_path / "more.gguf", {**tensors, name: np.ones(9, np.float32)}))
        assert line.endswith("; give the model's own folder or its name on the hub"), line


def test_no_such_file(tmp_path):
    assert "no such folder or file; give" in refused(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="no such folder or file"):
        load_model("none.gguf")


def test_no_gguf_file(tmp_path):
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    assert "cannot be read as GGUF (" in refused(tmp_path / "page.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99])
def test_a_file_that_is_not_complete(file, tmp_path, share):
    whole = file.read_bytes()
    (tmp_path / "part.gguf").write_bytes(whole[: int(share * len(whole))])
    assert "may not be complete: download it again" in refused(tmp_path / "part.gguf")


def test_a_folder_of_gguf_files(file, tmp_path):
    shutil.copy(file, tmp_path / "a.gguf")
    assert "holds no config.json; give the folder or file of a model" in refused(tmp_path)


def test_without_the_package(tensors, tmp_path, monkeypatch):
    path = write(tmp_path / "lacking.gguf", tensors)
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    assert refused(path).endswith("; pip install gguf")


def test_a_cache_that_cannot_be_written(tensors, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(unpacking, "CACHE", tmp_path / "file" / "gram_mini")
    path = write(tmp_path / "other.gguf", tensors)
    with pytest.raises(UserError, match="cache in HF_HOME .*cannot be written to; give another"):
        load_judge(path)
