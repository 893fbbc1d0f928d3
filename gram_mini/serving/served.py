"""A judge whose model vLLM computes.

The tokens are made here: tokenizer, judge prompt, label ids, and the cut to --max-length. The
server gets token ids and gives P(A) and P(B), so no weights are loaded. It is asked at
/v1/completions for the log-probabilities of both labels by their ids (logprob_token_ids), which
vLLM 0.32 gives (entrypoints/openai/completion/protocol.py).

A score is right, or the command ends in one line. So before the first score the server has to show
that it reads prompts of --max-length whole (:func:`prove`), and that it has the weights of an
exported run (known.py). Every answer is checked, too (engine.py).
"""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

from gram_mini.batches import EncodedPair, join
from gram_mini.errors import UserError
from gram_mini.judge import Judge
from gram_mini.pairs import Pair
from gram_mini.runs.defaults import MAX_LENGTH, REQUESTS, for_model
from gram_mini.runs.load import check_trained, find_record
from gram_mini.runs.models import load_tokenizer
from gram_mini.runs.record import HEAD, LIKELIHOOD, PROBE
from gram_mini.runs.report import say
from gram_mini.serving.engine import Engine
from gram_mini.serving.known import KNOWN, read_known

import torch
from tqdm import tqdm

ITEMS = 16  # judge prompts in a request
ROUNDING = 0.25  # of log-odds, by bfloat16: logits of 16 to 32 come in steps of 1/8
SAME = 1e-3  # of log P: another last token changes it by more


def served_judge(
    path: str | Path,
    server: str,
    served_name: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    template: str | None = None,
) -> ServedJudge:
    """A judge whose prompts are made as for ``path`` and computed by ``server``.

    Args:
        path: exported run, model folder or name, as for runs.load.load_judge; only its tokenizer,
            its record and the scores that export wrote are read.
        server: its address, for example http://127.0.0.1:8000.
        served_name: the name of the model there; may be left out where only one is served.
        max_length, template: as in load_judge.
        batch_size: requests at a time, 32 by default.

    Raises:
        UserError: no such folder, an unfinished run, a run with a head of its own, a server that
            does not give an exported run's own scores; and as ServedJudge.
    """
    record = find_record(path)
    if (Path(path) / HEAD).is_file() or (Path(path) / LIKELIHOOD).is_dir():
        raise UserError(f"{path}: has a head or a likelihood of its own, which no engine knows")
    if record:
        max_length = max_length or record["options"]["max_length"]
        template = template or record["prompt"]["judge"]
    tokenizer = load_tokenizer(str(path))
    max_length = max_length or for_model(MAX_LENGTH, str(path))
    given = max_length, batch_size or REQUESTS, template
    judge = ServedJudge(tokenizer, server, served_name, *given)
    check_trained(judge, path, record)
    judge.check_weights(Path(path))
    return judge


class ServedJudge(Judge):
    """A judge that asks a server. All that Judge does it does too; it has no ``model``.

    Args:
        server: address of the engine.
        served_name: name of the model there; None if it serves only one.
        batch_size: requests at a time; each holds up to ITEMS prompts.
        The others are those of Judge.

    Raises:
        UserError: no server there, another model, another tokenizer, a server that cuts prompts
            of ``max_length``, or that does not answer as vLLM does.
    """

    def __init__(
        self,
        tokenizer,
        server: str,
        served_name: str | None = None,
        max_length: int = 512,
        batch_size: int = REQUESTS,
        template: str | None = None,
    ):
        super().__init__(None, tokenizer, max_length, batch_size, template)
        self.engine = Engine(server, served_name)
        self.served_as = self.engine.name
        self.rounding = ROUNDING  # log-odds that are no farther apart count as equal
        if self.engine.tokenize(PROBE) != tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"{self.engine.url}: {self.served_as!r} has another tokenizer than --model; give "
                "the folder that is served"
            )
        self.probe = prove(self)
        say(f"{self.engine.url}: serves {self.served_as!r}; its tokenizer is ours")

    def check_weights(self, folder: Path) -> None:
        """See that the server gives the scores that export wrote beside the weights, if it did.

        Raises:
            UserError: it gives others.
        """
        known = read_known(folder)
        if known is None:
            say(
                f"{folder}: holds no {KNOWN}, so whether the server has its weights cannot be "
                "seen; python -m gram_mini.serving.compare shows it"
            )
            return
        self.rounding = known["rounding"]
        logs = self.ask(known["prompts"])
        apart = max(abs(a - b - odds) for (a, b), odds in zip(logs, known["log_odds"]))
        if apart > self.rounding:
            raise UserError(
                f"{self.engine.url}: {self.served_as!r} is not {folder} as it was exported: on "
                f"the pairs of {KNOWN} log-odds are {apart:.2g} apart, and rounding explains "
                f"{self.rounding:.2g}; serve that folder, with the --dtype of its export"
            )

    def verdicts(
        self, orders: list[EncodedPair], progress: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log P(A) and log P(B) (M, 2) of M judge prompts, and their sum as probabilities (M,).

        Raises:
            UserError: the server is gone, or answers with something else.
        """
        prompts = [join(self.prompt, row) for row in orders]
        requests = [prompts[start : start + ITEMS] for start in range(0, len(prompts), ITEMS)]
        answers: list[tuple[float, float]] = []
        bar = tqdm(total=len(orders), desc=progress, delay=2, disable=progress is None, leave=False)
        # The threads are daemons: who interrupts does not wait for their answers.
        with bar, ThreadPool(self.batch_size) as pool:
            for answer in pool.imap(self.ask, requests):
                answers += answer
                bar.update(len(answer))
        logs = torch.tensor(answers, dtype=torch.float64).view(len(orders), 2)  # (M, 2)
        return logs.float(), logs.exp().sum(dim=1).float()

    def ask(self, prompts: list[list[int]]) -> list[tuple[float, float]]:
        """log P(A) and log P(B) after each of the judge prompts."""
        return self.engine.log_probabilities(prompts, self.labels)


def prove(judge: ServedJudge) -> str:
    """See that the server reads prompts of ``max_length`` whole.

    Two that differ in one token only, the last, one in the middle or the first, must have
    different answers.

    Returns the log-odds of a small prompt, by which another model may be noticed.

    Raises:
        UserError: if the server reads them only in part.
    """
    row = judge.encode([Pair("Which?", "This.", "That.")])[0]
    small = join(judge.prompt, row)
    spare = max(0, judge.max_length - len(small))
    filler = (list(row.prompt) * spare)[:spare]
    full = join(judge.prompt, replace(row, prompt=[*filler, *row.prompt]))
    (whole,) = judge.ask([full])
    for place, name in ((-1, "last"), (len(full) // 2, "middle"), (0, "first")):
        other = [*full]
        other[place] = judge.labels[full[place] == judge.labels[0]]
        (changed,) = judge.ask([other])
        apart = max(abs(a - b) for a, b in zip(whole, changed))
        # A last token changes much, one before may change little.
        if apart <= (SAME if place == -1 else 0):
            raise UserError(
                f"{judge.engine.url}: gives the same for two prompts of {len(full)} tokens that "
                f"differ in the {name} one, so it does not read all of them; let it read more, or "
                "give a smaller --max-length"
            )
    ((a, b),) = judge.ask([small])
    return f"{a - b:.1f}"
