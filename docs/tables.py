"""Write the reference pages that are tables, from the package; tests/test_docs.py checks that they are current."""

import argparse
import inspect
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import refgemma
from refgemma.cli.main import parser
from refgemma.config import Gemma2Config
from refgemma.layers import Attention, Block, FeedForward
from refgemma.model import Forward
from refgemma.oracle.known_bugs import KNOWN_BUGS
from refgemma.oracle.operations import Context, double, operations
from refgemma.oracle.optimizer_bugs import OPTIMIZER_BUGS
from refgemma.oracle.tolerance import Arithmetic
from refgemma.oracle.training_bugs import TRAINING_BUGS
from refgemma.precision import bf16
from refgemma.testing.properties import LAWS
from refgemma.trace.candidate import Call
from refgemma.trace.names import trace_axes
from refgemma.weights.parameters import tensor_shapes

FOLDER = Path(__file__).parent / "reference"
AGAIN = "<!-- written by docs/tables.py -->"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [list(head), ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: object) -> str:
    """Return a text as code, or an empty text unchanged."""
    return f"`{text}`" if str(text) else ""


def meanings() -> dict[str, str]:
    """Return the meaning of each name of a trace: the comment beside it in the records."""
    records = {
        "": Forward, "layers.N.": Block, "layers.N.attention.": Attention, "layers.N.feed_forward.": FeedForward,
    }  # fmt: skip
    comments = {
        prefix + field: comment
        for prefix, record in records.items()
        for field, comment in re.findall(r"^    (\w+): \w+  # (.+)$", inspect.getsource(record), re.MULTILINE)
    }
    return {name: comments[name] for name, _ in trace_axes()}


def trace_names() -> str:
    """Return the page of every tensor of a trace: its meaning, axes, and inputs in the oracle's table of operations."""
    model = refgemma.load("conformance")
    call = Call(np.array([[2, 5]]), np.array([[0, 1]]), np.ones((1, 2), bool), (2,))
    found = operations(Context(model.config, double(model.weights), call, Arithmetic()))

    def sources(name: str) -> str:
        inputs = found[name.replace(".N.", ".1.")].inputs  # layer 1 comes after another one
        named = [source.replace("layers.1.", "layers.N.").replace("layers.0.", "layers.N-1.") for source in inputs]
        last = f"layers.{model.config.num_hidden_layers - 1}."
        return ", ".join(code(source.replace(last, "layers.LAST.")) for source in named)

    meaning = meanings()
    rows = [(code(name), meaning[name], axes.replace("*", "\\*"), sources(name)) for name, axes in trace_axes()]
    return f"""# Names of a trace

{AGAIN}

A trace is a file of the tensors in this table. `refgemma trace` writes a trace, and `refgemma check` reads one. In
Python the tensors are fields of the result of {{py:func}}`~refgemma.model.forward`: `run.layers[3].attention.probs` is
`layers.3.attention.probs`. The table is in the order of computation; `N` is the number of a layer.
{{py:mod}}`refgemma.shapes` defines the axes. [The forward pass](../explanation/forward.md) names the function that
computes each tensor.

{table(("name", "meaning", "axes", "computed from"), rows)}

If the last column is empty, the tensor is computed from the token ids or their positions. `LAST` is the number of the
last layer. In layer 0, read `embedded` for `layers.N-1.out`. A trace also contains `input_ids` with the axes batch seq,
and `attention_mask` if there is padding.
"""


