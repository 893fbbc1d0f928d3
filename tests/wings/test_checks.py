"""A model computes what we take it to compute, or is refused in one line."""

import json
import shutil
from pathlib import Path

import score
import train_pretrain
import train_reward
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.model import CAPS, add_lora, hidden_states, output_logits
from gram_mini.pairs import Pair
from gram_mini.runs import models, sharing
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import load_model, load_tokenizer
from gram_mini.runs.ranking import rank

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CTRLTokenizer,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

ROOT = Path(__file__).parents[2]
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
PAIR = ("What does Anna eat?", "Anna eats soup.", "Anna eats fish.")
ONE_PAIR = ["--prompt", PAIR[0], "--response", PAIR[1], "--response", PAIR[2]]
SHORT = "--limit 40 --steps 2 --lora-rank 2 --batch-size 8 --held-out 0".split()
MIXTRAL = dict(num_local_experts=4, num_key_value_heads=2)
MPT = dict(d_model=64, n_heads=4, n_layers=2)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
FALCON_H1 = dict(
    num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
    mamba_n_groups=1, lm_head_multiplier=0.05,
)  # fmt: skip


def model_folder(folder, kind, **options):
    """A small model of an architecture, with the village's tokenizer."""
    tokenizer = load_tokenizer("village")
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SIZES, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


# ---- our logits are the model's own ----------------------------------------------------


@torch.no_grad()
def test_the_scale_of_a_head_is_read(tmp_path):
    folder = model_folder(tmp_path / "m", "falcon_h1", **FALCON_H1)
    model, ids = load_model(folder, 32), torch.arange(30)[None]
    own = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
    hidden = hidden_states(model, ids)
    assert torch.allclose(output_logits(model, hidden), own, atol=1e-5)
    assert torch.allclose(output_logits(model, hidden, (5, 7)), own[..., [5, 7]], atol=1e-5)


def test_a_model_with_a_head_of_its_own_kind_is_refused(tmp_path):
    """ModernBERT puts a layer and a norm between the last hidden states and the output matrix."""
    folder = model_folder(tmp_path / "m", "modernbert-decoder", **IDS)
    with pytest.raises(UserError, match="makes its logits in a way that we do not know"):
        load_model(folder, 32)


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    folder = model_folder(tmp_path / "m", "bert", is_decoder=False)
    with pytest.raises(UserError, match="is no causal language model"):
        load_model(folder, 32)


def test_shared_beginnings_that_are_ignored_are_noticed(llama, monkeypatch):
    """An argument that the decoder does not know takes the cache, which so is lost."""
    monkeypatch.setattr(sharing, "cache_argument", lambda model: "unknown_argument")
    model = load_model(llama, 32)
    assert not model.sharing_is_exact and not sharing.can_share(model)
    monkeypatch.undo()
    assert sharing.can_share(load_model(llama, 32))


def test_no_architecture_warns_of_how_its_cache_is_passed(llama, recwarn):
    judge = Judge(load_model(llama, 32), load_tokenizer(llama))
    rank(judge, PAIR[0] * 20, ["a", "b", "c", "d"])
    assert not [w for w in recwarn if "past_key_values" in str(w.message)]


def test_a_model_that_rewrites_its_weights_is_refused(tmp_path):
    """RWKV divides its weights for evaluation and multiplies them back, which NF4 cannot."""
    folder = model_folder(tmp_path / "m", "rwkv", attention_hidden_size=64)
    with pytest.raises(UserError, match="between training and evaluation change what it"):
        load_model(folder, 4)
    load_model(folder, 16)


def test_a_tokenizer_is_the_one_of_its_file(copy):
    """SmolLM2 names GPT2Tokenizer, which transformers 5 builds anew, without the single digits."""
    file = copy / "tokenizer.json"
    raw = Tokenizer.from_file(str(file))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), raw.pre_tokenizer
    raw.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    raw.save(str(file))
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    text = "On line 1234:\n\n1. soup"
    expected = raw.encode(text, add_special_tokens=False).ids
    assert load_tokenizer(str(copy))(text, add_special_tokens=False)["input_ids"] == expected


