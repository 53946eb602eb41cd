"""Run a training: steps, checkpoints, and the folder at the end. Checked against ten steps of transformers' model with
torch's optimizer, and by killing runs: a resumed run ends with the same bits.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from refgemma.config import Gemma2Config
from refgemma.convert.convert import BESIDE
from refgemma.files import lock_folder, one_line, open_tensors, parse_object, replace_file
from refgemma.precision import Array
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.training.data import Row, hash_rows, take_batch
from refgemma.training.gradients import accumulate_gradients, mean_loss
from refgemma.training.lora import Lora
from refgemma.training.optimizer import (
    SCHEDULES,
    AdamW,
    Moments,
    TrainingError,
    adamw,
    clip_grad_norm,
    count_warmup,
    decays,
    first_moments,
    schedule,
)
from refgemma.weights.checkpoint import read_header
from refgemma.weights.parameters import weights_of
from refgemma.weights.save import STAGING, OutputTensor, write_checkpoint

CHECKPOINT = "checkpoint.safetensors"
ABOUT = "refgemma-training"  # in the checkpoint's metadata
STATE_PARTS = ("weight", "exp_avg", "exp_avg_sq")
TRY_INSTEAD = "remove the folder and train again"


@dataclass(frozen=True)
class TrainingArguments:
    """The settings of a run, with the names of transformers' ``TrainingArguments``.

    Parameters
    ----------
    max_steps : int
        Number of steps.
    learning_rate, lr_scheduler_type, warmup_steps
        The highest rate, and its schedule; see `refgemma.training.optimizer.schedule`.
    weight_decay, adam_beta1, adam_beta2, adam_epsilon : float
        See `refgemma.training.optimizer.AdamW`.
    max_grad_norm : float
        Gradients with a larger norm are clipped; 0 turns clipping off.
    per_device_train_batch_size, gradient_accumulation_steps : int
        Their product is the number of rows per step. Nothing else depends on them, because rows are computed one by
        one.
    gradient_checkpointing : bool
        If true, compute each block twice to use less memory.
    seed : int
        The seed for the order of the rows and for a new adapter.
    lora : Lora, optional
        Train this adapter; the base's weights do not change.

    Raises
    ------
    TrainingError
        If a number is out of range; the message names it.

    Examples
    --------
    >>> TrainingArguments(max_steps=10, learning_rate=-1.0)
    Traceback (most recent call last):
    refgemma.training.optimizer.TrainingError: learning_rate is -1.0; it must be a number above 0
    """

    max_steps: int
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    seed: int = 42
    lora: Lora | None = None

    def __post_init__(self) -> None:
        """Check every setting."""
        kinds: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
            "a whole number of at least 1": (
                lambda x: type(x) is int and x >= 1,
                ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
            ),
            "a whole number of at least 0": (lambda x: type(x) is int and x >= 0, ("seed",)),
            "a number above 0": (lambda x: math.isfinite(x) and x > 0, ("learning_rate", "adam_epsilon")),
            "a number of at least 0": (
                lambda x: math.isfinite(x) and x >= 0, ("warmup_steps", "weight_decay", "max_grad_norm"),
            ),
            "a number from 0 to below 1": (lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2")),
            f"one of {', '.join(SCHEDULES)}": (lambda x: x in SCHEDULES, ("lr_scheduler_type",)),
        }  # fmt: skip
        for needed, (fits, names) in kinds.items():
            for name in names:
                if not fits(getattr(self, name)):
                    raise TrainingError(f"{name} is {getattr(self, name)!r}; it must be {needed}")
        if count_warmup(self.warmup_steps, self.max_steps) > self.max_steps:
            raise TrainingError(f"warmup_steps is {self.warmup_steps}; it must not exceed max_steps {self.max_steps}")

    @property
    def optimizer(self) -> AdamW:
        """The settings of the optimizer."""
        return AdamW(self.weight_decay, self.adam_beta1, self.adam_beta2, self.adam_epsilon)

    @property
    def rows(self) -> int:
        """The number of rows per step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = count_warmup(self.warmup_steps, self.max_steps)
        return self.learning_rate * schedule(self.lr_scheduler_type, step, warmup, self.max_steps)


@dataclass(frozen=True)
class State:
    """The state of a run between two steps: `tensors` has the trained weights or adapter, `losses` one loss per
    step."""

    tensors: Mapping[str, Array]
    moments: Mapping[str, Moments]
    losses: tuple[float, ...] = ()
    grad_norm: float = 0.0  # norm of the last step's gradients before clipping
    held_out: float = math.nan  # held-out loss before the first step

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return len(self.losses)


def first_state(base: Mapping[str, Array], config: Gemma2Config, arguments: TrainingArguments) -> State:
    """Return the state before the first step.

    Examples
    --------
    >>> first_state({"model.norm.weight": np.zeros(2)}, Gemma2Config(), TrainingArguments(max_steps=1)).step
    0
    """
    tensors = arguments.lora.draw(base, config, arguments.seed) if arguments.lora else base
    return State(tensors, {name: first_moments(tensor) for name, tensor in tensors.items()})


