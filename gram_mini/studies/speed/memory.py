"""Memory of training: what a plain command chooses for a model on a device, and a step measured.

The table gives what a run chooses by the rules of gram_mini/runs for stage 2 with --both-orders 1
and full pairs of 1,024 tokens: passes x tokens and the peak in GiB, with * for gradient
checkpointing; on a GPU in NF4, on a laptop with --bits 16.

It is computed. The functions below derive bytes from the sizes of a model, on a GPU, with padding
counted as tokens. The logits are freed before the backward pass of the first layer, so the peak is

  weights + adapter + activations + max(logits, in flight [+ one layer, with checkpointing]).

--measure instead measures a step on this machine's CPU, on a model with the shape of SmolLM2-135M
and random weights in bf16, with full pairs of 1,024 tokens: with torch's attention, which such a
step takes, and with plain attention, which it took before.
"""

import ctypes
import gc
import multiprocessing
from functools import partial

from gram_mini.batches import trained_tokens
from gram_mini.runs import memory as runs_memory
from gram_mini.runs.chunked import LOGITS_AT_ONCE
from gram_mini.runs.defaults import BATCHES, MAX_LENGTH, rate_of_width
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.run import LORA_RANK
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import GIB, PIECES, SHAPES, STAGES, linear
from gram_mini.training import optimizer_and_schedule

import torch

EXAMPLES = "  python -m gram_mini.studies.speed.memory --measure --record SmolLM2-135M"
CHOSEN = ("SmolLM2-135M", "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B")
# GiB of memory, about as torch reports them, and the bytes of a number that NF4 computes in.
DEVICES = {
    "8 GB": (7.6, 2),
    "T4, 16 GB": (14.6, 4),
    "RTX 4090, 24 GB": (23.5, 2),
    "H100, 80 GB": (79.1, 2),
}
LAPTOP = 16  # GiB
RUN = "SmolLM2-135M"  # on a CPU: the step of --measure, and make real


