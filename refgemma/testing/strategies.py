"""Define Hypothesis strategies for Gemma 2: configurations, weights, token batches, positions, calls, arrays, chats,
texts.

Checked by the laws that draw from them.

Models are described, not drawn number by number. A `Scene` is a configuration, a kind of weights, a seed and token ids;
`tensors_of` generates the weights from these. So an example shrinks fast, and can be written into a script.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from refgemma.config import Gemma2Config
from refgemma.errors import explain_renames
from refgemma.precision import Array, as_dtype, bf16
from refgemma.weights.parameters import tensor_shapes

KINDS = ("ordinary", "outliers", "tied rows", "tiny norms", "huge norms", "constant")
CAPS = (50.0, 2.0, 0.5, None)
UNIT_EPS = 1e-6
__getattr__ = explain_renames(__name__, written="write_config", token_ids="token_rows")
# Special tokens, and texts that look like special tokens.
LOOK_ALIKES = (
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused7>", "<0x41>", "<b>",
    "<start_of_turn>model\n", "<bos", "bos>", "< bos>", "\u2581", "  ", "\n\n", "\t",
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn, /, distinct: bool = True, **fixed: Any) -> Gemma2Config:
    """Draw small configurations.

    Parameters
    ----------
    distinct : bool
        If true, no two axes have the same length by chance, so that exchanging axes changes the result. There are fewer
        key/value heads than query heads, ``heads * head_dim`` differs from ``hidden``, and the query scalar differs
        from ``head_dim``.
    **fixed
        Fields of `Gemma2Config` with fixed values.

    Notes
    -----
    Examples shrink towards one layer, one key/value head, and a head of two numbers. The window is at least 2, because
    with 1 the cache of transformers 5.23 keeps every key. ``hidden_size`` is a multiple of the heads, as transformers
    requires.

    Examples
    --------
    >>> config = configs(num_hidden_layers=2).example()  # doctest: +SKIP
    """
    kv_heads = fixed.get("num_key_value_heads") or draw(st.integers(1, 3))
    heads = fixed.get("num_attention_heads") or kv_heads * draw(st.integers(2 if distinct else 1, 3))
    head_dim = fixed.get("head_dim") or 2 * draw(st.integers(1, 5))
    if distinct and "head_dim" not in fixed:
        head_dim = _other_than({heads, kv_heads, heads // kv_heads}, head_dim, 2)
    taken = {heads, kv_heads, head_dim, heads * head_dim, kv_heads * head_dim}
    values: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "sliding_window": draw(st.integers(2, 5)),
        "query_pre_attn_scalar": draw(st.integers(3, 40)),
        "attn_logit_softcapping": draw(st.sampled_from(CAPS)),
        "final_logit_softcapping": draw(st.sampled_from(CAPS)),
        "rms_norm_eps": draw(st.sampled_from([UNIT_EPS, 1e-3])),
        "rope_theta": draw(st.sampled_from([10000.0, 50.0])),
    }
    for name, size, step in (
        ("hidden_size", heads * draw(st.integers(2, 6)), heads),
        ("intermediate_size", draw(st.integers(3, 40)), 1),
        ("vocab_size", draw(st.integers(11, 61)), 1),
    ):
        values[name] = _other_than(taken, size, step) if distinct else size
        taken.add(values[name])
    if distinct:
        values["query_pre_attn_scalar"] = _other_than({head_dim}, values["query_pre_attn_scalar"], 1)
    return Gemma2Config(**(values | fixed))


def _other_than(taken: set[int], size: int, step: int) -> int:
    """Return the first number of `size`, ``size + step`` and so on that is not in `taken`."""
    return next(n for n in range(size, size + (len(taken) + 1) * step, step) if n not in taken)


def write_config(config: Gemma2Config) -> str:
    """Return `config` as Python text, without default and derived values.

    Examples
    --------
    >>> write_config(Gemma2Config(head_dim=8))
    'Gemma2Config(head_dim=8)'
    """
    usual = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    derived = {"layer_types": Gemma2Config(num_hidden_layers=config.num_hidden_layers).layer_types}
    derived |= {name: getattr(config, name) for name in ("rope_parameters", "num_labels", "id2label", "label2id")}
    values = {name: getattr(config, name) for name in usual}
    said = {name: value for name, value in values.items() if value not in (usual[name], derived.get(name, usual[name]))}
    return f"Gemma2Config({', '.join(f'{name}={value!r}' for name, value in said.items())})"


# --- weights ----------------------------------------------------------------------------------------------------------


def tensors_of(config: Gemma2Config, kind: str = "ordinary", seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Generate seeded weights of some kind, by their names in a checkpoint; all numbers are exact in any precision.

    Parameters
    ----------
    config : Gemma2Config
        The configuration, which gives the shapes.
    kind : str
        ``ordinary``: normally distributed, with scores and logits of size about 1. ``outliers``: one number in a
        hundred is 30 times larger. ``tied rows``: tokens share embeddings. ``tiny norms``: ``1 + weight`` is near 0.
        ``huge norms``: near 60. ``constant``: all numbers of a matrix are equal.
    seed : int
        The same seed gives the same weights.

    Examples
    --------
    >>> config = Gemma2Config(vocab_size=11, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                       num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    >>> tensors_of(config, "constant")["model.embed_tokens.weight"].shape
    (11, 4)
    """
    rng = np.random.default_rng(seed)
    std = 1.2 / np.sqrt(config.hidden_size)
    return {
        name: _make_tensor(name, shape, kind, std, np.random.default_rng(rng.integers(2**63)))
        for name, shape in tensor_shapes(config).items()
    }


