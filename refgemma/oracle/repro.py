"""Write the inputs and the result of one operation into a small repro file, so that others can study a finding.

Checked in the tests: however small, the file keeps the worst element and all its inputs.
"""

import json
from collections.abc import Iterator

from refgemma.inputs import InputError
from refgemma.oracle.engine import Engine, Instance
from refgemma.precision import Array, as_dtype
from refgemma.trace.candidate import axes_of
from refgemma.trace.names import AFTER, GRADS, field_of

LIMIT = 1_000_000
HEADER = 10_000  # bytes for names and metadata
Cut = dict[str, slice]
"""The part of each axis to keep."""


def axes_in(source: str, name: str) -> list[str]:
    """Return the names of a tensor's axes in the operation `name`; keys and values have ``keys`` as their token
    axis."""
    keys = field_of(name) in ("attention.scores", "attention.mixed") and field_of(source) in (
        "attention.k_rot", "attention.v",
    )  # fmt: skip
    return [("keys" if keys and axis == "seq" else axis) for axis in axes_of(source).split()]


def cuts(name: str, place: tuple[int, ...], seq: int, groups: int) -> Iterator[Cut]:
    """Yield smaller and smaller cuts around `place`: one text, fewer tokens, one head, fewer keys or logits."""
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
    # The axis whose elements are computed separately.
    axis = {"attention.scores": "keys", "attention.capped": "keys", "logits": "vocab", "raw_logits": "vocab"}.get(kind)
    count = 4096
    while axis and count > 1:
        cut[axis] = slice(max(0, at[axis] - count // 2), at[axis] + count // 2 + 1)
        yield dict(cut)
        count //= 2


def make_repro(engine: Engine, first: Instance, limit: int = LIMIT) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors and metadata of a finding's repro file.

    Parameters
    ----------
    engine : Engine
        The candidate's engine.
    first : Instance
        The wrong tensor.
    limit : int
        The maximum size of the file in bytes.

    Raises
    ------
    InputError
        If the tensor is missing, or if the inputs of a single element exceed `limit`.
    """
    name, candidate = first.tensor, engine.candidate
    if name not in candidate.tensors:
        raise InputError(f"--repro: {name} {first.judged.note}; no repro file written")
    known = {source: candidate.tensors[source] for source in (*first.sources, name)}
    whole: dict[str, tuple[list[str], Array]] = {
        source: (axes_in(source, name), as_dtype(x.numbers, x.storage)) for source, x in known.items()
    }
    whole["expected"] = (axes_in(name, name), engine.usual.result(name))
    place, seq = first.judged.statistics.place, candidate.call.input_ids.shape[1]
    # A span may mix tokens and heads, so it is cut only into texts; a gradient is not cut.
    smaller = () if name.startswith((GRADS, AFTER)) else cuts(name, place, seq, engine.context.groups)
    for cut in [{}, *smaller][: 2 if first.between else None]:
        tensors = {source: x[tuple(cut.get(axis, slice(None)) for axis in axes)] for source, (axes, x) in whole.items()}
        # A half-precision number takes two bytes in a file.
        size = sum(x.size * (2 if source in known and known[source].storage in ("bfloat16", "float16") else x.itemsize)
                   for source, x in tensors.items())  # fmt: skip
        if size <= limit - HEADER:
            kept = {axis: [part.start, part.stop] for axis, part in cut.items()}
            return tensors, {
                "format": "refgemma-bundle/1", "tensor": name, "inputs": ",".join(first.sources),
                "dtype": candidate.dtype, "kept": json.dumps(kept), "worst": json.dumps(place),
            }  # fmt: skip
    raise InputError(f"--repro: the inputs of a single element of {name} take {size} bytes; the limit is {limit}")
