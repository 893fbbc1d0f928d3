"""Both stages and scoring on small models of real architectures, each with its own tokenizer."""

import json
from types import SimpleNamespace

import train_pretrain
import train_reward
from gram_mini import prompts
from gram_mini.batches import encode_pairs, join, judge_batch
from gram_mini.model import add_lora, hidden_states, output_logits
from gram_mini.pairs import Pair
from gram_mini.prompts import judge_prompt, label_tokens, pair_prompt
from gram_mini.runs.load import load_judge
from gram_mini.runs.models import load_model, load_tokenizer

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TEXTS = (prompts.JUDGE, "Anna eats soup.", " A", "Who?!! Why!!!", "a\n\nb")
SENTENCES = [
    prompts.JUDGE,
    *["Who?!! Why!!!"] * 9,
    "user assistant model system A B",
    "Anna eats soup. Bella eats fish, or so they say; who knows?",
]
PAIRS = [
    Pair(
        f"What does Anna eat, {i}?",
        "Anna eats soup. " * (1 + i % 3),
        "Fish, or cake?" * (1 + i % 4),
        0,
    )
    for i in range(12)
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: an empty thought before each answer, and after the generation prompt.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def byte_level(special, bos=None):
    """As Qwen and Llama 3: byte-level BPE; the tokenizer itself puts ``bos`` before every text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet),
    )
    if bos:
        raw.post_processor = TemplateProcessing(
            single=f"{bos} $0", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    return raw


def sentencepiece_like(special, bos=None):
    """As Gemma and Phi-3: BPE with bytes to fall back on, spaces written as a low line."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    held = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=600, special_tokens=[*held, *special])
    )
    if bos:
        raw.post_processor = TemplateProcessing(
            single=f"{bos} $0", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    return raw


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# As in Phi-3-mini, these tokens swallow the white space after them.
PHI = [
    "<s>",
    "<|endoftext|>",
    *(AddedToken(t, rstrip=True, special=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")),
]
GEMMA_3 = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]

SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16)

QWEN_TOKENS = dict(pad_token=QWEN[0], eos_token=QWEN[2])
LLAMA_TOKENS = dict(bos_token=LLAMA[0], eos_token=LLAMA[3])
GEMMA_TOKENS = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
PHI_TOKENS = dict(bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>")

# config class, model class, special options of the shape,
# raw tokenizer, its special tokens, chat template, padding side
CASES = {
    "qwen2": (
        Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=True),
        lambda: byte_level(QWEN), QWEN_TOKENS, CHATML, "left",
    ),
    "qwen3-thinking": (
        Qwen3Config, Qwen3ForCausalLM, dict(head_dim=32, tie_word_embeddings=False),
        lambda: byte_level(QWEN), QWEN_TOKENS, THINKING, "right",
    ),
    "llama-3-no-pad": (
        LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=True),
        lambda: byte_level(LLAMA, bos=LLAMA[0]), LLAMA_TOKENS, LLAMA_3, "left",
    ),
    "llama-base-bos": (
        LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=False),
        lambda: byte_level(LLAMA, bos=LLAMA[0]), LLAMA_TOKENS, None, "right",
    ),
    "llama-base-bare": (
        LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=False),
        lambda: byte_level([]), {}, None, "left",
    ),
    "gemma3": (
        Gemma3TextConfig, Gemma3ForCausalLM,
        dict(head_dim=16, final_logit_softcapping=2.0, **SLIDING),
        lambda: sentencepiece_like(GEMMA_3, bos="<bos>"), GEMMA_TOKENS, GEMMA, "left",
    ),
    "phi3": (
        Phi3Config, Phi3ForCausalLM, dict(tie_word_embeddings=False),
        lambda: sentencepiece_like(PHI), PHI_TOKENS, PHI_3, "left",
    ),
}  # fmt: skip
WITH_BOS = {"llama-3-no-pad", "llama-base-bos", "gemma3"}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model folder as it comes from the hub, and its tokenizer as this project loads it."""
    config, kind, special, raw, names, template, side = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw(), padding_side=side, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # As in many models of the hub, the matrices have more rows than the tokenizer has tokens.
    kind(config(**SHAPE | special, vocab_size=len(tokenizer) + 10)).save_pretrained(folder)
    return SimpleNamespace(
        name=request.param,
        folder=str(folder),
        tokenizer=load_tokenizer(str(folder)),
        own=tokenizer,
        side=side,
    )


@pytest.fixture(scope="module")
def runs(case, tmp_path_factory):
    """Two steps of each stage on a small file, with NF4 weights."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "pairs.jsonl"
    rows = [{"prompt": p.prompt, "chosen": p.response_a, "rejected": p.response_b} for p in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--steps 2 --batch-size 4 --lr 1e-2 --log-every 1".split()
    same = ["--model", case.folder, "--data", str(data), *options]
    pretrain, reward = str(folder / "pretrain"), str(folder / "reward")
    train_pretrain.main([*same, "--out", pretrain, "--lora-rank", "4"])
    train_reward.main([*same, "--out", reward, "--init", pretrain, "--held-out", "0.2"])
    return folder


def rendered(tokenizer, pair):
    """The judge prompt as text, by transformers' own rendering."""
    content = prompts.JUDGE.format(
        prompt=pair.prompt, response_a=pair.response_a.strip(), response_b=pair.response_b.strip()
    )
    if tokenizer.chat_template is None:
        return content
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


# ---- prompts and tokens --------------------------------------------------------------


def test_the_tokenizer_comes_back_as_it_was_saved(case):
    for text in TEXTS:
        assert case.tokenizer(text)["input_ids"] == case.own(text)["input_ids"]
    assert case.tokenizer.padding_side == case.side
    assert (case.tokenizer.pad_token_id is None) == (case.name == "llama-base-bare")
    assert len(case.tokenizer) == len(case.own)


def test_label_tokens_are_those_of_the_whole_rendered_prompt(case):
    for label, token in zip(prompts.LABELS, label_tokens(case.tokenizer)):
        written = label if case.tokenizer.chat_template else " " + label
        prompt = rendered(case.tokenizer, PAIRS[0])
        whole, before = (
            case.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt + written, prompt)
        )
        assert whole == [*before, token]
        assert case.tokenizer.decode([token]).strip() == label


