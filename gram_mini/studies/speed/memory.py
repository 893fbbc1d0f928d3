"""The largest forward pass that fits on a card: peak memory of public models, computed.

The table gives the most tokens of a pass (--batch-tokens), a power of two, with which both stages
leave a tenth of the card free, and the peak in GiB, with gradient checkpointing. The tenth is for
the CUDA context (about 0.5 GiB) and for what the allocator loses to fragmentation.

The functions below derive bytes from the sizes of a model, for bfloat16 on a GPU, with padding
counted as tokens. The logits are freed before the backward pass of the first layer, so the peak is

  weights + adapter + activations + max(logits, in flight [+ one layer, with checkpointing]).
"""

from gram_mini.runs.chunked import LOGITS_AT_ONCE
from gram_mini.runs.ending import clear_errors
from gram_mini.studies.speed import common
from gram_mini.studies.speed.common import GIB, MODELS, linear

EXAMPLES = "  python -m gram_mini.studies.speed.memory --bits 16 --cards 16 80"


def weight_bytes(config, bits: int) -> int:
    """The frozen weights. Embeddings, output matrix, norms and biases are never quantised."""
    h, layers = config.hidden_size, config.num_hidden_layers
    (_, q), (_, k), *_ = linear(config)
    biases = q + 2 * k if config.model_type == "qwen2" else 0
    norms = 2 * h + (2 * config.head_dim if config.model_type == "qwen3" else 0)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * h
    plain = 2 * (embeddings + h + layers * (norms + biases))
    matrices = [i * o for i, o in linear(config)]
    if bits == 16:
        return plain + 2 * layers * sum(matrices)
    # Half a byte a weight, a byte for the scale of 64, 4 bytes for 256 scales; and tables of 16 and
    # 256 values and an offset, 4 bytes each.
    scales = [-(-n // 64) + 4 * -(-n // (64 * 256)) + 4 * (16 + 256 + 1) for n in matrices]
    return plain + layers * sum(n // 2 + scale for n, scale in zip(matrices, scales))


def adapter_parameters(config, rank: int) -> int:
    """LoRA's parameters: two matrices beside every linear layer."""
    return config.num_hidden_layers * sum(rank * (i + o) for i, o in linear(config))


def layer_bytes(config, rank: int) -> int:
    """What a decoder layer keeps for its backward pass, per token; frozen matrices keep nothing."""
    (h, q), (_, k), *_, (i, _) = linear(config)
    # Each norm computes in float32 and keeps its input so; Qwen3 normalises queries and keys, too.
    norms = 4 * 2 * h + (4 * (q + k) if config.model_type == "qwen3" else 0)
    # The input of each of the seven layers, copied since peft casts it to float32 and autocast
    # casts it back (with NF4 on a GPU peft casts nothing), and what is between the two matrices.
    lora = 2 * (5 * h + q + i) + 2 * 7 * rank
    # Queries, keys, values, output, and the logarithms of the softmax's sums: no T x T matrix.
    attention = 2 * (2 * q + 2 * k) + 4 * config.num_attention_heads
    return norms + lora + attention + 2 * 3 * i  # the MLP's gate before and after SiLU, and up


def kept_bytes(config, rank: int, tokens: int, checkpointing: bool) -> int:
    """What the forward pass keeps for the backward pass, the logits apart."""
    h = config.hidden_size
    per_layer = 2 * h if checkpointing else layer_bytes(config, rank)  # its input only
    return tokens * (config.num_hidden_layers * per_layer + (4 + 2) * h)  # last norm, its output


def peak(config, bits: int, checkpointing: bool, tokens: int, rank: int, trained: int) -> int:
    """The peak of a training pass of so many tokens, with logits for ``trained`` of them (stage 1;
    0 in stage 2).
    """
    matrix = max(i * o for i, o in linear(config))
    # Of the MLP's product the gradient through the adapter, the one through the frozen matrix and
    # their sum; the gradient of the layer's output; and with NF4 the largest matrix, dequantised.
    in_flight = tokens * (2 * 3 * config.intermediate_size + 2 * config.hidden_size)
    in_flight += 2 * matrix + 4 * matrix // 64 if bits == 4 else 0
    if checkpointing:
        in_flight += tokens * layer_bytes(config, rank)  # computed again, one layer at a time
    # Log-probabilities, their gradient and that of the logits in float32; in chunks 8 bytes each.
    logits = config.vocab_size * trained
    logits = 12 * logits if logits <= LOGITS_AT_ONCE else 8 * LOGITS_AT_ONCE
    adapter = 16 * adapter_parameters(config, rank)  # weight, gradient, Adam's moments: float32
    kept = kept_bytes(config, rank, tokens, checkpointing)
    return weight_bytes(config, bits) + adapter + kept + max(logits, in_flight)


def largest_pass(config, card: int, bits: int, rank: int) -> tuple[int, int]:
    """(tokens, peak in bytes) of the largest pass on a card of so many GB; zeros for no pass."""
    passes = [2**power for power in range(10, 20)]
    peaks = [peak(config, bits, True, tokens, rank, trained=tokens) for tokens in passes]
    room = 0.9 * card * GIB
    return max((found for found in zip(passes, peaks) if found[1] <= room), default=(0, 0))


def largest_passes(bits: int = 4, cards: tuple[int, ...] = (8, 12, 24), rank: int = 32) -> str:
    """The Markdown table of all models."""
    rows = []
    for name, config in MODELS.items():
        row = {"model": name}
        for card in cards:
            tokens, most = largest_pass(config, card, bits, rank)
            row[f"{card} GB"] = f"{tokens:,} ({most / GIB:.3g})" if tokens else "does not fit"
        rows.append(row)
    return common.table(rows)


def main(argv=None) -> None:
    parser = common.parser(str(__doc__), EXAMPLES, "lora-rank cards")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4, help="4: NF4; 16: bf16")
    args = parser.parse_args(argv)
    print(largest_passes(args.bits, args.cards, args.lora_rank))


if __name__ == "__main__":
    with clear_errors():
        main()
