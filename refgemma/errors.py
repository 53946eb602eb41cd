"""Define the base class of all errors, and explain names that have changed since version 0.1.

Checked by walking the package and by the command line's tests.
"""

import importlib.abc
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class RefgemmaError(ValueError):
    """Base of all errors caused by an argument or a file; the message says what is wrong, where and what to do.

    Examples
    --------
    >>> import refgemma
    >>> try:
    ...     refgemma.load("nowhere")
    ... except refgemma.RefgemmaError as error:
    ...     print(type(error).__name__)
    ModelNameError
    """


class UsageError(RefgemmaError):
    """Raised for arguments of a command that contradict one another or have an invalid value."""


# Module in version 0.1 -> its present name.
MOVED = {
    "settings": "generation.generation_config", "beams": "generation.beams", "processors": "generation.processors",
    "perplexity": "generation.perplexity", "outputs": "modeling.model_outputs", "pretrained": "modeling.pretrained",
    "released": "goldens.released", "explorer": "teach.explorer", "viz": "teach.viz", "exercises": "teach.exercises",
    "weights.convert": "convert.convert", "weights.layouts": "convert.layouts", "weights.pickles": "convert.pickles",
    "weights.flax_tree": "convert.flax_tree", "weights.orbax": "convert.orbax", "weights.writer": "weights.save",
    "oracle.allowance": "oracle.tolerance", "oracle.bounds": "oracle.tolerance", "oracle.compare": "oracle.judge",
    "oracle.graph": "oracle.operations", "oracle.where": "oracle.locate", "oracle.variants": "oracle.known_bugs",
    "oracle.stages": "oracle.preflight", "oracle.port": "oracle.pipeline", "oracle.bundle": "oracle.repro",
    "oracle.difference": "oracle.diff", "oracle.cover": "oracle.coverage", "oracle.sketch": "goldens.sketch",
    "oracle.full_size": "goldens.full_size", "oracle.verify": "goldens.verify", "oracle.trace": "trace.names",
    "oracle.tracefile": "trace.reader", "oracle.evaltext": "trace.evaltext", "oracle.mapping": "trace.name_maps",
    "oracle.capture": "trace.capture", "oracle.candidate": "trace.candidate", "oracle.jobs": "sweep.jobs",
    "oracle.sweep": "sweep.runner", "oracle.tally": "sweep.tally", "oracle.commands": "cli.candidates",
    "testing.goldens": "testing.recordings", "text": "tokenizer", "weights.adapters": "weights.peft_adapters",
    "weights.gguf": "weights.gguf_weights", "weights.names": "weights.library_names",
    "convert.gguf": "convert.gguf_writer", "oracle.conformance": "oracle.prompts",
    "goldens.gradients": "goldens.recorded_gradients", "trace.gradients": "trace.gradient_names",
    "trace.optimizer": "trace.step_numbers", "teach.exercises.training": "teach.exercises.learning",
}  # fmt: skip


class Moved(importlib.abc.MetaPathFinder):
    """An import finder that Python asks last; it explains where the modules of version 0.1 are now."""

    # `path` may be that of a namespace package, which is iterable but not a Sequence.
    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise `ModuleNotFoundError` with the present name of a module that has moved."""
        if now := MOVED.get(fullname.removeprefix("refgemma.")):
            raise ModuleNotFoundError(f"{fullname} is now refgemma.{now}", name=fullname)
        return None


def explain_renames(module: str, **present: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module with renamed attributes; its error gives the present name.

    Examples
    --------
    >>> explain_renames("refgemma.teach.viz", shown="show_blanks")("shown")
    Traceback (most recent call last):
    AttributeError: refgemma.teach.viz.shown is now refgemma.teach.viz.show_blanks
    """

    def find(name: str) -> Any:
        if name in present:
            raise AttributeError(f"{module}.{name} is now {module}.{present[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