def test_the_judge_prompt_is_the_rendered_one(case):
    pieces = judge_prompt(case.tokenizer)
    row = encode_pairs([PAIRS[0]], pieces, case.tokenizer, 2000)[0]
    ids = join(pieces, row)
    bos = [case.tokenizer.bos_token_id] if case.name in WITH_BOS else []
    text = rendered(case.tokenizer, PAIRS[0])
    expected = case.tokenizer(text, add_special_tokens=False)["input_ids"]
    if expected[: len(bos)] != bos:  # without a template nothing has written it
        expected = [*bos, *expected]
    assert case.tokenizer.decode(ids) == case.tokenizer.decode(expected)
    assert ids[:3] == expected[:3] and ids[-3:] == expected[-3:]


def test_one_bos_or_none(case):
    for make in (judge_prompt, pair_prompt):
        start = make(case.tokenizer).start
        assert start.count(case.tokenizer.bos_token_id) == (case.name in WITH_BOS)
        assert case.name not in WITH_BOS or start[0] == case.tokenizer.bos_token_id


def test_thinking_is_switched_off(case):
    end = case.tokenizer.decode(judge_prompt(case.tokenizer).end)
    assert end.endswith("<think>\n\n</think>\n\n") == ("thinking" in case.name)


# ---- the model -----------------------------------------------------------------------


def test_every_linear_layer_is_nf4_but_the_output_matrix(case, monkeypatch):
    model = load_model(case.folder, bits=4)
    head = model.get_output_embeddings()
    linear = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    }
    assert len(linear) == 2 * (4 if case.name == "phi3" else 7)  # Phi-3 has fused projections
    assert all(
        type(m).__name__ == "Linear4bit" and m.weight.quant_state.nested for m in linear.values()
    )
    # float32 is the compute type of a CPU that is not fast in bf16
    assert type(head) is torch.nn.Linear and head.weight.dtype == torch.float32
    adapted = add_lora(model, 4)
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(linear) and all("lora_" in name for name in trainable)
    assert {p.dtype for p in load_model(case.folder, bits=16).parameters()} == {torch.float32}
    monkeypatch.setattr("gram_mini.runs.models.fast_bfloat16", lambda: True)
    for bits in (4, 16):
        half = load_model(case.folder, bits)
        assert {p.dtype for p in half.parameters()} <= {torch.bfloat16, torch.uint8}
        assert half.config._attn_implementation == "eager"