def known_bugs() -> str:
    """Return the page of the catalogue of known bugs."""
    rows = [(code(v.name), v.kind, code(v.fields[0]), v.says, v.shows, v.seen) for v in KNOWN_BUGS]
    trainers = [(code(v.name), code(v.fields[0]), v.says, v.shows, v.seen) for v in TRAINING_BUGS]
    optimizers = [(code(v.name), v.says, v.shows, v.seen) for v in OPTIMIZER_BUGS]
    return f"""# Known bugs

{AGAIN}

`refgemma check` tests a trace for these {len(KNOWN_BUGS)} known bugs; `refgemma known-bugs NAME` describes one bug. The
column "kind" has three values. A *mistake* computes another model. *Rounding* means the right model, rounded at another
place. A *stage* is a bug in the tokens, the shapes or the weights, before anything is computed.

{table(("name", "kind", "first wrong tensor", "wrong computation", "inputs that show it", "seen in"), rows)}

## Mistakes of trainers

If a trace has gradients, `refgemma check` also tests it for these {len(TRAINING_BUGS)} mistakes; see [Check a
trainer](../how-to/check-a-trainer.md).

{table(("name", "first wrong tensor", "mistake", "inputs that show it", "seen in"), trainers)}

## Mistakes of optimizers

If a trace has the weights after a step, `refgemma check` also tests the step for these {len(OPTIMIZER_BUGS)} mistakes.

{table(("name", "mistake", "inputs that show it", "seen in"), optimizers)}
"""


def sizes() -> str:
    """Return the page of the released models' sizes."""
    presets = {name: Gemma2Config.preset(name) for name in ("2b", "9b", "27b")}
    fields = (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
        "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size",
    )  # fmt: skip
    rows = [(code(field), *(getattr(config, field) for config in presets.values())) for field in fields]
    counts = [sum(math.prod(shape) for shape in tensor_shapes(config).values()) for config in presets.values()]
    scales = [math.sqrt(config.hidden_size) for config in presets.values()]
    rows += [
        ("parameters", *(f"{count:,}" for count in counts)),
        ("bytes in bfloat16", *(f"{2 * count:,}" for count in counts)),
        ("embedding scale", *(f"{scale:.4f}" for scale in scales)),
        ("the same in bfloat16", *(f"{float(bf16(scale)):g}" for scale in scales)),
    ]
    return f"""# Sizes

{AGAIN}

This table has the sizes of the released models. In Python, {{py:meth}}`Gemma2Config.preset("9b")
<refgemma.config.Gemma2Config.preset>` returns them. Layers 0, 2, 4 ... use the sliding window.

{table(("", *presets), rows)}
"""


def command_line() -> str:
    """Return the page that lists all commands and their arguments."""
    top = parser()
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices
    parts = []
    for name, command in commands.items():
        rows = []
        for action in command._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            value = action.metavar or ("" if action.nargs == 0 else "{" + ",".join(action.choices or ()) + "}")
            value = "N" if value == "{}" else value
            given = ", ".join(f"{option} {value}".strip() for option in action.option_strings) or str(value)
            default = "" if action.default is None or action.default is False else action.default
            rows.append((code(given), action.help or "", code(default)))
        says = (command.description or "").rstrip(".")
        epilog = f"\n\n{command.epilog}" if command.epilog else ""
        listed = table(("argument", "meaning", "default"), rows)
        parts.append(f"## refgemma {name}\n\n{says[:1].upper()}{says[1:]}.\n\n{listed}{epilog}")
    return f"""# Command line

{AGAIN}

{top.description}

{top.epilog}

{(chr(10) * 2).join(parts)}
"""


def laws() -> str:
    """Return the page of the laws."""
    rows = []
    for name, law in LAWS.items():
        first, _, _ = (inspect.getdoc(law.check) or "").partition("\n\n")
        rows.append((code(name), " ".join(first.replace("``", "`").split())))
    return f"""# Laws

{AGAIN}

A law is a property that every implementation of Gemma 2 has. `pytest --pyargs refgemma.testing` tests an implementation
with these {len(rows)} laws: see [Write an adapter](../how-to/write-an-adapter.md). To check one law from Python, call
for example `refgemma.testing.properties.causality(backend)`.

{table(("law", "statement"), rows)}
"""


PAGES = {
    "trace-names": trace_names,
    "known-bugs": known_bugs,
    "laws": laws,
    "sizes": sizes,
    "command-line": command_line,
}

if __name__ == "__main__":
    for name, made in PAGES.items():
        (FOLDER / f"{name}.md").write_text(made(), "utf-8")
