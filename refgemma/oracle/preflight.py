"""Compare a port's weights with the checkpoint, and its tokens with the tokenizer, before any computation.

Checked in the tests on copies of the conformance checkpoint and on texts of the tiny model, each wrong in a known way.

Weights are copied, not computed, so the tolerance is zero. A tensor equals the checkpoint's bit for bit, or is rounded
to half precision (reported, but not a mistake), or is wrong. For a wrong tensor every known bug is tried, and a bug is
named only if it gives the tensor exactly.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.files import pluralise
from refgemma.hub import GGUF, refuse_links
from refgemma.inputs import InputError
from refgemma.oracle.engine import QUANTISED_LIMIT
from refgemma.oracle.known_bugs import interleave
from refgemma.oracle.verdicts import EXACT, FAIL, INVALID, MISSING, NOISY, UNKNOWN
from refgemma.precision import Array, as_dtype, as_float64, wide
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.trace.reader import Entry, open_safetensors
from refgemma.weights.gguf_weights import read_gguf_model
from refgemma.weights.parameters import EMBED_TOKENS, tensor_shapes

HEAD_WEIGHT = "lm_head.weight"
QUANTISED = "weights-quantised"
ROWS_AT_ONCE = 16384  # rows compared at once
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Preflight:
    """The result for one tensor of weights, or one row of tokens."""

    name: str
    verdict: str
    named: str = ""  # the known bug
    note: str = ""


def open_weights(path: str | Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file, of all such files in a folder, or of a GGUF file.

    Raises
    ------
    InputError
        If the file is missing.
    """
    folder = Path(path)
    if folder.suffix == GGUF and folder.is_file():
        _, stored = read_gguf_model(folder)
        return {name: Entry("F32", x.shape, partial(x.read, "float32")) for name, x in stored.items()}
    if folder.is_dir():
        refuse_links(folder)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files:
        raise InputError(f"{path}: has no safetensors file; give a folder with the weights")
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in open_safetensors(file).entries.items():
            if name in found:
                raise InputError(f"{file}: {name} is also in another file of {path}; remove one")
            found[name] = entry
    return found


def is_same(a: Array, b: Array) -> bool:
    """Return True if two arrays have the same numbers, in whatever format; compare some rows at a time.

    Examples
    --------
    >>> is_same(np.float32([1, 2]), np.float64([1, 2])), is_same(np.zeros(2), np.zeros((2, 1)))
    (True, False)
    """
    if a.shape != b.shape:
        return False
    starts = range(0, len(a), ROWS_AT_ONCE)
    return all(np.array_equal(as_float64(a[n : n + ROWS_AT_ONCE]), as_float64(b[n : n + ROWS_AT_ONCE])) for n in starts)