def _make_tensor(name: str, shape: tuple[int, ...], kind: str, std: float, rng: np.random.Generator) -> Any:
    noise = rng.standard_normal(shape)
    is_norm = len(shape) == 1 and not name.endswith(".bias")
    if kind not in KINDS:
        raise ValueError(f"unknown kind of weights {kind!r}; it must be one of {', '.join(KINDS)}")
    if is_norm and kind in ("tiny norms", "huge norms"):
        values = -1 + 2.0**-6 * noise if kind == "tiny norms" else 60 * noise
    elif kind == "constant":
        values = np.full(shape, noise.flat[0])
    else:
        values = noise
    if kind == "outliers":
        values = np.where(rng.random(shape) < 0.01, 30 * values, values)
    if kind == "tied rows" and name.endswith("embed_tokens.weight"):
        values = values[rng.integers(0, 1 + shape[0] // 2, shape[0])]
    scale = 1.0 if is_norm and kind in ("tiny norms", "huge norms") else 0.3 if len(shape) == 1 else std
    return np.asarray(bf16(values * scale).view(np.ndarray))


def weights(config: Gemma2Config) -> st.SearchStrategy[dict[str, npt.NDArray[np.float32]]]:
    """Draw weights of every kind for `config`, shrinking towards ordinary weights; see `tensors_of`."""
    return st.builds(tensors_of, st.just(config), st.sampled_from(KINDS), st.integers(0, 2**16))


# --- inputs of a call -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenBatch:
    """Token ids ``(batch, seq)``, and a mask with 1 for a token and 0 for padding."""

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]


def token_rows(config: Gemma2Config, batch: int, seq: int) -> st.SearchStrategy[list[list[int]]]:
    """Draw `batch` rows of `seq` tokens, without padding."""
    row = st.lists(st.integers(0, config.vocab_size - 1), min_size=seq, max_size=seq)
    return st.lists(row, min_size=batch, max_size=batch)


@st.composite
def token_batches(
    draw: st.DrawFn,
    config: Gemma2Config,
    max_batch: int = 3,
    max_seq: int = 13,
    sides: Sequence[str] = ("right", "left"),
) -> TokenBatch:
    """Draw batches of rows with padding (any tokens) on one of `sides`, and at least one real token.

    There are at most `max_batch` rows of at most `max_seq` tokens.
    """
    batch, seq = draw(st.integers(1, max_batch)), draw(st.integers(1, max_seq))
    ids = np.array(draw(token_rows(config, batch, seq)), np.int64)
    padded = draw(st.lists(st.integers(0, seq - 1), min_size=batch, max_size=batch))
    side = draw(st.sampled_from(sides))
    mask = np.array([padding_mask(seq, count, side) for count in padded], np.int64)
    return TokenBatch(ids, mask)


def padding_mask(seq: int, padded: int, side: str) -> list[int]:
    """Return one row of a mask over `seq` tokens, with `padded` padding tokens on the `side`, ``left`` or ``right``.

    Examples
    --------
    >>> padding_mask(4, 1, "left")
    [0, 1, 1, 1]
    """
    real = [1] * (seq - padded)
    return [0] * padded + real if side == "left" else real + [0] * padded


@st.composite
def positions(draw: st.DrawFn, seq: int, limit: int = 8192) -> npt.NDArray[np.int64]:
    """Draw increasing rotary positions ``(1, seq)`` below `limit`, with any start and with gaps."""
    room = limit - seq
    start = draw(st.integers(0, room))
    gaps = draw(st.lists(st.integers(0, max(0, (room - start) // max(seq, 1))), min_size=seq, max_size=seq))
    places: npt.NDArray[np.int64] = (start + np.arange(seq) + np.cumsum(gaps))[None]
    return places


@st.composite
def cache_splits(draw: st.DrawFn, n: int) -> list[int]:
    """Draw the lengths of calls that together read `n` tokens: a prefill, chunks, single tokens.

    Examples shrink towards few calls. Possible results: ``[13]``, ``[9, 1, 1, 1, 1]``, ``[4, 6, 3]``.
    """
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=n - 1))) if n > 1 else []
    return [end - start for start, end in pairwise([0, *cuts, n])]


_INFINITE = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
_UNSIGNED = {"float64": np.uint64, "float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


def from_bits(bits: Sequence[int], dtype: str) -> Array:
    """Return the numbers with these bit patterns in `dtype`.

    Examples
    --------
    >>> from_bits([0x3F80, 0xC000], "bfloat16")
    BF16([ 1., -2.], dtype=float32)
    """
    kept = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return as_dtype(np.array(bits, _UNSIGNED[dtype]).view(kept), dtype)


@st.composite
def activations(draw: st.DrawFn, dtype: str = "float32", size: int = 8, finite: bool = True) -> Array:
    """Draw `size` numbers with any bit patterns of `dtype`: subnormal, huge, both zeros; also infinity and NaN unless
    `finite`."""
    width = np.dtype(_UNSIGNED[dtype]).itemsize * 8
    numbers = st.integers(0, 2**width - 1)
    if finite:
        numbers = numbers.filter(lambda bits: bool(np.isfinite(from_bits([bits], dtype)[0])))
    else:  # only two patterns are infinite, which are too few to occur by chance
        numbers |= st.sampled_from([_INFINITE[dtype], _INFINITE[dtype] | 1 << (width - 1)])
    return from_bits(draw(st.lists(numbers, min_size=size, max_size=size)), dtype)


# --- text -------------------------------------------------------------------------------------------------------------


def texts(max_size: int = 40) -> st.SearchStrategy[str]:
    """Draw text from all of Unicode that UTF-8 can encode, with special tokens, similar texts, and runs of spaces.

    A text has up to five parts; a part with arbitrary characters has at most `max_size`.
    """
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=max_size)
    parts = st.one_of(anything, st.sampled_from(LOOK_ALIKES), st.text(" ", max_size=40))
    return st.lists(parts, max_size=5).map("".join)


def chat_messages(max_turns: int = 5) -> st.SearchStrategy[list[dict[str, str]]]:
    """Draw valid conversations of at most `max_turns` turns: user and assistant alternate, beginning with the user."""
    roles = ("user", "assistant")

    def alternate(contents: list[str]) -> list[dict[str, str]]:
        return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]

    return st.lists(texts(12), min_size=1, max_size=max_turns).map(alternate)


# --- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A model and its input, small enough for a script."""

    config: Gemma2Config
    input_ids: tuple[tuple[int, ...], ...]
    kind: str = "ordinary"
    seed: int = 0

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The token ids ``(batch, seq)``."""
        return np.array(self.input_ids, np.int64)

    @property
    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """The weights, generated again at each access."""
        return tensors_of(self.config, self.kind, self.seed)

    def changed(self, **changes: Any) -> "Scene":
        """Return the scene with changed fields."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        """Return Python text that makes this scene."""
        return f"Scene({write_config(self.config)}, {self.input_ids!r}, kind={self.kind!r}, seed={self.seed})"


@st.composite
def scenes(
    draw: st.DrawFn,
    /,
    kinds: Sequence[str] = KINDS,
    batch: tuple[int, int] = (1, 2),
    seq: tuple[int, int] = (2, 13),
    distinct: bool = True,
    **fixed: Any,
) -> Scene:
    """Draw models with weights of any of `kinds`, and texts as input.

    Parameters
    ----------
    kinds : sequence of str
        As in `tensors_of`.
    batch, seq : (int, int)
        The minimum and maximum number of rows, and of tokens.
    distinct, **fixed
        As in `configs`.
    """
    config = draw(configs(distinct, **fixed))
    rows, length = draw(st.integers(*batch)), draw(st.integers(*seq))
    ids = draw(token_rows(config, rows, length))
    kind, seed = draw(st.sampled_from(list(kinds))), draw(st.integers(0, 2**16))
    return Scene(config, tuple(tuple(row) for row in ids), kind, seed)
