"""Peak memory and speed of stage 1, stage 2 and scoring, for the shapes of public models.

The weights are random, as neither memory nor speed depends on them, so nothing is downloaded. On a
GPU every row is measured: peak of torch.cuda.max_memory_allocated, and tokens per second over
--steps steps after a warm-up. Without a GPU, the rows of real models are computed by the formula
below (tests/wings/test_memory.py checks it against small models) and hold no speed; --tiny measures
a small shape on the CPU. There the peak is what the model holds plus what torch allocates during
one step, as torch.profiler sees it. The last table says which batch fits on which card.

Not in any figure: the CUDA context (about 0.5 GiB) and what the allocator loses to fragmentation.

The formula, in bytes, for bfloat16 on a GPU, padding counted as tokens. H is the hidden size, Q and
K the widths of all queries and of all keys, I the MLP's width, V the vocabulary, r the rank of
LoRA.

  weights      NF4: half a byte per weight, one byte of scale per 64 weights, 4 bytes per 256
               scales, and 1,092 bytes of tables per matrix. Embeddings, output matrix, norms and
               biases are not quantised: 2 bytes each.
  adapter      r (inputs + outputs) per linear layer in float32: weight, gradient and Adam's two
               moments, 16 bytes each.
  activations  kept for the backward pass, per token and layer. A frozen matrix keeps none, as it
               has no gradient.
      norms      4 H twice         each computes in float32 and keeps its input in float32;
                                   4 (Q + K) more where queries and keys are normalised (Qwen3)
      LoRA       2 (5 H + Q + I)   the input of each of the seven layers. Each is a separate copy,
                                   since peft casts it to float32 and autocast casts it back: q, k,
                                   v, gate, up take H, o takes Q, down takes I. (With NF4 on a GPU
                                   peft casts nothing: at most this much.)
      LoRA       2 * 7 r           what is between its two matrices
      attention  2 (2 Q + 2 K) + 4 heads
                                   queries, keys, values, output, and the logarithms of the
                                   softmax's sums; SDPA keeps no T x T matrix
      MLP        2 * 3 I           gate before and after its SiLU, and up
               Then the last norm, 4 H, and its output, 2 H. With gradient checkpointing only the
               input of each layer is kept, 2 H, and one layer at a time has all of the above.
  logits       12 per logit (stage 1): log-probabilities, their gradient and the gradient of the
               logits are held together in float32. More than 2^25 logits (chunked.LOGITS_AT_ONCE)
               are made that many at a time, 8 bytes each: in bfloat16, in float32 where they become
               their gradient, and the gradient in bfloat16. Stage 2 and scoring build logits for B
               sequences at most. Where scoring shares what sequences begin with (prefixes.py), it
               also holds keys and values of all layers, 5 K per token and layer at most; that is
               not in the tables.
  in flight    2 * 3 I per token: in the backward pass of the MLP the gradient of its product, once
               through the adapter, once through the frozen matrix, and their sum; 2 H, the gradient
               of the layer's output; and with NF4 the largest matrix dequantised, 2 bytes per
               weight, and its scales, 4 per 64. In scoring, at the up projection: gate and up,
               2 * 2 I, the adapter's output before and after scaling, 8 I, the layer's input and
               its norm, 2 * 2 H, and the norm once more in float32, 4 H.

The logits are freed before the first layer's backward pass, so the peak is

  weights + adapter + activations + max(logits, in flight [+ one layer, with checkpointing]).
"""

from __future__ import annotations

import argparse
import gc
import time

from gram_mini.batches import EncodedPair, judge_batch
from gram_mini.model import hidden_states, output_logits
from gram_mini.prompts import PromptPieces
from gram_mini.runs import options
from gram_mini.runs.chunked import LOGITS_AT_ONCE
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.models import checkpoint_gradients
from gram_mini.runs.processes import pick_device
from gram_mini.studies.speed.common import (
    GIB,
    MODELS,
    Shape,
    add_lora_rank,
    add_models,
    build,
    growth,
    held_bytes,
    loss_of,
    random_rows,
    synchronize,
    table,
    take_step,
)
from gram_mini.training import optimizer_and_schedule

import torch

EXAMPLES = """\
  # every model; without a GPU computed, in a second
  python -m gram_mini.studies.speed.memory
  # a small shape, measured, also on a CPU
  python -m gram_mini.studies.speed.memory --tiny --steps 3"""

TINY = {"tiny": Shape("qwen3", 256, 4, 4, 2, 64, 768, 4096, True)}
STAGES = ("pretrain", "reward", "score")
# A prompt of four fixed tokens.
PIECES = PromptPieces(start=[1], after_prompt=[1], between=[1], end=[1])
EFFECTIVE_BATCH = 32  # pairs per optimiser step, reached by gradient accumulation


# ---- the formula ---------------------------------------------------------------------