def known_ways(name: str, right: Array, config: Gemma2Config) -> Iterator[tuple[str, Callable[[], Array]]]:
    """Yield the name of each known bug, and a function that returns the checkpoint's tensor with the bug."""
    if right.ndim == 1:
        yield "weights-one-plus", lambda: 1 + as_float64(right)
        yield "weights-minus-one", lambda: as_float64(right) - 1
        return
    yield "weights-transposed", lambda: np.ascontiguousarray(right.T)
    yield "weights-reshaped", lambda: np.ascontiguousarray(right.T).reshape(right.shape)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        yield "rope-weights-permuted", lambda: interleave(right, config.head_dim)
        yield "rope-weights-permuted", lambda: interleave(right, config.head_dim, config.head_dim // 2)


def judge_weight(name: str, entry: Entry, checkpoint: Mapping[str, Entry], config: Gemma2Config) -> Preflight:
    """Return the result for one tensor of a port."""
    if entry.dtype not in FLOATS:
        return Preflight(name, INVALID, UNKNOWN, f"is stored as {entry.dtype}; it must be one of {', '.join(FLOATS)}")
    right = checkpoint[name].read() if name in checkpoint else checkpoint[EMBED_TOKENS].read()
    vocabulary = name in (EMBED_TOKENS, HEAD_WEIGHT)
    if vocabulary and len(entry.shape) == 2 and entry.shape[0] > right.shape[0] and entry.shape[1:] == right.shape[1:]:
        if is_same(entry.read()[: right.shape[0]], right):
            rows = f"has {pluralise(entry.shape[0], 'row')}; the vocabulary has {right.shape[0]}"
            return Preflight(name, FAIL, "vocab-padded", rows)
    if np.prod(entry.shape) != right.size:
        return Preflight(name, FAIL, UNKNOWN, f"has shape {entry.shape}; it must be {right.shape}")
    found = entry.read()
    if is_same(found, right):
        return Preflight(name, EXACT)
    if not np.isfinite(as_float64(found)).all():
        return Preflight(name, INVALID, UNKNOWN, "has elements that are NaN or infinite")
    for half in ("bfloat16", "float16"):
        if found.shape == right.shape and is_same(found, np.asarray(wide(as_dtype(as_float64(right), half)))):
            return Preflight(name, NOISY, "weights-rounded", f"is rounded to {half}")
    for mistake, made in known_ways(name, right, config):
        if any(is_same(found, x) for x in _also_rounded(made())):
            return Preflight(name, FAIL, mistake)
    if name == HEAD_WEIGHT:
        return Preflight(name, FAIL, "head-untied", "differs from the embedding, although this model ties the two")
    others = [o for o, e in checkpoint.items() if o != name and e.shape == found.shape and is_same(found, e.read())]
    if others:
        return Preflight(name, FAIL, "weights-of-another", f"equals {others[0]} of the checkpoint")
    if found.shape == right.shape and found.ndim == 2 and (off := measure_quantisation(found, right)):
        return Preflight(name, NOISY, QUANTISED, f"has a relative error of {off:.2g}")
    wrong = int(np.sum(as_float64(found) != as_float64(right))) if found.shape == right.shape else found.size
    return Preflight(name, FAIL, UNKNOWN, f"{wrong} of {found.size} elements differ{'s' * (wrong == 1)}")


def measure_quantisation(found: Array, right: Array) -> float:
    """Return the relative error of the worst row if quantisation may be the reason, else 0.

    Errors of quantisation are small, and a common factor of a matrix does not explain them.

    Examples
    --------
    >>> right = np.random.default_rng(0).standard_normal((4, 64))
    >>> round(measure_quantisation(np.round(right, 1), right), 2), measure_quantisation(right * 1.01, right)
    (0.03, 0.0)
    """
    worst, squares, shared, size = 0.0, 0.0, 0.0, 0.0
    for n in range(0, len(right), ROWS_AT_ONCE):
        b = as_float64(right[n : n + ROWS_AT_ONCE])
        error = as_float64(found[n : n + ROWS_AT_ONCE]) - b
        sizes, errors = np.sum(b * b, axis=-1), np.sum(error * error, axis=-1)
        with np.errstate(all="ignore"):
            worst = max(worst, float(np.nan_to_num(np.sqrt(errors / sizes), nan=0.0, posinf=np.inf).max(initial=0.0)))
        squares, shared, size = squares + errors.sum(), shared + np.sum(error * b), size + sizes.sum()
    return worst if worst < QUANTISED_LIMIT and abs(shared) < 0.5 * np.sqrt(squares * size) else 0.0


def _also_rounded(x: Array) -> Iterator[Array]:
    yield x
    for dtype in ("float32", "bfloat16", "float16"):  # the port stores the changed numbers in one of these
        yield np.asarray(wide(as_dtype(as_float64(x), dtype)))


def compare_weights(path: str | Path, folder: Path, config: Gemma2Config) -> list[Preflight]:
    """Compare each tensor of a port's weights in `path`, a file or folder, with the checkpoint in `folder`.

    Names are Hugging Face's. Tensors that the port lacks are `MISSING`; names that the model does not have are
    `INVALID`.
    """
    port, checkpoint = open_weights(path), open_weights(folder)
    names = list(tensor_shapes(config))
    stages = []
    for name in [*names, *([HEAD_WEIGHT] if HEAD_WEIGHT in port and HEAD_WEIGHT not in names else [])]:
        if name not in port:
            stages.append(Preflight(name, MISSING, note="is missing in the port's weights"))
        else:
            stages.append(judge_weight(name, port[name], checkpoint, config))
    matrices = [name for name in names if len(port[name].shape if name in port else ()) == 2 and name != EMBED_TOKENS]
    if 2 * sum(stage.named == QUANTISED for stage in stages) < len(
        matrices
    ):  # engines quantise all layers or none of them
        stages = [s if s.named != QUANTISED else Preflight(s.name, FAIL, UNKNOWN, s.note) for s in stages]
    strange = [name for name in port if name not in names and name != HEAD_WEIGHT]
    return stages + [Preflight(name, INVALID, UNKNOWN, "is not a tensor of this model") for name in strange]


# --- tokens -----------------------------------------------------------------------------------------------------------


def compare_tokens(ids: Sequence[int], metadata: Mapping[str, str], tokenizer: Tokenizer) -> Preflight | None:
    """Compare a row's tokens with the tokens of the text or chat in the metadata.

    Parameters
    ----------
    ids : sequence of int
        The ids of the row, without padding.
    metadata : mapping
        The metadata of a trace: ``text`` is a text, or ``chat`` is a JSON list of ``{"role": ..., "content": ...}``. If
        both are missing, the result is ``None``.
    tokenizer : Tokenizer
        The model's tokenizer.

    Raises
    ------
    InputError
        If ``chat`` is not a valid chat.

    Examples
    --------
    >>> import refgemma
    >>> tokenizer = refgemma.load("tiny").tokenizer
    >>> compare_tokens(tokenizer.encode("the sea", add_special_tokens=False), {"text": "the sea"}, tokenizer).named
    'missing-bos'
    """
    if "chat" in metadata:
        return _beside(ids, _chat(metadata["chat"], tokenizer), "template-mismatch", tokenizer)
    if "text" in metadata:
        return _beside(ids, tokenizer.encode(metadata["text"]), UNKNOWN, tokenizer)
    return None


def _chat(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        messages: Any = json.loads(text)
        prompted = tokenizer.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"invalid chat in the metadata ({' '.join(str(error).split())[:120]})") from None
    found: Any = prompted["input_ids"] if isinstance(prompted, Mapping) else prompted
    return [int(n) for n in np.ravel(found)]


def _beside(ids: Sequence[int], expected: list[int], otherwise: str, tokenizer: Tokenizer) -> Preflight:
    found, bos = [int(n) for n in ids], tokenizer.bos_token_id
    if found == expected:
        return Preflight("input_ids", EXACT)
    if [bos, *found] == expected:
        return Preflight("input_ids", FAIL, "missing-bos", "does not begin with <bos>; the rest is correct")
    if found == [bos, *expected]:
        return Preflight("input_ids", FAIL, "double-bos", "begins with <bos> twice; the rest is correct")
    shorter = min(len(found), len(expected))
    place = next((n for n in range(shorter) if found[n] != expected[n]), shorter)
    sides = [tokenizer.convert_ids_to_tokens(row[place : place + 4]) for row in (found, expected)]
    return Preflight("input_ids", FAIL, otherwise, f"from token {place} on: {sides[0]} instead of {sides[1]}")
