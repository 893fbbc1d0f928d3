"""Merge the adapter of a run into its backbone: a model folder for vLLM, transformers and others.

The backbone is dequantised to float32 and the adapter is merged in float32, on the CPU. So the
merged model gives the logits of the NF4 backbone with its adapter, to 1e-5. (Merging into the 4-bit
weights would round the adapter away.) At the end the weights are rounded to --dtype. The default is
bfloat16, since most models are published and served in it. On the village's backbone bfloat16
changes log-odds by at most 0.03 and probabilities by at most 0.006 (300 test pairs). float32 keeps
both to 1e-5 and takes twice the space.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from gram_mini.errors import UserError
from gram_mini.runs import options
from gram_mini.runs.ending import clear_errors
from gram_mini.runs.load import load_judge
from gram_mini.runs.output import check_place, put_in_place
from gram_mini.runs.record import EXPORTED, HEAD, LIKELIHOOD, read_record
from gram_mini.serving.known import write_known

import torch

EXAMPLES = """\
  python -m gram_mini.serving.export runs/reward runs/exported
  python -m gram_mini.serving.export runs/reward runs/exported --dtype float32 --overwrite"""

DTYPES = ("bfloat16", "float32")


def main(argv=None) -> None:
    parser = options.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run folder of train_reward.py or train_pretrain.py"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="model folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="type of the weights that are written"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that this command wrote before"
    )
    args = parser.parse_args(argv)
    export(args.run, args.out, args.dtype, args.overwrite)
    print(f"wrote {args.out}: model, tokenizer, {EXPORTED}; to score with it:")
    print(f"  python score.py --model {args.out} --prompt ... --response ... --response ...")


def export(run: Path, out: Path, dtype: str = "bfloat16", overwrite: bool = False) -> None:
    """Write the merged model of ``run`` to ``out``, under another name until it is complete.

    Raises:
        UserError: no finished run, a run with a head or a likelihood of its own, a backbone that is
            missing or has changed, or something else at ``out``.
    """
    out = out.resolve()
    read_record(run)  # raises unless this is a finished run
    if (run / HEAD).is_file() or (run / LIKELIHOOD).is_dir():
        raise UserError(
            f"{run}: has a head or a likelihood of its own, which an ordinary model cannot hold; "
            "score with the run itself"
        )
    if out.exists() and not (out / EXPORTED).is_file():
        raise UserError(f"{out}: is in the way and no exported model; give another folder")
    if out.exists() and not overwrite:
        raise UserError(
            f"{out}: already holds an exported model; give another folder, or --overwrite to "
            "replace it"
        )
    check_place(out, "OUT")
    judge = load_judge(run, device="cpu", merge=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        partial = Path(scratch) / out.name
        partial.mkdir()
        shutil.copy(run / "run.json", partial / EXPORTED)
        write_known(partial, judge, getattr(torch, dtype))
        judge.model.to(getattr(torch, dtype)).save_pretrained(partial)
        judge.tokenizer.save_pretrained(partial)
        for file in partial.iterdir():  # only their owner may read those of safetensors
            shutil.copymode(partial / EXPORTED, file)
        put_in_place(partial, out)


if __name__ == "__main__":
    with clear_errors():
        main()