# ---- the loader's warnings are errors --------------------------------------------------


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("edit", "message"), [
    (lambda w: w.pop(KEY), f"1 weights are missing, .*, such as {KEY}; download"),
    (lambda w: w.update(extra=torch.zeros(3)), "1 weights are .*, left over .*, such as extra;"),
    (lambda w: w.update({KEY: torch.zeros(3, 3)}), f"of another shape, such as {KEY}"),
])  # fmt: skip
def test_weights_that_do_not_fit_end_in_one_line(copy, edit, message):
    edit_weights(copy, edit)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(copy), 32)
    assert "\n" not in str(error.value)


def test_an_adapter_of_other_names_is_refused(llama, tmp_path):
    run = tmp_path / "run"
    train_reward.main(["--model", llama, "--bits", "32", "--out", str(run), *SHORT])
    file = run / "adapter_model.safetensors"
    weights = load_file(file)
    renamed = {name.replace(".layers.0.", ".blocks.0."): w for name, w in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its adapter is of another model.*do not match, such as"):
        load_judge(run)
    save_file(dict(list(weights.items())[1:]), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights do not match, such as .*; run.json names"):
        load_judge(run)


@pytest.mark.parametrize("name", CAPS)
def test_a_cap_of_the_logits_is_read_under_each_of_its_names(llama, name):
    model = load_model(llama, 32)
    hidden = torch.randn(3, 64) * 50
    plain = output_logits(model, hidden)
    setattr(model.config, name, 5.0)
    assert plain.abs().max() > 5 > output_logits(model, hidden).abs().max()
    torch.testing.assert_close(output_logits(model, hidden), torch.tanh(plain / 5) * 5)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_in_a_model_folder_is_not_dropped(copy, beside):
    model = add_lora(LlamaForCausalLM.from_pretrained(copy), 2)
    model.save_pretrained(copy)
    if not beside:
        (copy / "model.safetensors").unlink()
        (copy / "config.json").unlink()
    with pytest.raises(UserError, match="holds an adapter and no run.json .*; merge it"):
        load_model(str(copy), 32)


# ---- quantisation is what it says ------------------------------------------------------


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("gpt2", dict(n_embd=64, n_layer=2, n_head=4), r"\(Conv1D\) come back transposed"),
    ("falcon", {}, "none of its layers can be put into 4 bits; give --bits 16"),
])  # fmt: skip
def test_what_cannot_be_in_four_bits_is_refused_before_training(tmp_path, kind, options, message):
    folder = model_folder(tmp_path / "m", kind, **options)
    with pytest.raises(UserError, match=message):
        load_model(folder, 4)
    load_model(folder, 16)