def weight_bytes(s: Shape, bits: int, a: int = 2) -> int:
    """Bytes of the frozen weights, ``a`` for each that is not quantised."""
    biases = s.queries + 2 * s.keys if s.kind == "qwen2" else 0
    norms = 2 * s.hidden + (2 * s.head_dim if s.kind == "qwen3" else 0)
    plain = (1 if s.tied else 2) * s.vocabulary * s.hidden + s.hidden + s.layers * (norms + biases)
    return a * plain + s.layers * sum(_matrix_bytes(i * o, bits, a) for i, o in s.linear())


def _matrix_bytes(weights: int, bits: int, a: int) -> int:
    if bits != 4:
        return a * weights
    scales = -(-weights // 64)
    tables = 4 * 16 + 4 * 256 + 4  # of 16 and 256 values, and an offset
    return weights // 2 + scales + 4 * -(-scales // 256) + tables


def adapter_parameters(s: Shape, rank: int) -> int:
    """LoRA's parameters: two matrices beside every linear layer."""
    return s.layers * sum(rank * (i + o) for i, o in s.linear())


def layer_bytes(s: Shape, rank: int) -> int:
    """What one decoder layer keeps for its backward pass, per token."""
    h, q, k, i = s.hidden, s.queries, s.keys, s.intermediate
    norms = 4 * 2 * h + (4 * (q + k) if s.kind == "qwen3" else 0)
    lora = 2 * (5 * h + q + i) + 2 * 7 * rank
    attention = 2 * (2 * q + 2 * k) + 4 * s.heads
    return norms + lora + attention + 2 * 3 * i


def kept_bytes(s: Shape, rank: int, tokens: int, checkpointing: bool) -> int:
    """What the forward pass keeps for the backward pass, the logits apart."""
    per_layer = 2 * s.hidden if checkpointing else layer_bytes(s, rank)
    return tokens * (s.layers * per_layer + (4 + 2) * s.hidden)


def compute(
    s: Shape, stage: str, bits: int, checkpointing: bool, batch: int, length: int, rank: int
) -> dict[str, int]:
    """The terms of the formula in bytes, and their sum, the peak."""
    tokens, widest = batch * length, max(i * o for i, o in s.linear())
    workspace = 2 * widest + 4 * widest // 64 if bits == 4 else 0
    weights = weight_bytes(s, bits)
    adapter = (4 if stage == "score" else 16) * adapter_parameters(s, rank)
    if stage == "score":
        activations = tokens * ((2 * 2 + 8) * s.intermediate + (2 * 2 + 4) * s.hidden) + workspace
    else:
        logits = s.vocabulary * trained_tokens(batch, length) if stage == "pretrain" else 0
        logits = 12 * logits if logits <= LOGITS_AT_ONCE else 8 * LOGITS_AT_ONCE
        in_flight = tokens * (2 * 3 * s.intermediate + 2 * s.hidden) + workspace
        again = tokens * layer_bytes(s, rank) if checkpointing else 0
        activations = kept_bytes(s, rank, tokens, checkpointing) + max(logits, in_flight + again)
    peak = weights + adapter + activations
    return dict(weights=weights, adapter=adapter, activations=activations, peak=peak)


# ---- measuring -----------------------------------------------------------------------


def trained_tokens(batch: int, length: int) -> int:
    """Tokens that stage 1 predicts in such a batch."""
    return batch * (length - length // 4 - 1)


@torch.no_grad()
def scoring_step(model, rows: list[EncodedPair]) -> None:
    """One forward pass over whole sequences, and the logits at their ends."""
    ids, last, _ = judge_batch(rows, PIECES, model.device)
    output_logits(model, hidden_states(model, ids)[torch.arange(len(rows)), last]).float().cpu()


def measure(
    model, stage: str, checkpointing: bool, batch: int, length: int, steps: int
) -> tuple[int, float]:
    """Peak memory in bytes and tokens per second of an adapted model."""
    if checkpointing:
        checkpoint_gradients(model)
    else:
        model.gradient_checkpointing_disable()
    model.zero_grad()  # a step that found no room may have left gradients
    rows = random_rows(batch, length, model.config.vocab_size)
    model.train(stage != "score")
    optimizer, _ = optimizer_and_schedule(model, 1e-4, steps)

    def step():
        if stage == "score":
            scoring_step(model, rows)
        else:
            take_step(model, optimizer, loss_of(model, stage, rows, PIECES))

    step()  # warm-up; Adam's moments are made here
    synchronize(model.device)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(model.device)
    speed = steps * batch * length / (time.perf_counter() - began)
    if on_gpu:
        return torch.cuda.max_memory_allocated(model.device), speed
    return held_bytes(model, optimizer) + growth(step), speed


# ---- tables --------------------------------------------------------------------------


def rows_of(name: str, s: Shape, args, device: torch.device, measured: bool):
    """One row for each setting of a model."""
    for bits in args.bits:
        model = None  # the one before makes room
        gc.collect()
        model = unless_full(build_fused, s, bits, args.lora_rank, device) if measured else None
        for stage in args.stages:
            for checkpointing in [False] if stage == "score" else args.checkpointing:
                for length in args.lengths:
                    batch = (checkpointing, args.batch_size, length)
                    if measured:
                        result = model and unless_full(measure, model, stage, *batch, args.steps)
                        last = ("does not fit", "", "measured")
                        if result:
                            last = (gib(result[0]), f"{result[1]:,.0f}", "measured")
                    else:
                        terms = compute(s, stage, bits, *batch, args.lora_rank)
                        last = (gib(terms["peak"]), "", "computed")
                    on = "" if stage == "score" else "on" if checkpointing else "off"
                    yield [name, stage, str(bits), on, str(args.batch_size), str(length), *last]


def build_fused(s: Shape, bits: int, rank: int, device: torch.device):
    """A model whose attention keeps no T x T matrix, as the formula has it, on a CPU too."""
    model = build(s, bits, rank, device)
    model.get_base_model().set_attn_implementation("sdpa")
    return model


def unless_full(function, *arguments):
    """What the function returns, or None where the GPU has no room for it."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        pass  # what the failed step holds is freed only after this block
    gc.collect()
    torch.cuda.empty_cache()
    return None


def gib(size: int) -> str:
    return f"{size / GIB:.3g}"


def largest_batch(s: Shape, card: int, length: int, rank: int) -> tuple[int, int] | None:
    """The largest batch that leaves a tenth of ``card`` GiB free in both stages, and its peak.

    The batch is a power of two, the peak in bytes, with NF4 and gradient checkpointing. None where
    not even one pair fits.
    """
    for batch in (32, 16, 8, 4, 2, 1):
        peak = max(
            compute(s, stage, 4, True, batch, length, rank)["peak"]
            for stage in ("pretrain", "reward")
        )
        if peak <= 0.9 * card * GIB:
            return batch, peak
    return None


def largest_batches(
    shapes: dict[str, Shape], cards: list[int], lengths: list[int], rank: int
) -> str:
    """What fits on which card, as a Markdown table."""
    rows = []
    for name, s in shapes.items():
        for length in lengths:
            cells = []
            for card in cards:
                batch = largest_batch(s, card, length, rank)
                if batch is None:
                    cells.append("does not fit")
                else:
                    pairs, peak = batch
                    cells.append(f"batch {pairs} x {EFFECTIVE_BATCH // pairs} ({gib(peak)})")
            rows.append([name, str(length), *cells])
    return table(["model", "length", *(f"{card} GB" for card in cards)], rows)


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    add_models(parser, list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a small shape instead of --models")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=length,
        default=[1024, 2048],
        metavar="N",
        help="tokens per sequence",
    )
    parser.add_argument(
        "--batch-size",
        type=options.positive_int,
        default=4,
        metavar="N",
        help="sequences per forward pass",
    )
    add_lora_rank(parser)
    parser.add_argument(
        "--bits",
        nargs="+",
        type=int,
        choices=(4, 16),
        default=[4, 16],
        help="4: NF4 weights; 16: bf16",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="what to do with the model",
    )
    parser.add_argument(
        "--checkpointing",
        choices=("on", "off", "both"),
        default="both",
        help="gradient checkpointing",
    )
    parser.add_argument(
        "--steps",
        type=options.positive_int,
        default=5,
        metavar="N",
        help="steps to time, where steps are measured",
    )
    parser.add_argument(
        "--cards",
        nargs="+",
        type=options.positive_int,
        default=[8, 12, 24],
        metavar="GB",
        help="for the last table",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto takes the GPU where there is one",
    )
    args = parser.parse_args(argv)
    args.checkpointing = {"on": [True], "off": [False], "both": [False, True]}[args.checkpointing]
    device = pick_device(args.device)
    measured = args.tiny or device.type == "cuda"
    shapes = TINY if args.tiny else {name: MODELS[name] for name in args.models}
    rows = [row for name, s in shapes.items() for row in rows_of(name, s, args, device, measured)]
    setting = ["model", "stage", "bits", "checkpointing", "batch", "length"]
    print(table([*setting, "peak GiB", "tokens/s", "how"], rows))
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    print(f"\nLoRA of rank {args.lora_rank}" + (f"; measured on {place}" if measured else ""))
    if args.tiny:
        return
    print(
        "\nThe largest batch with which both stages leave a tenth of the card free, NF4 and "
        "gradient checkpointing; times the\nforward passes per optimiser step (--grad-accum) "
        f"for {EFFECTIVE_BATCH} pairs; computed peak in GiB:\n"
    )
    print(largest_batches(shapes, args.cards, args.lengths, args.lora_rank))


def length(text: str) -> int:
    """argparse type: enough tokens for a prompt and two responses."""
    value = options.positive_int(text)
    if value < 16:
        raise argparse.ArgumentTypeError(f"expected at least 16, got {text!r}")
    return value


if __name__ == "__main__":
    with clear_errors():
        main()