@torch.no_grad()
def test_output_logits_are_the_models_own(case):
    model = load_model(case.folder, bits=32).eval()
    ids = torch.arange(60).view(2, 30)
    expected = AutoModelForCausalLM.from_pretrained(case.folder).eval()(input_ids=ids).logits
    hidden = hidden_states(model, ids)
    assert expected.std() > 0.05
    assert torch.allclose(output_logits(model, hidden), expected, atol=1e-5)
    assert torch.allclose(output_logits(model, hidden, (5, 7)), expected[..., [5, 7]], atol=1e-5)
    if case.name == "gemma3":
        assert expected.abs().max() < 2  # capped


def test_gradient_after_an_evaluation_equals_that_of_the_dequantised_twin(case, monkeypatch):
    # as on the CPUs where bitsandbytes repacks the weights
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    ids = torch.arange(60).view(2, 30)
    gradients = []
    for twin in (False, True):
        model = load_model(case.folder, bits=4)
        assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
        model = add_lora(model.dequantize() if twin else model, 4)
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        with torch.no_grad():
            hidden_states(model.eval(), ids)
        hidden = hidden_states(model.train(), ids)[:, -1]
        output_logits(model, hidden, (5, 7)).diff().sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        )
    assert gradients[0].norm() > 1e-3
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5 * gradients[0].abs().max().item())


# ---- both stages, and scoring --------------------------------------------------------


def test_both_stages_run_and_the_run_scores_as_its_model(case, runs):
    judge = load_judge(str(runs / "reward"), merge=False)
    for text in TEXTS:
        assert judge.tokenizer(text)["input_ids"] == case.own(text)["input_ids"]
    assert judge.labels == label_tokens(case.tokenizer)
    record = json.loads((runs / "reward" / "run.json").read_text())
    assert list(record["labels"].values()) == list(judge.labels)
    with judge.model.disable_adapter():
        plain = judge.compare_many(PAIRS)
    trained = judge.compare_many(PAIRS)
    assert max(abs(a.probability - b.probability) for a, b in zip(plain, trained)) > 1e-3
    # By the shortest way: full logits of one unpadded sequence
    row = encode_pairs([PAIRS[0]], judge.prompt, judge.tokenizer, judge.max_length)[0]
    ids = join(judge.prompt, row)
    with torch.no_grad():
        logits = judge.model.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
    expected = logits[list(judge.labels)].softmax(dim=0)[0].item()
    assert expected == pytest.approx(trained[0].a_first, abs=1e-5)
    merged = load_judge(str(runs / "reward"))  # the default on a CPU
    assert not hasattr(merged.model, "peft_config")
    for after, before in zip(merged.compare_many(PAIRS), trained):
        assert after.log_odds_first == pytest.approx(before.log_odds_first, abs=2e-5)


def test_scores_depend_neither_on_the_padding_side_nor_on_the_batch(runs):
    judge = load_judge(str(runs / "reward"))
    together, mass, _ = judge.log_odds(judge.encode(PAIRS))
    # so there is padding
    assert together.std() > 1e-3 and len({len(row) for row in judge_rows(judge)}) > 1
    judge.tokenizer.padding_side = "left" if judge.tokenizer.padding_side == "right" else "right"
    assert torch.equal(judge.log_odds(judge.encode(PAIRS))[0], together)
    judge.batch_size = 1
    alone, alone_mass, _ = judge.log_odds(judge.encode(PAIRS))
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.allclose(alone_mass, mass, atol=1e-5)


def judge_rows(judge):
    rows = encode_pairs(PAIRS, judge.prompt, judge.tokenizer, judge.max_length)
    ids, ends, _ = judge_batch(rows, judge.prompt)
    return [row[: last + 1] for row, last in zip(ids, ends)]