def train_step(
    state: State, rows: Sequence[Row], base: Mapping[str, Array], config: Gemma2Config, arguments: TrainingArguments
) -> State:
    """Return the state after one step on `rows`: gradients, clipping, AdamW.

    Parameters
    ----------
    state : State
        The state from `first_state` or from the previous step.
    rows : sequence of int arrays
        The whole batch of the step; see `accumulate_gradients`.
    base : mapping
        All weights before the run; used only to train an adapter.
    config, arguments
        The configuration of the model, and the settings of the run.

    Raises
    ------
    TrainingError
        If the loss, a gradient or a new weight is not finite.

    Examples
    --------
    >>> import refgemma
    >>> from refgemma.weights.parameters import named_weights
    >>> tiny = refgemma.load("tiny")
    >>> base = {name: rows[:] for name, rows in named_weights(tiny.weights, tiny.config).items()}
    >>> arguments, rows = TrainingArguments(max_steps=2, learning_rate=1e-3), [np.array([2, 300, 400])]
    >>> state = first_state(base, tiny.config, arguments)
    >>> for _ in range(2):
    ...     state = train_step(state, rows, base, tiny.config, arguments)
    >>> state.losses[1] < state.losses[0]
    True
    """
    lora, number = arguments.lora, state.step + 1
    tensors = lora.merge(base, state.tensors, config) if lora else state.tensors
    weights = weights_of(tensors, config)
    loss, gradients = accumulate_gradients(rows, weights, config, arguments.gradient_checkpointing)
    gradients = lora.pull_back(gradients, state.tensors, config) if lora else gradients
    gradients, norm = clip_grad_norm(gradients, arguments.max_grad_norm or math.inf)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainingError(
            f"step {number}: the loss is {loss:g} and the norm of the gradient {norm:g}, so training stops; lower the "
            "learning rate, or use more warm-up steps"
        )
    new, moments = dict[str, Array](), dict[str, Moments]()
    for name, tensor in state.tensors.items():
        optimizer = arguments.optimizer if decays(name) else replace(arguments.optimizer, weight_decay=0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            new[name], moments[name] = adamw(
                tensor, gradients.pop(name), state.moments[name], number, arguments.rate(state.step), optimizer
            )
        if not np.isfinite(new[name]).all():
            raise TrainingError(f"step {number}: {name} is no longer finite; lower the learning rate")
    return State(new, moments, (*state.losses, loss), norm, state.held_out)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def write_state(path: Path, state: State, identity: Mapping[str, Any]) -> None:
    """Write a checkpoint, which appears complete or not at all; `identity` identifies the run."""
    tensors = {
        f"{part}.{name}": array
        for name, tensor in state.tensors.items()
        for part, array in zip(STATE_PARTS, (tensor, *vars(state.moments[name]).values()), strict=True)
    }
    about = {"losses": state.losses, "grad_norm": state.grad_norm, "held_out": state.held_out, "identity": identity}
    replace_file(path, save(tensors, metadata={ABOUT: json.dumps(about)}))


def read_state(path: Path, first: State, identity: Mapping[str, Any]) -> State:
    """Read a checkpoint of this run; `first` gives the expected names and shapes of the tensors.

    Raises
    ------
    TrainingError
        If the file is damaged, or belongs to a run with another text, model or argument.
    """
    opened, _ = open_tensors(path, TrainingError, TRY_INSTEAD)
    found = read_header(path)
    with one_line(path, TrainingError, TRY_INSTEAD):
        about = parse_object((opened.metadata() or {}).get(ABOUT, "{}").encode())
    theirs, losses = about.get("identity"), about.get("losses")
    numbers = [about.get("grad_norm"), about.get("held_out"), *(losses if isinstance(losses, list) else [None])]
    if not isinstance(theirs, dict) or not all(type(number) is float for number in numbers):
        raise TrainingError(f"{path}: is not a checkpoint of refgemma train; {TRY_INSTEAD}")
    for name, value in json.loads(json.dumps(identity)).items():
        if theirs.get(name) != value:
            raise TrainingError(
                f"{path}: belongs to another run: {name} was {theirs.get(name)}, not {value}; resume with the "
                "arguments "
                "of the first run, or give another folder"
            )
    tensors, moments = dict[str, Array](), dict[str, Moments]()
    for name, tensor in first.tensors.items():
        stored = [found.get(f"{part}.{name}") for part in STATE_PARTS]
        if any(s is None or (s.shape, s.dtype) != (tensor.shape, tensor.dtype) for s in stored):
            raise TrainingError(f"{path}: tensor {name!r} is missing, or has another shape or precision; {TRY_INSTEAD}")
        tensors[name], *rest = (s.read(tensor.dtype.name) for s in stored if s is not None)
        moments[name] = Moments(*rest)
    return State(tensors, moments, tuple(about["losses"]), about["grad_norm"], about["held_out"])


def hash_tensors(tensors: Mapping[str, Array]) -> str:
    """Return a hash of names, dtypes, shapes and all numbers.

    Examples
    --------
    >>> hash_tensors({"a": np.zeros(2)}) == hash_tensors({"a": np.zeros(2, np.float32)})
    False
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


# --- the run ----------------------------------------------------------------------------------------------------------


@contextmanager
def claim_output(folder: Path, resume: bool) -> Iterator[None]:
    """Lock a folder that must be empty or, with `resume`, must have a checkpoint.

    If the run fails before its first checkpoint, the folder is removed or emptied.

    Raises
    ------
    TrainingError
        If the folder has other contents, or another process is writing to it.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder}: is a file; give an empty folder or a new one")
    there = [path.name for path in folder.iterdir() if path.name != STAGING] if folder.exists() else []
    if resume and CHECKPOINT not in there:
        raise TrainingError(f"{folder}: has no {CHECKPOINT}, so no run can be resumed; train without --resume")
    if not resume and any(not name.endswith(".part") for name in there):
        advice = ", or continue it with --resume" if CHECKPOINT in there else ""
        raise TrainingError(f"{folder}: is not empty; give an empty folder{advice}")
    made, staging = not folder.exists(), folder / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    with lock_folder(staging, TrainingError):
        try:
            yield
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if made:
                with suppress(OSError):  # the folder may not be empty
                    folder.rmdir()


