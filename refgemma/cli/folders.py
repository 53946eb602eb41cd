"""Run the commands that write a checkpoint: `convert` and `synth`. Checked through the command line."""

import argparse

from refgemma.cli.output import OK, as_json, say
from refgemma.config import Gemma2Config
from refgemma.convert.convert import convert
from refgemma.files import pluralise
from refgemma.weights.synthetic import write_synthetic


def run_convert(args: argparse.Namespace) -> int:
    """Run ``refgemma convert``."""
    transposed = None if args.gating_einsum is None else args.gating_einsum == "transposed"
    done = convert(
        args.source, args.output, args.kind, args.to, args.config, args.dtype, args.max_shard_size, args.vocab_rows,
        transposed,
    )  # fmt: skip
    source, dtypes = done.source, sorted({output.dtype for output in done.outputs})
    if args.json:
        as_json({
            "source": str(source.path),
            "from": source.kind,
            "target": str(done.target),
            "to": done.kind,
            "tensors": len(done.outputs),
            "bytes": done.nbytes,
            "dtypes": dtypes,
            "dropped_rows": source.padding,
            "dropped_rows_not_zero": source.nonzero,
            "verified": True,
        })  # fmt: skip
        return OK
    if source.padding:
        say(
            f"dropped {pluralise(source.padding, 'row')} of the embedding beyond the vocabulary; "
            f"{source.nonzero} were not zero"
        )
    say(
        f"{done.target}: {pluralise(len(done.outputs), 'tensor')}, {done.nbytes:,} bytes in {', '.join(dtypes)}, "
        f"from {source.kind} to {done.kind}, read back and compared: identical"
    )
    return OK


def run_synth(args: argparse.Namespace) -> int:
    """Run ``refgemma synth``."""
    config = Gemma2Config.preset(args.size)
    parameters = write_synthetic(config, args.output, args.max_shard_size)
    if args.json:
        as_json({"folder": args.output, "parameters": parameters, "dtype": "bfloat16", "weights": "synthetic"})
    else:
        say(f"{args.output}: {parameters:,} synthetic (untrained) weights in bfloat16, size {args.size}")
    return OK
