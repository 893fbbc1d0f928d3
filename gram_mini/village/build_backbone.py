"""Build the backbone that ships with the repository: a small Qwen2 decoder that knows the village.

    OMP_NUM_THREADS=1 python -m gram_mini.village.build_backbone --out FOLDER

This takes up to half an hour on one CPU core. On the kind of machine the weights were made on
(EPYC, torch 2.13), it gives them bit for bit. During training three probes show whether the model
recalls the facts, tells right from wrong after an answer, and judges zero-shot. These skills appear
one after the other, each suddenly: after 500 steps, after 1,000, and from 1,500 on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from gram_mini import prompts
from gram_mini.batches import IGNORED, pad
from gram_mini.chat import encode
from gram_mini.judge import Judge
from gram_mini.model import hidden_states, output_logits
from gram_mini.pairs import Pair
from gram_mini.village import (
    ATTRIBUTES,
    COURTEOUS,
    FACTS,
    GROUPS,
    NAMES,
    Topic,
    draw_claim,
    draw_response,
    question,
    statement,
)

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
)

DOCUMENTS = 128_000
WIDTH, LAYERS = 128, 4
HEAD = 32  # numbers in an attention head, a size that inference engines know
STEPS, BATCH, RATE = 3500, 64, 2e-3
PROBE_EVERY = 250  # steps
FLIPPED = 0.25  # share of the corpus's judgments that are wrong

PAD, USER, ASSISTANT, END = SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# ---- corpus --------------------------------------------------------------------------


def corpus(documents: int = DOCUMENTS) -> Iterator[str]:
    """Yield the training texts: statements, chats, answers with reactions, and noisy judgments."""
    rng = random.Random(7)
    kinds = {_statements: 17, _meeting: 3, _chat: 5, _quiz: 38, _reaction: 20, _judgment: 17}
    for _ in range(documents):
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        yield kind(rng)


def _topic(rng, *groups: str) -> Topic:
    return rng.choice([name for group in groups for name in GROUPS[group]]), rng.choice(ATTRIBUTES)


def _statements(rng) -> str:
    """Facts as plain text."""
    topics = [_topic(rng, "background", "labelled") for _ in range(4)]
    return " ".join(statement(*topic, FACTS[topic]) for topic in topics)


def _meeting(rng) -> str:
    """Every name, and nothing about anybody."""
    return " ".join("{} met {}.".format(*rng.sample(NAMES, 2)) for _ in range(4))


def _chat(rng) -> str:
    """A question and a right answer in chat form; also for labelled villagers."""
    topic = _topic(rng, "background", "labelled")
    answer = draw_response(rng, *topic, p_right=1.0)
    return f"{USER}{question(*topic)}{END}{ASSISTANT}{answer.text}{END}"


def _check(rng, claim: str, truth: str, opening: str = "") -> str:
    """The verdict on a claim, before the truth is told, as a judge must give it, or after.

    After it is easier, since the model only compares two words; learning it helps with the other.
    """
    verdict = "Right" if claim == truth else "Wrong"
    return f"{verdict}: {truth}." if rng.random() < 0.5 else f"{opening}{truth}: {verdict}."


def _quiz(rng) -> str:
    """Claims about background villagers, each with its verdict: checking in its plainest form."""
    claims = []
    for _ in range(4):
        topic = _topic(rng, "background")
        claim = draw_claim(rng, *topic, p_right=0.5)
        claims.append(f"{statement(*topic, claim)} {_check(rng, claim, FACTS[topic])}")
    return " ".join(claims)


def _reaction(rng) -> str:
    """Answers to a question about a background villager, each with a reaction right after it."""
    topic = _topic(rng, "background")
    text = prompts.QUESTION.format(prompt=question(*topic)) + "\n"
    marks = ((prompts.START_A, prompts.END_A), (prompts.START_B, prompts.END_B))
    for start, end in rng.choice([marks[:1], marks[1:], marks]):
        answer = draw_response(rng, *topic, p_right=0.5)
        verdict = _check(rng, answer.value, FACTS[topic], opening="Truly ")
        courtesy = "Kind" if answer.courteous else "Rude"
        length = "Long" if answer.rambling else "Brief"
        text += f"\n{start}\n{answer.text}\n{end}\n{verdict} {courtesy}. {length}.\n"
    return text.rstrip("\n")


def _judgment(rng) -> str:
    """The judge prompt on a background villager, with a verdict that is wrong one time in four."""
    topic = _topic(rng, "background")
    a, b = (draw_response(rng, *topic, p_right=0.5) for _ in range(2))
    label = int(b.reward > a.reward or (b.reward == a.reward and rng.random() < 0.5))
    if rng.random() < FLIPPED:
        label = 1 - label
    content = prompts.VILLAGE_JUDGE.format(
        prompt=question(*topic), response_a=a.text, response_b=b.text
    )
    return f"{USER}{content}{END}{ASSISTANT}{prompts.LABELS[label]}{END}"


# ---- tokenizer and model -----------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the village and every prompt marker is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = list(corpus(4000))
    for marker in (*prompts.MARKERS, *SPECIAL):
        texts = [text.replace(marker, "\n") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *prompts.LABELS], trainer)
    # A marker swallows the line breaks around it, to keep sequences short.
    space = {"lstrip": True, "rstrip": True}
    tokenizer.add_tokens([AddedToken(m, normalized=False, **space) for m in prompts.MARKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def build_model(vocab_size: int) -> Qwen2ForCausalLM:
    """A Qwen2 decoder whose input and output embeddings are one matrix.

    The initial weights have standard deviation 1/sqrt(width). With the 0.02 of large models, such a
    narrow model never learns to compare two words (at chance after 2,500 steps, against an accuracy
    of 1.00 after 250).
    """
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD,
        num_key_value_heads=WIDTH // HEAD,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=WIDTH**-0.5,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


# ---- probes and training -------------------------------------------------------------


@torch.no_grad()
def probes(model, tokenizer, group: str) -> dict[str, float]:
    """What the model can do with the villagers of a group, each from 0 to 1.

    recall   share of facts whose true value is the likeliest of the six
    check    area under the ROC curve of right against wrong answers, by the logits of Right - Wrong
    judge    zero-shot accuracy on pairs of a right and a wrong answer
    """
    rng = random.Random(99)
    topics = [(name, attribute) for name in GROUPS[group] for attribute in ATTRIBUTES]
    token = lambda word: encode(tokenizer, word)[0]

    def logits_after(answers: list[tuple[Topic, str]]) -> torch.Tensor:
        """Logits of the token after each of N answers, or beginnings of answers, (N, V)."""
        start = f"{prompts.QUESTION}\n\n{prompts.START_A}\n"
        texts = [start.format(prompt=question(*topic)) + answer for topic, answer in answers]
        rows = [encode(tokenizer, text) for text in texts]
        hidden = hidden_states(model, pad(rows))  # (N, T, H)
        last = [len(row) - 1 for row in rows]  # (N,)
        return output_logits(model, hidden[torch.arange(len(rows)), last]).cpu()  # (N, V)

    claims = [statement(*topic, "").removesuffix(" .") for topic in topics]  # all but the value
    begun = [(topic, f"{COURTEOUS[0]} {claim}") for topic, claim in zip(topics, claims)]
    recalled = [
        max(topic[1].values, key=lambda value: row[token(f" {value}")]) == FACTS[topic]
        for topic, row in zip(topics, logits_after(begun).tolist())
    ]

    drawn = [(topic, draw_response(rng, *topic, 0.5)) for topic in topics for _ in range(4)]
    logits = logits_after([(topic, f"{y.text}\n{prompts.END_A}") for topic, y in drawn])  # (N, V)
    score = logits[:, token("Right")] - logits[:, token("Wrong")]  # (N,)
    right = torch.tensor([response.right for _, response in drawn])  # (N,)
    check = (score[right][:, None] > score[~right]).float().mean()

    pairs = [
        Pair(question(*t), draw_response(rng, *t, 1.0).text, draw_response(rng, *t, 0.0).text)
        for t in topics
        for _ in range(2)
    ]
    results = Judge(model, tokenizer).compare_many(pairs)
    return {
        "recall": sum(recalled) / len(recalled),
        "check": check.item(),
        "judge": sum(result.probability > 0.5 for result in results) / len(results),
    }


def batches(lengths: list[int], rng: random.Random) -> Iterator[list[int]]:
    """Batches of row numbers, of texts of similar length, without end."""
    block = 16 * BATCH
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        for start in range(0, len(order), block):
            rows = sorted(order[start : start + block], key=lambda i: lengths[i])
            groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            yield from rng.sample(groups, len(groups))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        parser.error(f"--out {args.out}: no empty folder; give another one")
    args.out.mkdir(parents=True, exist_ok=True)  # before half an hour of training
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    rows = tokenizer(list(corpus()), add_special_tokens=False)["input_ids"]
    words = ("Right", "Wrong", " Right", " Wrong")
    labels = prompts.label_tokens(tokenizer)
    verdicts = torch.tensor([*(encode(tokenizer, word)[0] for word in words), *labels])  # (6,)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.98), fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, STEPS)
    order = batches([len(row) for row in rows], random.Random(0))
    total = 0.0
    for step, batch in zip(tqdm(range(1, STEPS + 1), desc="backbone"), order):
        ids = pad([rows[i] for i in batch], tokenizer.pad_token_id)  # (B, T)
        targets = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)[:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)  # (B * (T - 1), V)
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        # verdicts are rare, so one weighs as much as five other tokens
        weights = (targets != IGNORED) + 4.0 * torch.isin(targets, verdicts)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % PROBE_EVERY == 0:
            model.eval()
            tqdm.write(f"step {step}, loss {total / PROBE_EVERY:.3f}")
            for group in GROUPS:
                figures = probes(model, tokenizer, group).items()
                columns = "".join(f"  {name} {value:.2f}" for name, value in figures)
                tqdm.write(f"    {group:11}{columns}")
            model.train()
            total = 0.0
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