@dataclass(frozen=True)
class Run:
    """A training run that writes to a folder.

    Parameters
    ----------
    folder : Path
        The folder for checkpoints and, at the end, for the model.
    rows, held_out : sequence of int arrays
        Token ids to train on, and token ids for measuring the loss.
    base : mapping
        All weights before the run, by their names in a checkpoint.
    config : Gemma2Config
        The model's configuration.
    arguments : TrainingArguments
        The settings of the run.
    """

    folder: Path
    rows: Sequence[Row]
    held_out: Sequence[Row]
    base: Mapping[str, Array]
    config: Gemma2Config
    arguments: TrainingArguments

    def identify(self) -> dict[str, Any]:
        """Return the facts that a checkpoint must share with this run."""
        hashes = {"text": hash_rows([*self.rows, *self.held_out]), "model": hash_tensors(self.base)}
        return asdict(self.arguments) | hashes | {"rows_held_out": len(self.held_out)}

    def measure(self, tensors: Mapping[str, Array]) -> float:
        """Return the held-out loss, given the trained tensors."""
        lora = self.arguments.lora
        merged = lora.merge(self.base, tensors, self.config) if lora else tensors
        return mean_loss(self.held_out, weights_of(merged, self.config), self.config)

    def states(self, resume: bool, save_steps: int) -> Iterator[State]:
        """Yield the state before the first step (or at the last checkpoint), and after each step.

        Every `save_steps` steps, a checkpoint is written before the state is yielded. Killing and resuming a run does
        not change any bit of the result.

        Raises
        ------
        TrainingError
            If the checkpoint belongs to another run, or a loss is not finite.
        """
        identity, checkpoint = self.identify(), self.folder / CHECKPOINT
        state = first_state(self.base, self.config, self.arguments)
        if resume:
            state = read_state(checkpoint, state, identity)
        else:
            state = replace(state, held_out=self.measure(state.tensors))
            if not math.isfinite(state.held_out):
                raise TrainingError(
                    f"the held-out loss is {state.held_out:g} before the first step; check the model's weights"
                )
        yield state
        while state.step < self.arguments.max_steps:
            batch = take_batch(self.rows, state.step, self.arguments.rows, self.arguments.seed)
            state = train_step(state, batch, self.base, self.config, self.arguments)
            if state.step % save_steps == 0 or state.step == self.arguments.max_steps:
                write_state(checkpoint, state, identity)
            yield state

    def finish(self, tensors: Mapping[str, Array], source: Path, base_model: str) -> None:
        """Write a folder for transformers, or for PEFT if it is an adapter; then remove the checkpoint.

        Parameters
        ----------
        tensors : mapping
            The trained tensors.
        source : Path
            The folder or GGUF file of the base; its tokenizer and generation settings are copied.
        base_model : str
            The base's name, for ``adapter_config.json``.
        """
        if self.arguments.lora:
            self.arguments.lora.save(self.folder, tensors, base_model)
        else:
            dtype = next(iter(tensors.values())).dtype.name
            self.config.changed(dtype=dtype, architectures=("Gemma2ForCausalLM",)).save_pretrained(self.folder)
            if source.is_file():  # a GGUF file
                Tokenizer.from_pretrained(source).save_pretrained(self.folder)
            for name in BESIDE:
                if (source / name).is_file():
                    shutil.copyfile(source / name, self.folder / name)
            outputs = [OutputTensor(name, dtype, tensor.shape, tensor) for name, tensor in tensors.items()]
            write_checkpoint(self.folder, outputs, "5GB", hash_tensors(tensors))
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
