"""A policy that writes: the village's language model, made to answer, and trained with TRL.

Unlike the tables of policy.py it can write anything, and so find what a judge likes that nobody
would call an answer. A text that is none of the 72 answers that the village knows to a question
(policy.py, ``responses``) has the true reward NO_ANSWER. Its training needs TRL: pip install trl.
"""

from __future__ import annotations

import functools
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gram_mini.batches import IGNORED, batch_order, next_tokens, pad
from gram_mini.chat import encode, render
from gram_mini.errors import UserError
from gram_mini.judge import Comparison
from gram_mini.model import evaluating
from gram_mini.pairs import Pair
from gram_mini.runs.models import load_model, load_tokenizer
from gram_mini.training import clip_gradients, optimizer_and_schedule
from gram_mini.village import FACTS, VILLAGE, question, true_probability
from gram_mini.village.policy import responses

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

# True reward of a text that is no answer; the worst answer (wrong, curt, rambling) has -0.5.
NO_ANSWER = -1.0
LONGEST = 40  # tokens that the policy may write; the longest answer of the village has 22
TOPICS = {question(*topic): topic for topic in FACTS}


@functools.cache
def rewards(prompt: str) -> dict[str, float]:
    """All answers of the village to a question, with their true rewards."""
    return dict(responses(TOPICS[prompt]))


def true_reward(prompt: str, text: str) -> float:
    """The true reward of a text as an answer to a question of the village."""
    return rewards(prompt).get(text.strip(), NO_ANSWER)


@functools.cache
def answered() -> dict[str, str]:
    """Every answer of the village to any question, with the question that it answers."""
    return {text: prompt for prompt in TOPICS for text in rewards(prompt)}


class TrueJudge:
    """A judge that knows the true rewards: the ceiling. Both orders agree."""

    def compare_many(self, pairs: list[Pair], progress: str | None = None) -> list[Comparison]:
        results = []
        for pair in pairs:
            a, b = (true_reward(pair.prompt, y) for y in (pair.response_a, pair.response_b))
            p = true_probability(a, b)
            results.append(Comparison(p, p, p, a - b, a - b, 1.0, False))
        return results


def require_trl():
    """The module trl, or a UserError if it is not installed."""
    try:
        import trl
    except ImportError:
        raise UserError("a policy that writes is trained with TRL: pip install trl") from None
    return trl


def messages(role: str, texts: list[str]) -> list[list[dict]]:
    """Each text as a dialogue of one turn, as TRL reads it."""
    return [[{"role": role, "content": text}] for text in texts]


def train_start(pairs: list[Pair], folder: Path, seed: int) -> None:
    """Teach the backbone, all its weights, to answer as the responses of ``pairs`` do.

    The loss is -log pi(y | x), y with the token that ends it, mean over tokens. One epoch over both
    responses of each pair, 64 of them a step. Writes a model folder.
    """
    torch.manual_seed(seed)
    model = load_model(VILLAGE, bits=32).requires_grad_(True)
    tokenizer = load_tokenizer(VILLAGE)
    rows = []  # token ids, and how many of them are given
    for pair in pairs:
        turn = render(tokenizer, *messages("user", [pair.prompt]), add_generation_prompt=True)
        asked = encode(tokenizer, turn)
        for text in (pair.response_a, pair.response_b):
            answer = [*encode(tokenizer, text), tokenizer.eos_token_id]
            rows.append(([*asked, *answer], len(asked)))
    batches = batch_order([len(ids) for ids, _ in rows], 64, random.Random(seed))
    optimizer, schedule = optimizer_and_schedule(model, 1e-3, len(batches))
    for batch in tqdm(batches, desc="start policy"):
        ids = pad([rows[i][0] for i in batch])  # (B, T)
        targets = pad([next_tokens(*rows[i]) for i in batch], IGNORED)  # (B, T)
        logits = model(input_ids=ids).logits  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        clip_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Written:
    """N texts that a policy wrote, of W tokens with the one that ends each and what pads them."""

    texts: list[str]
    lengths: list[int]  # tokens of each text, at most LONGEST
    ids: torch.Tensor  # (N, T): the question, padded on the left, and then the text
    mask: torch.Tensor  # (N, T): 1 on both
    written: torch.Tensor  # (N, W): 1 on the text and its end alone


