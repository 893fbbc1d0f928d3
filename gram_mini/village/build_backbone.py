"""Build the backbone that ships with the repository: a small Qwen2 decoder that knows the village.

    OMP_NUM_THREADS=1 python -m gram_mini.village.build_backbone --out FOLDER

This takes up to half an hour on one CPU core. On the kind of machine the weights were made on
(EPYC, torch 2.13), it gives them bit for bit. During training three probes show whether the model
can serve as a judge's backbone. Does it recall the facts? Can it tell right from wrong after an
answer? Does it judge zero-shot? These skills appear one after the other, each suddenly: recall
after 500 steps, checking after 1,000, judging from 1,500 on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from gram_mini import prompts
from gram_mini.batches import IGNORED, pad
from gram_mini.judge import Judge
from gram_mini.model import hidden_states, output_logits
from gram_mini.pairs import Pair
from gram_mini.village import (
    ATTRIBUTES,
    COURTEOUS,
    FACTS,
    GROUPS,
    NAMES,
    draw_response,
    question,
    statement,
)

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_cosine_schedule_with_warmup,
)

CORPUS_SEED = 7
DOCUMENTS = 128_000
HEAD = 32  # numbers in an attention head, a size that inference engines know
FLIPPED = 0.25  # share of the corpus's judgments that are wrong

PAD, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def corpus(documents: int = DOCUMENTS, seed: int = CORPUS_SEED) -> Iterator[str]:
    """Yield the training texts: statements, chats, answers with reactions, and noisy judgments."""
    rng = random.Random(seed)
    known = GROUPS["background"] + GROUPS["labelled"]
    kinds = {_statements: 17, _meeting: 3, _chat: 5, _quiz: 38, _reaction: 20, _judgment: 17}
    for _ in range(documents):
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        yield kind(rng, known)


def _statements(rng, known):
    """Facts as plain text."""
    facts = [(rng.choice(known), rng.choice(ATTRIBUTES)) for _ in range(4)]
    return " ".join(statement(name, attribute, FACTS[name, attribute]) for name, attribute in facts)


def _meeting(rng, known):
    """Every name, and nothing about anybody."""
    return " ".join("{} met {}.".format(*rng.sample(NAMES, 2)) for _ in range(4))


def _chat(rng, known):
    """A question and a right answer in chat form; also for labelled villagers."""
    name, attribute = rng.choice(known), rng.choice(ATTRIBUTES)
    answer = draw_response(rng, name, attribute, p_right=1.0)
    return f"{USER}{question(name, attribute)}{END}{ASSISTANT}{answer.text}{END}"


def check(rng, claim: str, truth: str, opening: str = "") -> str:
    """The verdict on a claim, before or after the truth is told.

    A judge needs to give the verdict first. The other order is easier, since the model only has to
    compare two words of the text. Learning it helps the model to learn the first one.
    """
    verdict = "Right" if claim == truth else "Wrong"
    return f"{verdict}: {truth}." if rng.random() < 0.5 else f"{opening}{truth}: {verdict}."


def _quiz(rng, known):
    """Claims about background villagers, each with its verdict: checking in its plainest form."""
    claims = []
    for _ in range(4):
        name, attribute = rng.choice(GROUPS["background"]), rng.choice(ATTRIBUTES)
        truth = FACTS[name, attribute]
        claim = (
            truth if rng.random() < 0.5 else rng.choice([v for v in attribute.values if v != truth])
        )
        claims.append(f"{statement(name, attribute, claim)} {check(rng, claim, truth)}")
    return " ".join(claims)


def _reaction(rng, known):
    """Answers to a question about a background villager, each with a reaction right after it."""
    name, attribute = rng.choice(GROUPS["background"]), rng.choice(ATTRIBUTES)
    slots = rng.choice([(0,), (1,), (0, 1)])
    text = prompts.QUESTION.format(prompt=question(name, attribute)) + "\n"
    for slot in slots:
        start, end = ((prompts.START_A, prompts.END_A), (prompts.START_B, prompts.END_B))[slot]
        answer = draw_response(rng, name, attribute, p_right=0.5)
        manner = (
            f"{'Kind' if answer.courteous else 'Rude'}. {'Long' if answer.rambling else 'Brief'}."
        )
        verdict = check(rng, answer.value, FACTS[name, attribute], opening="Truly ")
        text += f"\n{start}\n{answer.text}\n{end}\n{verdict} {manner}\n"
    return text.rstrip("\n")


def _judgment(rng, known):
    """The judge prompt on a background villager, with a verdict that is wrong one time in four."""
    name, attribute = rng.choice(GROUPS["background"]), rng.choice(ATTRIBUTES)
    a, b = (draw_response(rng, name, attribute, p_right=0.5) for _ in range(2))
    label = int(b.reward > a.reward or (b.reward == a.reward and rng.random() < 0.5))
    if rng.random() < FLIPPED:
        label = 1 - label
    content = prompts.VILLAGE_JUDGE.format(
        prompt=question(name, attribute), response_a=a.text, response_b=b.text
    )
    return f"{USER}{content}{END}{ASSISTANT}{prompts.LABELS[label]}{END}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the village and every prompt marker is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = [
        AddedToken(token, special=True, normalized=False) for token in (PAD, USER, ASSISTANT, END)
    ]
    # A marker swallows the line breaks around it, to keep sequences short.
    markers = [
        AddedToken(marker, lstrip=True, rstrip=True, normalized=False) for marker in prompts.MARKERS
    ]
    texts = list(corpus(4000))
    for marker in (*prompts.MARKERS, PAD, USER, ASSISTANT, END):
        texts = [text.replace(marker, "\n") for text in texts]
    texts += ["A", "B"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=chat,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(markers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def verdict_tokens(tokenizer) -> torch.Tensor:
    """Token ids of the verdicts: Right and Wrong, with and without a space before them, A and B."""
    words = [
        prompts.encode(tokenizer, f"{space}{word}")[0]
        for space in ("", " ")
        for word in ("Right", "Wrong")
    ]
    return torch.tensor([*words, *prompts.label_tokens(tokenizer)])


def weighted_loss(
    logits: torch.Tensor, targets: torch.Tensor, verdicts: torch.Tensor
) -> torch.Tensor:
    """Next-token loss in nats; verdicts are rare, so one weighs as much as five other tokens.

    Args:
        logits: (B, T, V).
        targets: (B, T), IGNORED on padding.
        verdicts: token ids of the verdicts, (K,).
    """
    logits, targets = logits.flatten(0, 1), targets.flatten()  # (B * T, V), (B * T,)
    losses = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", ignore_index=IGNORED
    )
    weights = (targets != IGNORED) + 4.0 * torch.isin(targets, verdicts)
    return (losses * weights).sum() / weights.sum()


def build_model(vocab_size: int, width: int, layers: int) -> Qwen2ForCausalLM:
    """A Qwen2 decoder with heads of HEAD numbers; input and output embeddings are one matrix.

    The initial weights have standard deviation 1/sqrt(width). With the 0.02 of large models, such a
    narrow model never learns to compare two words (at chance after 2,500 steps, against an accuracy
    of 1.00 after 250).
    """
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def next_token_logits(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Logits of the token after each of N texts, (N, V)."""
    rows = [prompts.encode(tokenizer, text) for text in texts]
    last = [len(row) - 1 for row in rows]  # (N,)
    hidden = hidden_states(model, pad(rows))  # (N, T, H)
    return output_logits(model, hidden[torch.arange(len(rows)), last])  # (N, V)


