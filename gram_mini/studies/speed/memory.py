"""What a plain command chooses for a model on a device: the rate, and the passes of a step.

The table is computed, by the rules of gram_mini/runs, for stage 2 with --both-orders 1 and full
pairs of 1,024 tokens: passes x tokens and the peak in GiB, with * for gradient checkpointing. All
is in NF4, the default. It computes in bf16, but in float32 on a T4 and on a CPU without bf16, which
is the second figure of the laptop. The bytes are derived from the sizes of a model.
"""

from dataclasses import replace
from functools import partial

from gram_mini.runs import memory, options
from gram_mini.runs.defaults import BATCHES, MAX_LENGTH, rate_of_width
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.memory import GIB
from gram_mini.runs.run import LORA_RANK
from gram_mini.runs.table import aligned
from gram_mini.studies.speed.common import SHAPES, linear

CHOSEN = ("SmolLM2-135M", "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B")
# GiB of memory, about as torch reports them, and the bytes of a number that NF4 computes in.
DEVICES = {
    "8 GB": (7.6, 2),
    "T4, 16 GB": (14.6, 4),
    "RTX 4090, 24 GB": (23.5, 2),
    "H100, 80 GB": (79.1, 2),
}
LAPTOP = 16  # GiB
STEP = memory.Longest(rows=BATCHES["batch_size"][1], sequences=2, length=MAX_LENGTH[1], logits=0)


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
    matrices = [i * o for i, o in linear(config)]
    plain = width * (embeddings + h + layers * (norms + biases))
    if bits == 16:
        return plain + width * layers * sum(matrices)
    # Half a byte a weight, a byte for the scale of 64, 4 bytes for 256 scales; and tables of 16 and
    # 256 values and an offset, 4 bytes each.
    scales = [-(-n // 64) + 4 * -(-n // (64 * 256)) + 4 * (16 + 256 + 1) for n in matrices]
    return plain + layers * sum(n // 2 + scale for n, scale in zip(matrices, scales))


def adapter_parameters(config) -> int:
    """LoRA's parameters: two matrices beside every linear layer."""
    return config.num_hidden_layers * sum(LORA_RANK * (i + o) for i, o in linear(config))


def layer_bytes(config, width: int = 2) -> int:
    """What a decoder layer keeps for its backward pass, per token; frozen matrices keep nothing."""
    (h, q), (_, k), *_, (i, _) = linear(config)
    # Each norm computes in float32 and keeps its input so; Qwen3 normalises queries and keys, too.
    norms = 4 * 2 * h + (4 * (q + k) if config.model_type == "qwen3" else 0)
    # The input of each of the seven layers, copied since peft casts it to float32 and autocast
    # casts it back (with NF4 on a GPU peft casts nothing), and what is between the two matrices.
    lora = width * (5 * h + q + i + 7 * LORA_RANK)
    # Queries, keys, values, output, and the logarithms of the softmax's sums: no T x T matrix.
    attention = width * (2 * q + 2 * k) + 4 * config.num_attention_heads
    return norms + lora + attention + width * 3 * i  # the MLP's gate before and after SiLU, and up


def kept_bytes(config, tokens: int, checkpointing: bool, width: int = 2) -> int:
    """What the forward pass keeps for the backward pass, the logits apart."""
    h = config.hidden_size
    layer = width * h if checkpointing else layer_bytes(config, width)  # its input only
    return tokens * (config.num_hidden_layers * layer + (4 + width) * h)  # last norm, its output


def peak(config, bits: int, checkpointing: bool, width: int, tokens: int) -> int:
    """The peak of a training pass of stage 2, which makes two logits a pair, over ``tokens``."""
    matrix = max(i * o for i, o in linear(config))
    # Of the MLP's product the gradient through the adapter, the one through the frozen matrix and
    # their sum; the gradient of the layer's output; and with NF4 the largest matrix, dequantised.
    in_flight = tokens * width * (3 * config.intermediate_size + config.hidden_size)
    in_flight += width * matrix + 4 * matrix // 64 if bits == 4 else 0
    if checkpointing:  # computed again, one layer at a time
        in_flight += tokens * layer_bytes(config, width)
    adapter = 16 * adapter_parameters(config)  # weight, gradient, Adam's moments: float32
    kept = kept_bytes(config, tokens, checkpointing, width)
    return weight_bytes(config, bits, width) + adapter + kept + in_flight


def held(config, bits: int, width: int = 2) -> int:
    """What the loaded model takes."""
    return weight_bytes(config, bits, width) + 4 * adapter_parameters(config)


def largest_pass(config, total: float, checkpointing: bool, width: int = 2) -> int:
    """Tokens of a pass of STEP in NF4 on a GPU with ``total`` GiB; 0 if not even a pair fits."""
    model = held(config, 4, width)
    room = memory.room_on(round(total * GIB), model) + model
    return memory.largest_pass(partial(peak, config, 4, checkpointing, width), STEP, room)


def on_gpu(config, total: float, width: int) -> str:
    """Passes x tokens of STEP in NF4 on a GPU with ``total`` GiB, and the peak in GiB."""
    for checkpointing, star in ((False, ""), (True, "*")):
        if tokens := largest_pass(config, total, checkpointing, width):
            most = peak(config, 4, checkpointing, width, tokens) / GIB
            return f"{-(-STEP.rows // (tokens // STEP.row))} x {tokens:,}{star} ({most:.3g})"
    return "does not fit"


def on_laptop(config) -> str:
    """The same on a CPU and with the passes that are the default there, in bf16 and float32."""
    tokens = replace(STEP, limit=BATCHES["batch_tokens"][1]).tokens
    figures = []
    for width in (2, 4):
        most, model = peak(config, 4, False, width, tokens), held(config, 4, width)
        fits = most - model <= memory.TIGHT * (LAPTOP * GIB - model)
        figures.append(f"{most / GIB:.3g}" if fits else "no")
    if set(figures) == {"no"}:
        return "does not fit"
    return f"{-(-STEP.rows // (tokens // STEP.row))} x {tokens:,} ({', '.join(figures)})"


def choices() -> list[list[str]]:
    """The table of what a plain command chooses: its head and its lines."""
    lines = [["model", "rate", f"laptop, {LAPTOP} GB", *DEVICES]]
    for name in CHOSEN:
        config = SHAPES[name]
        cards = (on_gpu(config, *size) for size in DEVICES.values())
        rate = f"{rate_of_width(config.hidden_size):.1e}"
        lines.append([name, rate, on_laptop(config), *cards])
    return lines


def main(argv=None) -> None:
    options.parser(__doc__, "  python -m gram_mini.studies.speed.memory").parse_args(argv)
    print(aligned(choices()))


if __name__ == "__main__":
    with clear_errors():
        main()
