"""Run the command `train`. Checked through the command line."""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refgemma.cli.output import OK, as_json, say
from refgemma.errors import UsageError
from refgemma.files import pluralise
from refgemma.hub import ADAPTER_CONFIG, find_model
from refgemma.modeling.pretrained import Pretrained, load
from refgemma.training.data import hold_out, pack_rows, read_text
from refgemma.training.gradients import count_targets
from refgemma.training.lora import Lora, parse_modules
from refgemma.training.optimizer import SCHEDULES
from refgemma.training.run import Run, State, TrainingArguments, claim_output
from refgemma.weights.parameters import named_weights, require_memory

# Option -> its type, its default, and its help. The names are those of transformers' TrainingArguments.
NUMBER_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "learning-rate": (float, 5e-4, "the highest learning rate (default: 0.0005)"),
    "warmup-steps": (
        float,
        0,
        "steps in which the learning rate rises from 0; below 1, a fraction of all steps (default: 0)",
    ),
    "weight-decay": (float, 0.0, "weight decay of matrices; norms and biases do not decay (default: 0)"),
    "adam-beta1": (float, 0.9, "(default: 0.9)"),
    "adam-beta2": (float, 0.999, "(default: 0.999)"),
    "adam-epsilon": (float, 1e-8, "(default: 1e-8)"),
    "max-grad-norm": (float, 1.0, "clip the gradient to this norm; 0 turns clipping off (default: 1)"),
    "gradient-accumulation-steps": (int, 1, "batches per step; all their tokens have the same weight (default: 1)"),
    "seed": (int, 42, "seed for the order of the rows and for a new adapter (default: 42)"),
}


def add_train(command: Any, add_hub: Callable[[Any], None], model_help: str) -> None:
    """Add the arguments of ``refgemma train``."""
    command.add_argument("text", metavar="TEXT", help="a text file in UTF-8; its last rows are held out for validation")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="an empty folder, or none yet")
    command.add_argument("--resume", action="store_true", help="continue the interrupted run in DIR")
    command.add_argument("--model", default="tiny", metavar="MODEL", help=f"{model_help} (default: tiny)")
    add_hub(command)
    command.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    command.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps; replaces --num-train-epochs")
    command.add_argument("--num-train-epochs", type=float, default=3.0, metavar="N", help="default: 3")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per batch (default: 8)")
    command.add_argument("--seq-len", type=int, default=128, metavar="N", help="tokens per row (default: 128)")
    for name, (kind, default, text) in NUMBER_OPTIONS.items():
        command.add_argument(f"--{name}", type=kind, default=default, metavar="N" if kind is int else "X", help=text)
    command.add_argument("--lr-scheduler-type", choices=list(SCHEDULES), default="linear", help="default: linear")
    command.add_argument("--gradient-checkpointing", action="store_true", help="use less memory and a third more time")
    command.add_argument(
        "--save-steps", type=int, default=100, metavar="N", help="steps between checkpoints (default: 100)"
    )
    command.add_argument(
        "--logging-steps", type=int, default=10, metavar="N", help="steps between printed lines (default: 10)"
    )
    command.add_argument(
        "--validation-split-percentage",
        type=float,
        default=5.0,
        metavar="X",
        help="percentage of rows held out (default: 5)",
    )
    command.add_argument("--lora-r", type=int, metavar="N", help="train a LoRA adapter of this rank, and write only it")
    command.add_argument("--lora-alpha", type=float, metavar="X", help="scale the adapter by alpha / r (default: 2 r)")
    command.add_argument(
        "--lora-target-modules", metavar="NAME,...", help="modules to adapt, or all-linear (default: q_proj,v_proj)"
    )  # fmt: skip
    command.epilog = (
        "After Ctrl-C, the last checkpoint stays in DIR. The same command with --resume continues from it and gives "
        "the same bits as a run without interruption."
    )


def read_lora(args: argparse.Namespace) -> Lora | None:
    """Return the settings of the adapter, or None without --lora-r."""
    if args.lora_r is None:
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --lora-r")
        return None
    alpha = 2.0 * args.lora_r if args.lora_alpha is None else args.lora_alpha
    if args.lora_r < 1 or not 0 < alpha < math.inf:
        raise UsageError(f"--lora-r {args.lora_r} and --lora-alpha {alpha:g}: both must be above 0")
    return Lora(args.lora_r, alpha, parse_modules(args.lora_target_modules or "q_proj,v_proj"))