def test_the_share_in_four_bits_is_said_where_it_is_not_nearly_all(llama, tmp_path, capsys):
    load_model(llama, 4)
    assert "are in 4 bits" not in capsys.readouterr().err
    load_model(model_folder(tmp_path / "m", "mixtral", **MIXTRAL), 4)
    assert "% of the weights of its layers are in 4 bits" in capsys.readouterr().err


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_without_bf16_is_told_that_four_bits_are_slow(monkeypatch, capsys, has):
    """No weights are loaded here."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", None)
    for bits in (4, 16, 32):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_model("village", bits, "cuda")
        assert (models.NO_BFLOAT16 in capsys.readouterr().err) == (bits == 4 and not has)


def test_a_checkpoint_that_is_stored_in_few_bits_is_refused(llama, copy, tmp_path):
    load_model(llama, 4).save_pretrained(tmp_path / "nf4")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    for folder in (tmp_path / "nf4", copy):
        with pytest.raises(UserError, match="is stored in few bits, .*; give the model as it was"):
            load_model(str(folder), 4)


# ---- a score depends on the pair alone -------------------------------------------------


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A model whose positions are scaled by the longest row beyond 120 tokens."""
    folder = tmp_path_factory.mktemp("longrope")
    tokenizer = load_tokenizer("village")
    factors = dict(short_factor=[1.0] * 8, long_factor=[4.0] * 8)
    rope = dict(rope_type="longrope", rope_theta=10000.0, **factors)
    torch.manual_seed(0)
    config = Phi3Config(
        **SIZES, vocab_size=len(tokenizer), pad_token_id=0, rope_parameters=rope,
        original_max_position_embeddings=120, max_position_embeddings=480, initializer_range=0.2,
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A model with dynamic NTK beyond 120 tokens."""
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    options = dict(max_position_embeddings=120, rope_parameters=rope, initializer_range=0.2)
    return model_folder(tmp_path_factory.mktemp("dynamic"), "llama", **options)


@pytest.fixture(scope="module")
def dynamic_by_layer(tmp_path_factory):
    """The same with dynamic NTK in one kind of layer only."""
    rope = dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)
    plain = dict(rope_type="default", rope_theta=10000.0)
    options = dict(
        max_position_embeddings=120,
        rope_parameters=dict(full_attention=rope, sliding_attention=plain),
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    return model_folder(tmp_path_factory.mktemp("layers"), "gemma3_text", **options)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "dynamic_by_layer"])
def test_a_max_length_beyond_the_switch_of_the_positions_is_refused(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    with pytest.raises(UserError, match="--max-length is 121; give --max-length 120 or less"):
        load_judge(folder, bits=32, max_length=121)
    out = ["--out", str(tmp_path / "run"), "--max-length", "121"]
    with pytest.raises(UserError, match="--max-length is 121; give --max-length 120 or less"):
        train_reward.main(["--model", folder, "--bits", "32", *SHORT, *out])
    assert load_judge(folder, bits=32, max_length=120)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "dynamic_by_layer"])
def test_up_to_the_switch_no_other_pair_changes_a_score(kind, request):
    judge = load_judge(request.getfixturevalue(kind), bits=32, max_length=120)
    short, long = Pair(*PAIR), Pair("Who? " * 30, "Anna " * 40, "Bella " * 50)
    assert judge.encode([long])[0].truncated
    alone, together = judge.compare_many([short]), judge.compare_many([short, long, short])
    later = judge.compare_many([short])
    for other in (together[0], together[2], later[0]):
        assert other.log_odds_first == pytest.approx(alone[0].log_odds_first, abs=1e-4)
        assert other.log_odds_second == pytest.approx(alone[0].log_odds_second, abs=1e-4)


# ---- limits known beforehand -----------------------------------------------------------


def test_positions_that_end_too_early_are_told_before_any_work(tmp_path, capsys):
    options = dict(ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=128)
    folder = model_folder(tmp_path / "opt", "opt", **options)
    message = "has 128 positions and --max-length is 1024; give --max-length 128 or less"
    for script in (train_pretrain, train_reward):
        with pytest.raises(UserError, match=message):
            script.main(["--model", folder, "--out", str(tmp_path / "run"), *SHORT])
    with pytest.raises(UserError, match=message):
        score.main(["--model", folder, *ONE_PAIR])
    load_judge(folder, max_length=128).compare(*PAIR)


def test_a_rotary_model_is_not_asked_beyond_its_positions(tmp_path):
    folder = model_folder(tmp_path / "m", "llama", max_position_embeddings=256)
    with pytest.raises(UserError, match="has 256 positions and --max-length is 257; give"):
        load_judge(folder, max_length=257)
    assert load_judge(folder, max_length=256)


def test_a_run_whose_tokenizer_has_no_tokenizer_json_is_scored(tmp_path):
    letters = {c + end: 0 for c in map(chr, range(33, 127)) for end in ("", "@@")} | {"<unk>": 0}
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\n")
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    tokenizer = CTRLTokenizer(*files, unk_token="<unk>", pad_token="<unk>")
    folder, run = (
        model_folder(tmp_path / "m", "llama", max_position_embeddings=2048),
        tmp_path / "r",
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (Path(folder) / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    train_reward.main(["--model", folder, "--bits", "32", "--out", str(run), *SHORT])
    assert not (run / "tokenizer.json").is_file()
    assert 0 < load_judge(run).compare(*PAIR).probability < 1


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_one_line(tmp_path):
    folder = model_folder(tmp_path / "m", "llama")
    tokenizer = load_tokenizer("village")
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="tokenizer has 720 tokens and its embedding 718 rows"):
        load_judge(folder)


# ---- not a number is no verdict --------------------------------------------------------


def break_weights(weights):
    weights[KEY][3] = float("nan")


def test_scoring_stops_at_what_is_not_a_number_and_writes_nothing(copy, tmp_path):
    edit_weights(copy, break_weights)
    (tmp_path / "d.jsonl").write_text(json.dumps(dict(zip(("prompt", "chosen", "rejected"), PAIR))))
    out = tmp_path / "scores.jsonl"
    for options in (ONE_PAIR, ["--data", str(tmp_path / "d.jsonl"), "--out", str(out)]):
        with pytest.raises(UserError, match="its logits are no numbers; its weights"):
            score.main(["--model", str(copy), *options])
    assert not list(tmp_path.glob("scores*"))


def test_not_a_number_names_its_row(village_judge, monkeypatch):
    pairs = [Pair("x", "y", "z", row=4), Pair("x", "y " * 5, "z", row=9)]
    real = village_judge.label_logits
    monkeypatch.setattr(
        village_judge, "label_logits", lambda v: real(v) * float("nan") if len(v) else real(v)
    )
    with pytest.raises(UserError, match="row 4 and 1 more: the judge gives log-odds of"):
        village_judge.compare_many(pairs)
    with pytest.raises(UserError, match="which are no numbers"):
        rank(village_judge, "x", ["y", "z", "w"])


# ---- errors of a model's own code ------------------------------------------------------


def test_a_model_folder_can_be_the_current_one(llama, monkeypatch, capsys):
    monkeypatch.chdir(llama)
    score.main(["--model", ".", "--bits", "32", *ONE_PAIR])
    assert "P(A better)" in capsys.readouterr().out


def test_an_error_of_the_models_code_is_one_line_and_gram_debug_shows_the_whole(
    tmp_path, monkeypatch, capsys
):
    folder = model_folder(tmp_path / "m", "phimoe", num_local_experts=4, num_key_value_heads=2)
    with pytest.raises(UserError, match=f"{folder}: its own code fails: ") as error:
        add_lora(load_model(folder, 32), 2)
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    arguments = ["--model", str(tmp_path / "empty"), *ONE_PAIR]
    with pytest.raises(SystemExit, match="2"), clear_errors():
        score.main(arguments)
    assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setenv("GRAM_DEBUG", "1")
    with pytest.raises(UserError), clear_errors():
        score.main(arguments)


def test_lora_that_cannot_be_put_on_is_one_line(tmp_path):
    folder = model_folder(tmp_path / "m", "falcon_h1", **FALCON_H1)
    with pytest.raises(UserError, match="LoRA cannot be put on it: "):
        add_lora(load_model(folder, 32), 2)


def test_rows_that_are_no_whole_blocks_are_refused_in_four_bits(tmp_path):
    """bitsandbytes reads them back with the scales of other blocks on some CPUs."""
    folder = model_folder(tmp_path / "m", "llama", hidden_size=96)
    with pytest.raises(UserError, match="has rows of 96 weights, .* of 64, .*; give --bits 16"):
        load_model(folder, 4)
    load_model(folder, 16)


# ---- the swap test ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [
    ("llama", {}), ("opt", dict(ffn_dim=64, word_embed_proj_dim=64)), ("gpt_neox", {}),
    ("gemma2", dict(head_dim=16, final_logit_softcapping=2.0)), ("mpt", MPT),
    ("falcon_h1", FALCON_H1), ("mamba", {}), ("bloom", {}), ("mixtral", MIXTRAL),
])  # fmt: skip
def test_exchanging_the_responses_gives_one_minus_p(tmp_path, kind, options):
    judge = load_judge(model_folder(tmp_path / "m", kind, **options), bits=32)
    there = judge.compare(PAIR[0], PAIR[1], PAIR[2]).probability
    back = judge.compare(PAIR[0], PAIR[2], PAIR[1]).probability
    assert there == pytest.approx(1 - back, abs=1e-5)