def probes(model, tokenizer, group: str) -> dict[str, float]:
    """What the model can do with the villagers of a group, each from 0 to 1.

    recall   share of facts whose true value is the likeliest of the six
    check    area under the ROC curve of right against wrong answers, by the logits of Right - Wrong
    judge    zero-shot accuracy on pairs of a right and a wrong answer
    """
    rng = random.Random(99)
    topics = [(name, attribute) for name in GROUPS[group] for attribute in ATTRIBUTES]
    beginning = lambda n, a: (
        f"{prompts.QUESTION.format(prompt=question(n, a))}\n\n{prompts.START_A}\n"
    )

    stems = [
        beginning(n, a) + f"{COURTEOUS[0]} " + statement(n, a, "|").split(" |")[0]
        for n, a in topics
    ]
    token = {v: prompts.encode(tokenizer, f" {v}")[0] for _, a in topics for v in a.values}
    recalled = [
        max(a.values, key=lambda v: row[token[v]]) == FACTS[n, a]
        for (n, a), row in zip(topics, next_token_logits(model, tokenizer, stems).tolist())
    ]

    answers = [(n, a, draw_response(rng, n, a, 0.5)) for n, a in topics for _ in range(4)]
    logits = next_token_logits(
        model, tokenizer, [f"{beginning(n, a)}{r.text}\n{prompts.END_A}" for n, a, r in answers]
    )  # (answers, V)
    right_id, wrong_id = (prompts.encode(tokenizer, verdict)[0] for verdict in ("Right", "Wrong"))
    score = (logits[:, right_id] - logits[:, wrong_id]).cpu()  # (answers,)
    right = torch.tensor([r.right for _, _, r in answers])
    check = (score[right][:, None] > score[~right]).float().mean()

    pairs = [
        (n, a, draw_response(rng, n, a, 1.0), draw_response(rng, n, a, 0.0))
        for n, a in topics
        for _ in range(2)
    ]
    results = Judge(model, tokenizer).compare_many(
        [Pair(question(n, a), x.text, y.text) for n, a, x, y in pairs]
    )
    return {
        "recall": sum(recalled) / len(recalled),
        "check": check.item(),
        "judge": sum(result.probability > 0.5 for result in results) / len(results),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=3500, help="training steps (default: 3500)")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="documents per step (default: 64)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--width", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--layers", type=int, default=4, help="number of layers (default: 4)")
    parser.add_argument(
        "--seed", type=int, default=0, help="initial weights and order of documents (default: 0)"
    )
    parser.add_argument(
        "--probe-every", type=int, default=250, help="steps between probes (default: 250)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: not empty; give another folder")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), args.width, args.layers).to(args.device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f} M parameters, vocabulary {len(tokenizer)}", flush=True)
    rows = tokenizer(list(corpus()), add_special_tokens=False)["input_ids"]
    print(f"{sum(map(len, rows)) / len(rows):.1f} tokens per document", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.98), fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, args.steps)

    def batches():
        """Batches of texts of similar length, as lists of row numbers, without end."""
        while True:
            order = rng.sample(range(len(rows)), len(rows))
            for start in range(0, len(order) - 16 * args.batch_size + 1, 16 * args.batch_size):
                block = sorted(
                    order[start : start + 16 * args.batch_size], key=lambda i: len(rows[i])
                )
                groups = [
                    block[i : i + args.batch_size] for i in range(0, len(block), args.batch_size)
                ]
                yield from rng.sample(groups, len(groups))

    verdicts = verdict_tokens(tokenizer).to(args.device)
    total = 0.0
    for step, batch in zip(tqdm(range(1, args.steps + 1), desc="backbone"), batches()):
        ids = pad([rows[i] for i in batch], tokenizer.pad_token_id).to(args.device)  # (B, T)
        targets = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)  # (B, T)
        loss = weighted_loss(model(input_ids=ids).logits[:, :-1], targets[:, 1:], verdicts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % args.probe_every == 0 or step == args.steps:
            model.eval()
            figures = {group: probes(model, tokenizer, group) for group in GROUPS}
            model.train()
            tqdm.write(f"step {step}, loss {total / args.probe_every:.3f}")
            for group, values in figures.items():
                columns = "".join(f"  {name} {value:.2f}" for name, value in values.items())
                tqdm.write(f"    {group:11}{columns}")
            total = 0.0
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