def read_arguments(args: argparse.Namespace, rows: int) -> TrainingArguments:
    """Return the settings of a run on a text with this number of `rows`."""
    for name in ("save_steps", "logging_steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    batch = max(1, args.batch_size * args.gradient_accumulation_steps)
    if args.max_steps is None:
        if not 0 < args.num_train_epochs < 1e6:
            raise UsageError(f"--num-train-epochs {args.num_train_epochs:g}: it must be above 0")
        args.max_steps = math.ceil(args.num_train_epochs * rows / batch)
    if batch > rows:
        raise UsageError(f"the text has {pluralise(rows, 'row')} to train on; a step needs {batch}: lower --batch-size")
    names = {f.name for f in fields(TrainingArguments)} & set(vars(args))
    return TrainingArguments(
        **{name: getattr(args, name) for name in names}, per_device_train_batch_size=args.batch_size,
        lora=read_lora(args),
    )  # fmt: skip


def name_base(args: argparse.Namespace, model: Pretrained) -> str:
    """Return the base model's name for ``adapter_config.json``: a hub id unchanged, or a folder's absolute path.

    Raises
    ------
    UsageError
        If PEFT could not load the base of the adapter.
    """
    place = find_model(args.model, args.revision)
    if place.is_file() or (place / ADAPTER_CONFIG).exists():
        raise UsageError(
            f"--lora-r: {args.model} is {'a GGUF file' if place.is_file() else 'itself an adapter'}, which PEFT "
            "does not accept as a base; write a folder from it first with: refgemma convert"
        )
    is_folder = args.model in ("tiny", "conformance") or Path(args.model).is_dir()
    return str(place.resolve()) if is_folder else args.model


def run_train(args: argparse.Namespace) -> int:
    """Run ``refgemma train``."""
    text = read_text(args.text)
    with claim_output(Path(args.output), args.resume):
        model = load(args.model, args.dtype, args.revision, args.download, read=False)
        limit = model.config.max_position_embeddings
        if not 2 <= args.seq_len <= limit:
            raise UsageError(f"--seq-len is {args.seq_len}; it must be from 2 to {limit} (max_position_embeddings)")
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        rows, held_out = hold_out(
            pack_rows(ids, args.seq_len, model.config.bos_token_id), args.validation_split_percentage
        )
        arguments = read_arguments(args, len(rows))
        if model.config.attention_dropout:
            warnings.warn(
                f"attention_dropout is {model.config.attention_dropout:g} in the configuration; refgemma applies no "
                "dropout, but transformers would in training",
                stacklevel=2,
            )
        base_model = name_base(args, model) if arguments.lora else ""
        copies = 5 if arguments.lora else 8  # old and new weights and moments; gradients of two rows and their sum
        require_memory(copies * model.checkpoint.parameters * np.dtype(args.dtype).itemsize, "training this model")
        base = {
            name: np.ascontiguousarray(r[:]) for name, r in named_weights(model.read().weights, model.config).items()
        }
        run = Run(Path(args.output), rows, held_out, base, model.config, arguments)
        began = time.perf_counter()
        state = follow(run, args)
        after = run.measure(state.tensors)
        if not math.isfinite(after):
            raise UsageError(f"the held-out loss after the last step is {after:g}; lower --learning-rate")
        run.finish(state.tensors, model.folder, base_model)
    report(args, run, state, after, time.perf_counter() - began)
    return OK


def follow(run: Run, args: argparse.Namespace) -> State:
    """Run all steps and return the last state; print a line every few steps, and a bar on a terminal."""
    arguments = run.arguments
    with tqdm(total=arguments.max_steps, unit="step", disable=None, leave=False) as bar:
        for state in run.states(args.resume, args.save_steps):
            bar.update(state.step - bar.n) if not bar.disable else None
            if not state.step:
                continue
            bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
            if not args.json and state.step % args.logging_steps == 0:
                said = f"step {state.step} of {arguments.max_steps}: loss {state.losses[-1]:.4f}, "
                said += f"gradient norm {state.grad_norm:.3f}, learning rate {arguments.rate(state.step - 1):.3g}"
                with tqdm.external_write_mode():  # hides the bar while the line is printed
                    say(said)
    return state


def report(args: argparse.Namespace, run: Run, state: State, after: float, seconds: float) -> None:
    """Print the results."""
    if args.json:
        as_json({
            "folder": args.output, "steps": state.step, "rows": len(run.rows), "rows_held_out": len(run.held_out),
            "tokens": count_targets(run.rows), "tokens_held_out": count_targets(run.held_out),
            "held_out_loss_before": state.held_out, "held_out_loss_after": after, "losses": state.losses,
            "seconds": round(seconds, 1),
        })  # fmt: skip
        return
    kind = "an adapter" if run.arguments.lora else "a model"
    say(
        f"held-out loss {state.held_out:.4f} before, {after:.4f} after {pluralise(state.step, 'step')}, in "
        "nats per token "
        f"({pluralise(count_targets(run.held_out), 'token')}); {seconds:.0f} s",
        f"{args.output}: {kind}; continue a text with: refgemma generate PROMPT --model {args.output}",
    )