def weight_bytes(config, bits: int, width: int = 2) -> int:
    """The frozen weights. Embeddings, output matrix, norms and biases are never quantised.

    ``width``, here and below, are the bytes of a number that is computed with: 2 for bf16, and 4
    for NF4 on a GPU that has no bf16.
    """
    h, layers = config.hidden_size, config.num_hidden_layers
    (_, q), (_, k), *_ = linear(config)
    biases = q + 2 * k if config.model_type == "qwen2" else 0
    norms = 2 * h + (2 * config.head_dim if config.model_type == "qwen3" else 0)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * h
    plain = width * (embeddings + h + layers * (norms + biases))
    matrices = [i * o for i, o in linear(config)]
    if bits == 16:
        return plain + width * layers * sum(matrices)
    # Half a byte a weight, a byte for the scale of 64, 4 bytes for 256 scales; and tables of 16 and
    # 256 values and an offset, 4 bytes each.
    scales = [-(-n // 64) + 4 * -(-n // (64 * 256)) + 4 * (16 + 256 + 1) for n in matrices]
    return plain + layers * sum(n // 2 + scale for n, scale in zip(matrices, scales))


def adapter_parameters(config, rank: int) -> int:
    """LoRA's parameters: two matrices beside every linear layer."""
    return config.num_hidden_layers * sum(rank * (i + o) for i, o in linear(config))


def layer_bytes(config, rank: int, width: int = 2) -> int:
    """What a decoder layer keeps for its backward pass, per token; frozen matrices keep nothing."""
    (h, q), (_, k), *_, (i, _) = linear(config)
    # Each norm computes in float32 and keeps its input so; Qwen3 normalises queries and keys, too.
    norms = 4 * 2 * h + (4 * (q + k) if config.model_type == "qwen3" else 0)
    # The input of each of the seven layers, copied since peft casts it to float32 and autocast
    # casts it back (with NF4 on a GPU peft casts nothing), and what is between the two matrices.
    lora = width * (5 * h + q + i + 7 * rank)
    # Queries, keys, values, output, and the logarithms of the softmax's sums: no T x T matrix.
    attention = width * (2 * q + 2 * k) + 4 * config.num_attention_heads
    return norms + lora + attention + width * 3 * i  # the MLP's gate before and after SiLU, and up


def kept_bytes(config, rank: int, tokens: int, checkpointing: bool, width: int = 2) -> int:
    """What the forward pass keeps for the backward pass, the logits apart."""
    h = config.hidden_size
    per_layer = width * h if checkpointing else layer_bytes(config, rank, width)  # its input only
    return tokens * (
        config.num_hidden_layers * per_layer + (4 + width) * h
    )  # last norm, its output


def peak(
    config, bits: int, checkpointing: bool, tokens: int, rank: int, trained: int, width: int = 2
) -> int:
    """The peak of a training pass of so many tokens, with logits for ``trained`` of them (stage 1;
    0 in stage 2).
    """
    matrix = max(i * o for i, o in linear(config))
    # Of the MLP's product the gradient through the adapter, the one through the frozen matrix and
    # their sum; the gradient of the layer's output; and with NF4 the largest matrix, dequantised.
    in_flight = tokens * width * (3 * config.intermediate_size + config.hidden_size)
    in_flight += width * matrix + 4 * matrix // 64 if bits == 4 else 0
    if checkpointing:
        in_flight += tokens * layer_bytes(
            config, rank, width
        )  # computed again, one layer at a time
    # Log-probabilities, their gradient and that of the logits in float32; in chunks 8 bytes each.
    logits = config.vocab_size * trained
    logits = 12 * logits if logits <= LOGITS_AT_ONCE else 8 * LOGITS_AT_ONCE
    adapter = 16 * adapter_parameters(config, rank)  # weight, gradient, Adam's moments: float32
    kept = kept_bytes(config, rank, tokens, checkpointing, width)
    return weight_bytes(config, bits, width) + adapter + kept + max(logits, in_flight)


# ---- what a plain command chooses ----------------------------------------------------


STEP = runs_memory.Longest(
    rows=BATCHES["batch_size"][1], sequences=2, length=MAX_LENGTH[1], logits=0
)


def largest_pass(config, total: float, checkpointing: bool, width: int = 2) -> int:
    """Tokens of a pass of STEP in NF4 on a GPU with ``total`` GiB; 0 if not even a pair fits."""
    held = weight_bytes(config, 4, width) + 4 * adapter_parameters(config, LORA_RANK)
    room = runs_memory.room_on(round(total * GIB), held) + held
    most = lambda tokens: peak(config, 4, checkpointing, tokens, LORA_RANK, 0, width)
    return runs_memory.largest_pass(most, STEP, room)


def chosen(config, total: float, width: int) -> str:
    """Passes x tokens of STEP in NF4 on a GPU with ``total`` GiB, and the peak in GiB."""
    for checkpointing, star in ((False, ""), (True, "*")):
        if tokens := largest_pass(config, total, checkpointing, width):
            most = peak(config, 4, checkpointing, tokens, LORA_RANK, 0, width) / GIB
            return f"{-(-STEP.rows // (tokens // STEP.row))} x {tokens:,}{star} ({most:.3g})"
    return "does not fit"


def on_laptop(config) -> str:
    """The same on a CPU with --bits 16, where a pass holds one pair in both orders."""
    most = peak(config, 16, False, STEP.row, LORA_RANK, 0)
    if most > runs_memory.TIGHT * LAPTOP * GIB:
        return "does not fit"
    return f"{STEP.rows} x {STEP.row:,} ({most / GIB:.3g})"


def choices() -> str:
    """The Markdown table of what a plain command chooses."""
    rows = []
    for name in CHOSEN:
        config = SHAPES[name]
        row = {"model": name, "rate": f"{rate_of_width(config.hidden_size):.1e}"}
        row[f"laptop, {LAPTOP} GB"] = on_laptop(config) + (", run" if name == RUN else "")
        rows.append(row | {card: chosen(config, *size) for card, size in DEVICES.items()})
    return common.table(rows)


# ---- a step on this CPU --------------------------------------------------------------


def measured_steps() -> list[dict[str, str]]:
    """Foreseen and measured memory of a step on SmolLM2-135M's shape; each in a fresh process."""
    rows = []
    for attention in ("sdpa", "eager"):
        for stage, sequences in (("pretrain", 1), ("reward", 2)):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                figures = process.apply(measured_step, (stage, sequences, attention))
            title = f"{STAGES[stage]}, {sequences} x {MAX_LENGTH[1]:,} tokens"
            rows.append({"a pass": title, "attention": attention, **figures})
    return rows


def measured_step(stage: str, sequences: int, attention: str) -> dict[str, str]:
    """GiB beside the model: foreseen, allocated by torch, and by how much the process grew."""
    config, length = SHAPES[RUN], MAX_LENGTH[1]
    torch.manual_seed(0)
    model = common.build(config, 16, LORA_RANK, torch.device("cpu")).train()
    model.get_base_model().set_attn_implementation(attention)
    rows = common.full_rows(sequences, stage, config.vocab_size, length)
    trained = trained_tokens(PIECES[stage], rows) if stage == "pretrain" else 0
    tokens = sequences * length
    foreseen = runs_memory.measure(model).step(tokens, length, trained / tokens)
    optimizer, _ = optimizer_and_schedule(model, 1e-3, 10)
    step = partial(common.take_step, model, optimizer, common.loss_of, stage, rows)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM, the most that was resident, begins anew
    before = status("VmRSS")
    for _ in range(3):
        step()
    grown = status("VmHWM") - before
    allocated = common.peak_bytes(model, optimizer, step) - common.held_bytes(model, None)
    figures = {"foreseen": foreseen, "allocated": allocated, "process grew by": grown}
    return {f"{name}, GiB": f"{size / GIB:.2f}" for name, size in figures.items()}


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status, on Linux."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


def main(argv=None) -> None:
    parser = common.parser(str(__doc__), EXAMPLES, "record")
    parser.add_argument("--measure", action="store_true", help="measure a step on this CPU")
    args = parser.parse_args(argv)
    if args.record and not args.measure:
        parser.error("--record goes with --measure")
    if args.measure:
        common.report("speed-step.json", measured_steps(), args, torch.device("cpu"))
    else:
        print(choices())


if __name__ == "__main__":
    with clear_errors():
        main()
