"""Prompts rendered through chat templates, and the label tokens that follow them."""

import copy

from gram_mini import prompts
from gram_mini.chat import encode, encode_texts
from gram_mini.errors import UserError
from gram_mini.prompts import fill, judge_prompt, label_tokens, pair_prompt
from gram_mini.reading.template import read_template

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: an empty thought stands before each answer.
THINKING = CHATML.replace(
    "{{ m.role }}\n", "{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
).replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
# As Mistral does: a space before the assistant's text.
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML


def with_template(tokenizer, template, **changes):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def whole(tokenizer, pieces, texts=("x", "y", "z")):
    ids = []
    parts = (pieces.start, pieces.after_prompt, pieces.between, pieces.end)
    for piece, text in zip(parts, (*texts, None)):
        ids += piece + ([] if text is None else encode(tokenizer, text))
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "label"),
    [(CHATML, "A"), (THINKING, "A"), (SPACED, "ĠA"), (None, "A"), (WITH_BOS, "A")],
)
def test_label_token_is_read_off_the_template(tokenizer, template, label):
    # Without a template the text goes on with " A", but the markers of the village's tokenizer take
    # the white space with them.
    changed = with_template(tokenizer, template)
    assert changed.convert_ids_to_tokens(label_tokens(changed)[0]) == label


def test_thinking_is_switched_off(tokenizer):
    text = whole(tokenizer, judge_prompt(with_template(tokenizer, THINKING)))
    assert text.endswith("<think></think>")


@pytest.mark.parametrize("name", ["think", "thought"])
@pytest.mark.parametrize("closed", [True, False], ids=["Qwen3-Thinking", "R1"])
def test_no_verdict_stands_in_a_thought_that_the_template_begins(tokenizer, name, closed):
    """The generation prompt opens a thought, answers stand after it or have none."""
    answer = f"<{name}>\n\n</{name}>\n\n" if closed else ""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}ANSWER{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant><NAME>\n{% endif %}"
    )
    template = template.replace("ANSWER", answer).replace("NAME", name)
    changed = with_template(tokenizer, template)
    assert whole(changed, judge_prompt(changed)).endswith("<assistant>" + answer)
    assert whole(changed, pair_prompt(changed)).count("<assistant>" + answer) == 1
    assert changed.convert_ids_to_tokens(label_tokens(changed)) == ["A", "B"]


def test_what_stands_before_each_answer_is_written(tokenizer):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<final>{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    changed = with_template(tokenizer, template)
    assert whole(changed, judge_prompt(changed)).endswith("<assistant><final>")
    assert changed.convert_ids_to_tokens(label_tokens(changed)) == ["A", "B"]


def test_no_double_bos(tokenizer):
    pad = tokenizer.pad_token
    changed = with_template(tokenizer, WITH_BOS, bos_token=pad)
    for make in (judge_prompt, pair_prompt):
        ids = make(changed).start
        assert ids[0] == changed.bos_token_id and ids[1] != changed.bos_token_id


def test_bos_where_the_tokenizer_itself_would_begin_with_it(tokenizer):
    from tokenizers.processors import TemplateProcessing

    changed = with_template(tokenizer, None, bos_token=tokenizer.pad_token)
    bos = changed.bos_token_id
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{changed.bos_token} $0", special_tokens=[(changed.bos_token, bos)]
    )
    assert changed("x")["input_ids"][0] == bos
    ids = judge_prompt(changed).start
    assert ids[0] == bos and ids[1] != bos


@pytest.mark.parametrize("template", [CHATML, SPACED, None, "village"])
def test_prompts_hold_all_three_texts_in_order(tokenizer, template):
    changed = tokenizer if template == "village" else with_template(tokenizer, template)
    judge, pair = (
        whole(changed, make(changed), ("Anna eats soup", "blue", "green"))
        for make in (judge_prompt, pair_prompt)
    )
    for text in (judge, pair):
        a, b = (prompts.START_A, "blue", prompts.END_A), (prompts.START_B, "green", prompts.END_B)
        places = [text.index(word) for word in ("[User Question]", "Anna eats soup", *a, *b)]
        assert places == sorted(places)
    assert prompts.VILLAGE_INSTRUCTION in judge and prompts.INSTRUCTION not in pair
    assert pair.endswith(prompts.END_B)


def test_stage_1_trains_on_the_markers_but_not_on_the_users_turn(tokenizer):
    pieces = pair_prompt(tokenizer)
    assert tokenizer.decode(pieces.after_prompt[: pieces.ignored]) == "<|end|><|assistant|>"
    assert tokenizer.decode(pieces.after_prompt[pieces.ignored :]) == prompts.START_A


def bpe(tokens, merges=()):
    vocabulary = {token: i for i, token in enumerate(["[UNK]", *tokens])}
    raw = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


TWO_TEXTS = "{prompt}x{response_a}x{response_b}x:"


def test_a_label_that_melts_into_the_text_before_it_is_an_error():
    melting = bpe(["A", "B", "x", ":", " ", ": ", ": A"], [(":", " "), (": ", "A")])
    with pytest.raises(UserError, match=r"'A' is not one token .* ends it with \['x', ': A'\]"):
        label_tokens(melting, TWO_TEXTS)


