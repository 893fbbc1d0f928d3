"""NF4 + LoRA on the CPU: gradients, what is saved, which logits are computed."""

from gram_mini.errors import UserError
from gram_mini.model import add_lora, hidden_states
from gram_mini.runs import models
from gram_mini.runs.folder import save_adapter
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import (
    VILLAGE_FOLDER,
    checkpoint_gradients,
    compute_dtype,
    load_lora,
    load_model,
    load_tokenizer,
)
from gram_mini.runs.processes import pick_device
from gram_mini.runs.record import fingerprint, read_record
from gram_mini.village import VILLAGE

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

FAST = models.fast_bfloat16  # conftest.py replaces it
IDS = torch.arange(40).view(2, 20) + 20


def lora_gradient(model):
    """Gradient of every LoRA weight for one fixed loss, flattened."""
    model.train()
    model.zero_grad()
    hidden_states(model, IDS).pow(2).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def perturb(model):
    """LoRA starts as zero; give it weights, so that every factor has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_gradient_after_an_evaluation_equals_that_of_the_dequantised_twin(monkeypatch):
    # as on the CPUs where bitsandbytes repacks the weights
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_model(VILLAGE, bits=4)
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
    model = add_lora(model, 8)
    perturb(model)
    before = lora_gradient(model)
    model.eval()
    with torch.no_grad():
        # here bitsandbytes would repack the weights
        hidden_states(model, IDS)
    after = lora_gradient(model)
    assert torch.equal(before, after)
    twin = add_lora(load_model(VILLAGE, bits=4).dequantize(), 8)
    perturb(twin)
    assert torch.allclose(after, lora_gradient(twin), rtol=1e-3, atol=1e-5)
    assert after.norm() > 1e-3


def test_nf4_is_nf4_and_embeddings_are_left_alone(nf4_model):
    kinds = {type(m).__name__ for m in nf4_model.modules()}
    assert "Linear4bit" in kinds
    layer = nf4_model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert type(nf4_model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("fast", [True, False])
def test_what_is_computed_in(fast, monkeypatch):
    monkeypatch.setattr("gram_mini.runs.models.fast_bfloat16", lambda: fast)
    cpu, other = torch.device("cpu"), torch.bfloat16 if fast else torch.float32
    assert compute_dtype(32, cpu, "any") == torch.float32
    assert compute_dtype(16, cpu, "any") == compute_dtype(4, cpu, "any") == other
    # the village's figures are compared across machines
    assert compute_dtype(4, cpu, VILLAGE) == torch.float32
    model = load_model(VILLAGE, bits=16)
    assert model.get_input_embeddings().weight.dtype == other
    assert (model.config._attn_implementation == "eager") == fast
    # only the backward pass of torch's attention is slow
    assert load_judge(VILLAGE, bits=16).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("capability", "has", "fast"),
    [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False)],
)
def test_a_cpu_is_fast_in_bf16_only_with_instructions_for_it(capability, has, fast, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert FAST() == fast


def test_a_step_in_bf16_is_that_of_float32_within_its_rounding(monkeypatch):
    def gradient():
        torch.manual_seed(0)
        model = add_lora(load_model(VILLAGE, bits=16), 8)
        perturb(model)
        return lora_gradient(model)

    exact = gradient()
    monkeypatch.setattr("gram_mini.runs.models.fast_bfloat16", lambda: True)
    rounded = gradient()
    assert F.cosine_similarity(rounded, exact, dim=0) > 0.99 and not torch.equal(rounded, exact)


def saved_bytes(model):
    """Bytes that autograd keeps for the backward pass, each storage counted once, no weights."""
    storages, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model.train(), IDS)
    return sum(storages.values())


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient():
    plain, frugal = (load_model(VILLAGE, bits=4) for _ in range(2))
    checkpoint_gradients(frugal)
    plain, frugal = add_lora(plain, 8), add_lora(frugal, 8)
    for model in (plain, frugal):
        perturb(model)
    assert torch.allclose(lora_gradient(plain), lora_gradient(frugal), rtol=1e-5, atol=1e-8)
    assert saved_bytes(frugal) < saved_bytes(plain) / 4


def test_only_the_adapter_is_trainable_and_it_sits_on_every_linear_layer(nf4_model):
    model = add_lora(nf4_model, 8)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    layers = model.config.num_hidden_layers
    assert len(names) == 2 * 7 * layers and all("lora_" in n for n in names)


def test_adapter_comes_back_from_safetensors(nf4_model, tokenizer, tmp_path):
    model = add_lora(nf4_model, 8)
    perturb(model)
    expected = hidden_states(model.eval(), IDS)
    save_adapter(model, tokenizer, VILLAGE, tmp_path)
    assert {f.suffix for f in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    again = load_lora(load_model(VILLAGE), tmp_path, trainable=False).eval()
    assert isinstance(again, PeftModel) and torch.equal(hidden_states(again, IDS), expected)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


def test_fingerprint_tells_backbones_apart(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    ).save_pretrained(tmp_path)
    assert fingerprint(str(tmp_path)) not in ("", fingerprint(VILLAGE))
    assert fingerprint(VILLAGE) == fingerprint(VILLAGE)


def test_fingerprint_sees_a_change_deep_inside_the_weights(tmp_path):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=50_000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(tmp_path / "a")
    model.model.layers[0].mlp.up_proj.weight.data += 1
    model.save_pretrained(tmp_path / "b")
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))


def test_broken_weights_are_one_clear_line(tmp_path):
    for file in VILLAGE_FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "[]", "{oops"])
def test_broken_run_json(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json"):
        read_record(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "runs/nowhere", "/nowhere/at/all"])
def test_missing_folder(name):
    with pytest.raises(UserError, match="no such folder"):
        load_model(name)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load_model(str(tmp_path))


def test_name_that_the_hub_does_not_give():
    with pytest.raises(UserError, match="'nobody/nothing' cannot be loaded") as error:
        load_model("nobody/nothing")
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path), bits=32)


def test_unknown_device():
    with pytest.raises(UserError, match="--device abacus"):
        pick_device("abacus")