class Writer:
    """A language model that answers the village's questions, from the folder of train_start.

    ``start`` stays as it is there. KL is measured to it.
    """

    def __init__(self, folder: Path):
        models = [load_model(str(folder), bits=32).requires_grad_(True) for _ in range(2)]
        self.model, self.start = models[0], models[1].eval()
        self.tokenizer = load_tokenizer(str(folder))
        self.tokenizer.padding_side = "left"  # a text goes on from the question's last token

    @torch.no_grad()
    def write(self, prompts: list[str], temperature: float = 1.0) -> Written:
        """Write an answer to each of N questions; temperature 0 takes the likeliest tokens."""
        inputs = self.tokenizer.apply_chat_template(
            messages("user", prompts), add_generation_prompt=True, padding=True,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        end, padding = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        how: dict = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0}
        with evaluating(self.model):
            ids = self.model.generate(
                **inputs, max_new_tokens=LONGEST, eos_token_id=end, pad_token_id=padding, **how
            )  # (N, T)
        answers = ids[:, inputs["input_ids"].shape[1] :]  # (N, W)
        ends = answers == end  # (N, W)
        written = (ends.cumsum(1) - ends.int() == 0).long()  # (N, W): up to the first end
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        lengths = (written.bool() & ~ends).sum(1).tolist()
        mask = torch.cat([inputs["attention_mask"], written], 1)  # (N, T)
        return Written([text.strip() for text in texts], lengths, ids, mask, written)

    @torch.no_grad()
    def kl(self, drawn: Written) -> float:
        """KL from the policy to its start in nats, estimated on texts that it drew, their mean.

        Of each text it sums the exact KLs of the tokens' distributions, each given the tokens
        before it. So only which texts were drawn is left to chance.
        """
        last = drawn.written.shape[1] + 1  # the positions that say the text, and one more
        log_p, log_q = (
            model(input_ids=drawn.ids, attention_mask=drawn.mask, logits_to_keep=last)
            .logits[:, :-1]
            .log_softmax(-1)
            for model in (self.model, self.start)
        )  # (N, W, V) each
        of_tokens = (log_p.exp() * (log_p - log_q)).sum(-1)  # (N, W)
        return float((of_tokens * drawn.written).sum(1).mean())


def train_writer(
    writer: Writer,
    reward,
    prompts: list[str],
    references: list[str],
    seed: int,
    measure,
    steps: int = 100,
    every: int = 10,
    lr: float = 1e-4,
    beta: float = 0.05,
    questions: int = 8,
    completions: int = 8,
) -> None:
    """Train ``writer.model`` with TRL's GRPOTrainer against a reward function (serving/trl.py).

    GRPO: the advantage of a completion is its reward minus the mean of the completions to the same
    question, over their standard deviation (Shao et al., arXiv 2402.03300, section 4.1).

    Args:
        references: a response to each question, which the judge compares with.
        measure: called with the number of steps done: at 0, every ``every`` steps, at the end.
        beta: weight of the penalty on the KL to the start.
        questions, completions: of a step; so many completions to each question.
    """
    trl = require_trl()
    from datasets import Dataset

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step % every == 0 or state.global_step == steps:
                measure(state.global_step)

    asked, answers = messages("user", prompts), messages("assistant", references)
    data = Dataset.from_dict({"prompt": asked, "reference": answers})
    measure(0)
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.GRPOConfig(
            output_dir=scratch, seed=seed, max_steps=steps, num_generations=completions,
            per_device_train_batch_size=questions * completions, max_completion_length=LONGEST,
            learning_rate=lr, lr_scheduler_type="constant", beta=beta, top_k=0, use_cpu=True,
            bf16=False, gradient_checkpointing=False, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            writer.model, reward, config, data,
            processing_class=writer.tokenizer, callbacks=[Measure()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