def test_what_stands_before_the_label_is_as_the_tokenizer_splits_it_there():
    """A space of its own before the label belongs to the prompt, and so does a split line break."""
    spaced = bpe(["A", "B", "x", ":", " "])
    assert spaced.convert_ids_to_tokens(judge_prompt(spaced, TWO_TEXTS).end) == ["x", ":", " "]
    assert spaced.convert_ids_to_tokens(label_tokens(spaced, TWO_TEXTS)) == ["A", "B"]
    # as GPT-2 does: two line breaks are one token at the end of a text, and two before a letter
    gpt2 = bpe(["A", "B", "x", ":", "\n", "\n\n"], [("\n", "\n")])
    gpt2.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\s+(?!\S)|\s+|\S"), "isolated"
    )
    template = TWO_TEXTS + "\n\n"
    assert len(encode(gpt2, template[-4:])) == 3
    assert gpt2.convert_ids_to_tokens(judge_prompt(gpt2, template).end)[-3:] == [":", "\n", "\n"]
    assert gpt2.convert_ids_to_tokens(label_tokens(gpt2, template)) == ["A", "B"]


def test_labels_unknown_to_the_tokenizer_are_an_error():
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"'A' is not one token .*UNK"):
        label_tokens(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]"))


@pytest.mark.parametrize("kind", ["Llama 2", "Metaspace", "ByteLevel"])
def test_a_blank_that_a_tokenizer_puts_before_each_text_is_none_of_ours(kind):
    """A piece is encoded as in the middle of a text: "2" is no " 2"."""
    blank = "Ġ" if kind == "ByteLevel" else "▁"
    texts = ["A", "B", "x", ":", "2", "0", "a", "\n", "Ċ", "<0x0A>", blank]
    words = [f"{blank}{letter}" for letter in ("A", "B", "x", "2", "0", "a")]
    tokenizer = bpe(texts + words, [(blank, letter) for letter in ("A", "B", "x", "2", "0", "a")])
    backend = tokenizer.backend_tokenizer
    if kind == "Llama 2":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif kind == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    of_two = tokenizer("2", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(of_two) == [f"{blank}2"]
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "2")) == ["2"]
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "x 2")) == ["x", f"{blank}2"]
    assert tokenizer.convert_ids_to_tokens(encode_texts(["2"], tokenizer, {})[0]) == ["2"]


def test_markers_of_the_village_are_one_token_each(tokenizer):
    for marker in prompts.MARKERS:
        assert len(encode(tokenizer, marker)) == 1
    assert judge_prompt(tokenizer).fixed_tokens == 10


# ---- another judge prompt ------------------------------------------------------------

TEMPLATE = (
    'Answer as {"best": "A"}, {} or {prompt }.\n'
    "Question: {prompt}\nA: {response_a}\nB: {response_b}\n\nBest: "
)


def test_template_is_read_as_it_stands_but_for_one_final_line_break(tmp_path):
    file = tmp_path / "judge.txt"
    for written, read in (
        (TEMPLATE, TEMPLATE),
        (TEMPLATE + "\n", TEMPLATE),
        (TEMPLATE + "\n\n", TEMPLATE + "\n"),
    ):
        file.write_text(written, encoding="utf-8")
        assert read_template(file) == read
    # as a Windows editor saves it
    file.write_bytes(b"\xef\xbb\xbf" + TEMPLATE.replace("\n", "\r\n").encode())
    assert read_template(file) == TEMPLATE


@pytest.mark.parametrize(("text", "message"), [
    ("{prompt} {response_a}", "holds the placeholders prompt, response_a; the file"),
    ("{prompt} {prompt} {response_a} {response_b}", "prompt, prompt, response_a, response_b;"),
    (
        "{input} {response_a} {response_b} {response_b}",
        "the placeholders response_a, response_b, response_b;",
    ),
    ("{prompt} {response_b} {response_a}", "each exactly once and in this order"),
    (b"\xff{prompt} {response_a} {response_b}", "not UTF-8"),
    (None, "cannot be read"),
])  # fmt: skip
def test_bad_templates_are_one_line_that_names_the_file(tmp_path, text, message):
    file = tmp_path / "judge.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_template(file)
    said = str(error.value)
    assert said.startswith(f"{file}: ") and message in said and "\n" not in said


def test_texts_are_filled_in_once_and_other_braces_stay():
    filled = fill(TEMPLATE, prompt="{response_a} {x}", response_a="{prompt}", response_b="{")
    assert filled == (
        'Answer as {"best": "A"}, {} or {prompt }.\n'
        "Question: {response_a} {x}\nA: {prompt}\nB: {\n\nBest: "
    )


@pytest.mark.parametrize("chat", [CHATML, SPACED, None])
def test_the_judge_sees_the_template(tokenizer, chat):
    changed = with_template(tokenizer, chat)
    text = fill(TEMPLATE, prompt="x", response_a="y", response_b="z")
    assert text.rstrip() in whole(changed, judge_prompt(changed, TEMPLATE))
    if chat == CHATML:
        assert whole(changed, judge_prompt(changed, TEMPLATE)).endswith(
            text + "<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.parametrize(
    ("end", "label"), [("Best:", "ĠA"), ("Best: ", "ĠA"), ("Best:\n", "A"), ("", "ĠA")]
)
def test_without_a_chat_template_the_verdict_follows_directly(tokenizer, end, label):
    changed = with_template(tokenizer, None)
    template = "{prompt}\n{response_a}\n{response_b}" + end
    tokens = changed.convert_ids_to_tokens(
        [*judge_prompt(changed, template).end, label_tokens(changed, template)[0]]
    )
    assert tokens[-1] == label
    text = changed.convert_tokens_to_string(tokens)
    assert text == end + ("" if end.endswith((" ", "\n")) else " ") + "A"


def test_without_a_chat_template_the_pair_begins_a_paragraph(tokenizer):
    pieces = pair_prompt(with_template(tokenizer, None))
    assert tokenizer.decode(pieces.after_prompt[: pieces.ignored]) == "\n\n"
