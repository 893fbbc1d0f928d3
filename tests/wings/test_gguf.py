"""A GGUF file as --model: the same figures as the same weights in a folder, and clear refusals."""

import json
import os
import shutil
import sys
from pathlib import Path

import score
import train_pretrain
import train_reward
from gram_mini.errors import UserError
from gram_mini.model import hidden_states
from gram_mini.runs import gguf as unpacking
from gram_mini.runs import run as runs_run
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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, KEY_VALUE_HEADS, HIDDEN, INNER = 2, 4, 2, 64, 128
KINDS = {"blk.0.ffn_down.weight": Type.Q8_0}  # the one tensor of the file that is not F32
IDS = torch.arange(40).view(2, 20) + 20
PAIR = ("What does Anna eat?", "Anna eats soup.", "Stop bothering me. Anna eats fish.")
SHORT = "--limit 60 --steps 2 --batch-size 8 --lora-rank 4 --lr 5e-3 --bits 32".split()
NAMES = {  # of a layer: in a folder, in GGUF
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


# ---- a tiny model, as a folder and as a file -----------------------------------------


def vocabulary() -> dict:
    """The village's tokenizer without the tokens that were added to it: 711 pieces of bytes."""
    tokenizer = json.loads((VILLAGE_FOLDER / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["special"]]
    return tokenizer


def weights(model) -> dict[str, np.ndarray]:
    """The weights of a Llama by their names in GGUF; llama.cpp turns pairs of a head's rows."""
    named = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part = rest.removesuffix(".weight")
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_VALUE_HEADS}.get(part)
            if heads:
                turned = array.reshape(heads, 2, len(array) // heads // 2, HIDDEN)
                array = turned.swapaxes(1, 2).reshape(array.shape)
            named[f"blk.{layer}.{NAMES[part]}.weight"] = array
    named["token_embd.weight"] = model.model.embed_tokens.weight.detach().numpy()
    named["output_norm.weight"] = model.model.norm.weight.detach().numpy()
    return named


def write(path, tensors, kinds=KINDS, architecture="llama", tokenizer="gpt2"):
    """Write a GGUF file; tensors that ``kinds`` does not name are F32."""
    pieces = vocabulary()["model"]
    w = gguf.GGUFWriter(path, architecture)
    w.add_name("tiny")
    w.add_block_count(LAYERS)
    w.add_context_length(2048)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KEY_VALUE_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_tokenizer_model(tokenizer)
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(sorted(pieces["vocab"], key=pieces["vocab"].get))
    w.add_token_types([3 if i < 4 else 1 for i in range(len(pieces["vocab"]))])  # 3: control
    w.add_token_merges([" ".join(pair) for pair in pieces["merges"]])
    w.add_eos_token_id(3)
    w.add_pad_token_id(0)
    w.add_chat_template((VILLAGE_FOLDER / "chat_template.jinja").read_text())
    for name, array in tensors.items():
        kind = kinds.get(name, Type.F32)
        w.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama as a folder, with one matrix rounded as the file has it."""
    folder = tmp_path_factory.mktemp("models") / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary()))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(VILLAGE_FOLDER / name, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=711, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS, rms_norm_eps=1e-5,
        initializer_range=0.2, tie_word_embeddings=True, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    down = model.model.layers[0].mlp.down_proj.weight
    blocks = gguf.quantize(down.detach().numpy(), Type.Q8_0)
    rounded = torch.from_numpy(gguf.dequantize(blocks, Type.Q8_0))
    assert (rounded - down).abs().max() > 1e-4
    down.data = rounded
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tensors(llama):
    return weights(LlamaForCausalLM.from_pretrained(llama))


@pytest.fixture(scope="module")
def file(llama, tensors):
    return write(llama.parent / "tiny.gguf", tensors)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpacking, "CACHE", tmp_path_factory.mktemp("cache") / "gram_mini")
        yield unpacking.CACHE


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(unpacking, "_said", set())


def matrices(tensors, kind) -> dict:
    """All matrices in one type, as ``kinds`` of write."""
    return {name: kind for name, array in tensors.items() if array.ndim == 2}


# ---- the same model ------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_states_and_scores_are_those_of_the_same_weights_in_a_folder(file, llama, bits):
    states = [hidden_states(load_model(str(path), bits), IDS) for path in (file, llama)]
    assert torch.equal(*states) and states[0].std() > 0.1
    here, there = (load_judge(path, bits).compare(*PAIR) for path in (file, llama))
    assert here == there and abs(here.log_odds_first) > 1e-3


def test_the_tokenizer_is_the_one_in_the_file(file, llama):
    here, there = (load_tokenizer(str(path)) for path in (file, llama))
    direct = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "<|user|>\nWhat does Anna eat?  Soup, naïve 😀<|end|>"
    ids = [tokenizer(text)["input_ids"] for tokenizer in (here, there, direct)]
    assert ids[0] == ids[1] == ids[2] and ids[0][0] == 1
    assert here.chat_template == there.chat_template and here.pad_token == there.pad_token


def test_a_file_is_unpacked_once_and_says_where(tensors, tmp_path, cache, monkeypatch, capsys):
    file = write(tmp_path / "once.gguf", tensors)
    load_model(str(file), 32)
    (folder,) = cache.glob("once-*")
    assert f"unpacked into {folder} (1 MB)" in capsys.readouterr().err
    monkeypatch.setattr(unpacking, "_unpack", None)  # a call would fail
    load_model(str(file), 32)
    assert capsys.readouterr().err == ""
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja"}
    assert not list(cache.glob("*.partial"))


def test_what_was_rounded_is_said_once_with_its_type(tensors, tmp_path, capsys):
    file = write(tmp_path / "small.gguf", tensors, matrices(tensors, Type.Q8_0))
    for _ in range(2):
        load_model(str(file), 4)
    line = f"{file}: its weights were rounded to Q8_0 in a GGUF file, and --bits 4 rounds them once"
    assert capsys.readouterr().err.count(line) == 1
    load_model(str(file), 32)
    assert "Q8_0 in a GGUF file\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_a_file_that_is_not_quantised_loses_nothing(tensors, tmp_path, capsys, kind):
    file = write(tmp_path / f"{kind.name}.gguf", tensors, matrices(tensors, kind))
    model = load_model(str(file), 32)
    assert "rounded" not in capsys.readouterr().err
    array = gguf.dequantize(gguf.quantize(tensors["token_embd.weight"], kind), kind)
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(array))
    assert (kind == Type.F32) == np.array_equal(array, tensors["token_embd.weight"])


# ---- runs ----------------------------------------------------------------------------


def test_both_stages_scores_and_export(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    model = ["--model", file.name]
    train_pretrain.main([*model, *SHORT, "--out", str(tmp_path / "one")])
    options = [*model, *SHORT, "--init", str(tmp_path / "one")]
    train_reward.main([*options, "--out", str(tmp_path / "two")])
    for run in ("one", "two"):
        record = json.loads((tmp_path / run / "run.json").read_text())
        assert record["backbone"] == {"name": str(file), "fingerprint": fingerprint(str(file))}

    monkeypatch.chdir(tmp_path)  # run.json has the whole path
    run = load_judge("two").compare(*PAIR)
    assert run.log_odds_first != load_judge(file, bits=32).compare(*PAIR).log_odds_first
    capsys.readouterr()
    score.main(["--model", "two", "--prompt", PAIR[0], "--response", "a", "--response", "b"])
    assert "P(A better) = " in capsys.readouterr().out

    export.main(["two", "exported", "--dtype", "float32"])
    names = {path.suffix for path in Path("exported").iterdir()}
    assert names == {".json", ".safetensors", ".jinja"}
    for path in (file, "two", "exported"):
        assert load_judge(path).batch_size == SCORED[1]  # its backbone is not the village's
    exported = load_judge("exported").compare(*PAIR)
    assert exported.log_odds_first == pytest.approx(run.log_odds_first, abs=1e-4)
    assert exported.log_odds_second == pytest.approx(run.log_odds_second, abs=1e-4)


def test_another_file_under_the_same_name_is_refused(file, tensors, tmp_path):
    own = tmp_path / "own.gguf"
    shutil.copy(file, own)
    train_reward.main(["--model", str(own), *SHORT, "--out", str(tmp_path / "run")])
    write(own, {**tensors, "output_norm.weight": tensors["output_norm.weight"] * 2})
    with pytest.raises(UserError, match="was trained on another version of the backbone"):
        load_judge(tmp_path / "run")
    with pytest.raises(UserError, match="was trained on the backbone .* give the same --model"):
        options = ["--init", str(tmp_path / "run"), "--out", str(tmp_path / "next")]
        train_reward.main(["--model", str(own), *SHORT, *options])


def test_a_name_that_is_a_link_is_kept(file, tmp_path):
    """As in the hub's cache, where the file that a link leads to has no suffix."""
    shutil.copy(file, tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "link.gguf")
    train_reward.main(["--model", f"{tmp_path}/link.gguf", *SHORT, "--out", f"{tmp_path}/run"])
    assert load_judge(tmp_path / "run").compare(*PAIR)


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_that_was_stopped_goes_on(file, tensors, tmp_path, monkeypatch, changed):
    own = tmp_path / "own.gguf"
    shutil.copy(file, own)
    options = ["--model", str(own), *SHORT, "--save-every", "1"]
    train_pretrain.main([*options, "--out", str(tmp_path / "whole")])
    real, calls = runs_run.sum_over_processes, []

    def sum_over_processes(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stopped in step 2")
        return real(*arguments)

    monkeypatch.setattr(runs_run, "sum_over_processes", sum_over_processes)
    with pytest.raises(RuntimeError, match="stopped in step 2"):
        train_pretrain.main([*options, "--out", str(tmp_path / "run")])
    again = [*options, "--out", str(tmp_path / "run"), "--resume"]
    if changed:
        write(own, {**tensors, "output_norm.weight": tensors["output_norm.weight"] * 2})
        with pytest.raises(UserError, match="backbone"):
            train_pretrain.main(again)
        return
    train_pretrain.main(again)
    adapters = [tmp_path / run / "adapter_model.safetensors" for run in ("run", "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


# ---- what cannot be used -------------------------------------------------------------


def refused(path) -> str:
    """The line that refuses it; nothing is left of it in the cache."""
    with pytest.raises(UserError) as error:
        load_judge(path)
    assert not [name for name in unpacking.CACHE.glob(f"{path.stem}-*")]
    line = str(error.value)
    assert "\n" not in line and line.startswith(str(path)) and "; " in line
    return line


def test_no_such_file(tmp_path):
    assert "no such file; give a GGUF file" in refused(tmp_path / "none.gguf")


def test_no_gguf_file(tmp_path):
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    assert "is no GGUF file" in refused(tmp_path / "page.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99])
def test_a_file_that_is_not_complete(file, tmp_path, share):
    whole = file.read_bytes()
    (tmp_path / "part.gguf").write_bytes(whole[: int(share * len(whole))])
    assert "may not be complete: download it again" in refused(tmp_path / "part.gguf")


def test_an_architecture_that_transformers_does_not_know(tensors, tmp_path):
    path = write(tmp_path / "rwkv.gguf", tensors, architecture="rwkv7")
    assert "makes no config of it: GGUF model with architecture rwkv7" in refused(path)


@pytest.mark.parametrize("architecture", ["t5", "bert"])
def test_an_architecture_that_is_no_decoder(tensors, tmp_path, architecture):
    assert "makes no " in refused(write(tmp_path / "x.gguf", tensors, architecture=architecture))


def test_a_tokenizer_that_cannot_be_built(tensors, tmp_path):
    path = write(tmp_path / "words.gguf", tensors, tokenizer="rwkv")
    assert "makes no tokenizer of it: Cannot build a tokenizer" in refused(path)


def test_a_weight_that_is_missing(tensors, tmp_path):
    path = write(tmp_path / "less.gguf", {k: v for k, v in tensors.items() if "0.attn_q" not in k})
    assert "layers.0.self_attn.q_proj.weight is missing" in refused(path)


def test_a_weight_that_transformers_would_leave_out(tensors, tmp_path):
    bias = {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}
    line = refused(write(tmp_path / "more.gguf", {**tensors, **bias}))
    total = sum(array.size for array in tensors.values())
    assert f"holds {total + HIDDEN:,} weights, and transformers makes a model of {total:,}" in line


def test_stretched_positions_that_transformers_does_not_read_are_said(tensors, tmp_path, capsys):
    factors = {"rope_freqs.weight": np.ones(HIDDEN // HEADS // 2, np.float32)}
    load_model(str(write(tmp_path / "long.gguf", {**tensors, **factors})), 32)
    assert "does not read rope_freqs.weight of a GGUF file" in capsys.readouterr().err


def test_a_part_of_a_split_file(file, tmp_path):
    part = tmp_path / "tiny-00001-of-00002.gguf"
    shutil.copy(file, part)
    assert "one part of a split GGUF file" in refused(part)


def test_a_folder_of_gguf_files(file, tmp_path):
    shutil.copy(file, tmp_path / "a.gguf")
    assert f"; give the GGUF file itself, such as {tmp_path / 'a.gguf'}" in refused(tmp_path)


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
