"""The inputs and the result of one operation in a small file: what somebody else needs to look at a finding. Checked in
the tests: whatever is cut away, the file keeps the worst element and all that it was computed from.
"""

import json
from collections.abc import Iterator

from refgemma.inputs import InputError
from refgemma.oracle.engine import Engine, Instance
from refgemma.precision import Array, as_dtype
from refgemma.trace.candidate import axes_of
from refgemma.trace.names import field_of

LIMIT = 1_000_000
HEADER = 10_000  # bytes for names and metadata
Cut = dict[str, slice]
"""What is kept of each axis."""


def axes_in(source: str, name: str) -> list[str]:
    """The words of a tensor's axes as the operation `name` uses them: of keys and values, the tokens are the keys."""
    keys = field_of(name) in ("attention.scores", "attention.mixed") and field_of(source) in (
        "attention.k_rot", "attention.v",
    )  # fmt: skip
    return [("keys" if keys and axis == "seq" else axis) for axis in axes_of(source).split()]


def cuts(name: str, place: tuple[int, ...], seq: int, groups: int) -> Iterator[Cut]:
    """Ever less, `place` always inside: one text, fewer of its tokens, one head, fewer keys or words."""
    at = dict(zip(axes_of(name).split(), place, strict=True))
    kind, cut = field_of(name), {"batch": slice(at["batch"], at["batch"] + 1)}
    yield dict(cut)
    count = seq
    while count > 1:
        count //= 2
        cut["seq"] = slice(max(0, at["seq"] - count + 1), at["seq"] + 1)
        yield dict(cut)
    if kind in ("attention.q_rot", "attention.k_rot", "attention.scores", "attention.capped", "attention.probs"):
        head = at.get("heads", at.get("kv_heads", 0) * groups)
        cut |= {"heads": slice(head, head + 1), "kv_heads": slice(head // groups, head // groups + 1)}
        yield dict(cut)
    # What is computed for each key, or word, alone.
    axis = {"attention.scores": "keys", "attention.capped": "keys", "logits": "vocab", "raw_logits": "vocab"}.get(kind)
    count = 4096
    while axis and count > 1:
        cut[axis] = slice(max(0, at[axis] - count // 2), at[axis] + count // 2 + 1)
        yield dict(cut)
        count //= 2


def make_repro(engine: Engine, first: Instance, limit: int = LIMIT) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a finding's file.

    Parameters
    ----------
    engine : Engine
        Of the candidate.
    first : Instance
        What is wrong.
    limit : int
        Bytes that the file may have.

    Raises
    ------
    InputError
        If the tensor is not there, or what one element is computed from is larger than `limit`.
    """
    name, candidate = first.tensor, engine.candidate
    if name not in candidate.tensors:
        raise InputError(f"--repro: {name} {first.judged.note}: there is nothing to keep")
    known = {source: candidate.tensors[source] for source in (*first.sources, name)}
    whole: dict[str, tuple[list[str], Array]] = {
        source: (axes_in(source, name), as_dtype(x.numbers, x.storage)) for source, x in known.items()
    }
    whole["expected"] = (axes_in(name, name), engine.usual.result(name))
    place, seq = first.judged.statistics.place, candidate.call.input_ids.shape[1]
    # A span may have mixed tokens and heads on the way: of it only the texts are taken apart.
    for cut in [{}, *cuts(name, place, seq, engine.context.groups)][: 2 if first.between else None]:
        tensors = {source: x[tuple(cut.get(axis, slice(None)) for axis in axes)] for source, (axes, x) in whole.items()}
        # Half precision has two bytes a number in a file.
        size = sum(x.size * (2 if source in known and known[source].storage in ("bfloat16", "float16") else x.itemsize)
                   for source, x in tensors.items())  # fmt: skip
        if size <= limit - HEADER:
            kept = {axis: [part.start, part.stop] for axis, part in cut.items()}
            return tensors, {
                "format": "refgemma-bundle/1", "tensor": name, "inputs": ",".join(first.sources),
                "dtype": candidate.dtype, "kept": json.dumps(kept), "worst": json.dumps(place),
            }  # fmt: skip
    raise InputError(f"--repro: what an element of {name} is computed from has {size} bytes, and {limit} is the most")
