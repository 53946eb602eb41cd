"""Write a run as one HTML page, where a reader chooses a token, a layer and a head, and sees the results.

Checked by tests that read the numbers back from the page, directly and in a browser, and compare them with the trace.

The page works offline, because numbers, script and style are in the file. The numbers are float32. The attention
weights equal those of the trace bit for bit, unless the trace is float64. ``explorer.html`` displays the numbers; it
computes only positions, colours, and the sum of the weights that a table omits.
"""

import base64
import hashlib
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refgemma.config import Gemma2Config
from refgemma.errors import explain_renames
from refgemma.files import escape, pluralise
from refgemma.inputs import InputError
from refgemma.model import head
from refgemma.modeling.pretrained import Pretrained
from refgemma.ops import rms_norm
from refgemma.precision import Array, wide
from refgemma.teach.viz import probabilities, show_blanks
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.trace.names import run_in_order, trace_axes
from refgemma.weights.parameters import Weights

PAGE_LIMIT = 2_000_000  # bytes of a page, so that it opens quickly and fits into a mail
TOP = 5  # number of next tokens shown after each block
TEMPLATE = Path(__file__).with_name("explorer.html")
__getattr__ = explain_renames(__name__, explored="explore_run", page="render_page", likeliest="rank_tokens",
                              packed="pack")  # fmt: skip


def page_bytes(seq: int, config: Gemma2Config) -> int:
    """Estimate the size of a page for `seq` tokens in bytes; real pages are rarely larger.

    A number takes 4 bytes, 16/3 in base64. A head has ``seq (seq + 1) / 2`` weights, because a query sees no later key.

    Examples
    --------
    >>> page_bytes(10, Gemma2Config.preset("2b")) < PAGE_LIMIT < page_bytes(100, Gemma2Config.preset("2b"))
    True
    """
    layers, depths = config.num_hidden_layers, config.num_hidden_layers + 1
    shares = layers * config.num_attention_heads * seq * (seq + 1) // 2
    sizes = (len(dict(trace_axes())) * layers + depths) * seq
    answers = depths * TOP * seq
    # An answer is a probability, an id and, once per token, a text. The page without numbers has 40,000 bytes.
    return 16 * (shares + sizes) // 3 + answers * (6 + 8 + 32) + 40_000


def most_tokens(config: Gemma2Config) -> int:
    """Return the number of tokens that fit on a page of `PAGE_LIMIT` bytes.

    Examples
    --------
    >>> most_tokens(Gemma2Config.preset("2b"))
    50
    """
    seq = 0
    while page_bytes(seq + 1, config) <= PAGE_LIMIT:
        seq += 1
    return seq


def check_length(seq: int, config: Gemma2Config) -> None:
    """Raise `InputError` if `seq` tokens do not fit on a page; call this before reading weights."""
    if page_bytes(seq, config) > PAGE_LIMIT:
        raise InputError(
            f"the prompt has {pluralise(seq, 'token')}; with this model a page of {PAGE_LIMIT / 1e6:g} MB "
            f"holds at most {most_tokens(config)}; give a shorter prompt"
        )


def token_sizes(x: Array) -> npt.NDArray[np.float64]:
    """Return the root mean square of each token's numbers in `x`, whose second last axis is ``seq``.

    Examples
    --------
    >>> token_sizes(np.array([[[3.0, 4.0], [0.0, 0.0]]])).round(4)
    array([3.5355, 0.    ])
    """
    rows = np.moveaxis(np.asarray(wide(x[0]), np.float64), -2, 0)
    return np.asarray(np.sqrt(np.mean(rows.reshape(len(rows), -1) ** 2, axis=-1)))


def rank_tokens(stream: Array, weights: Weights, config: Gemma2Config) -> tuple[Array, Array]:
    """Apply the head to `stream`; return the `TOP` most likely tokens and their probabilities, both ``(seq, TOP)``."""
    shares = probabilities(head(rms_norm(stream, weights.norm, config.rms_norm_eps), weights, config)[1][0])
    best = np.argsort(-shares, axis=-1, kind="stable")[:, :TOP]
    return best, np.take_along_axis(shares, best, axis=-1)


def pack(numbers: Sequence[Array] | Array) -> str:
    """Return the `numbers` in the format of the page: float32, little endian, in base64.

    Examples
    --------
    >>> pack(np.array([1.0]))
    'AACAPw=='
    """
    return base64.b64encode(np.asarray(numbers).astype("<f4").tobytes()).decode("ascii")


def _make_labels(model: Pretrained) -> Callable[[Array], list[str]]:
    """Return a function that labels ids by their pieces, or by the ids themselves if the model has no tokenizer."""
    if not model.has_tokenizer:
        return lambda ids: [f"#{token}" for token in ids.tolist()]
    tokenizer: Tokenizer = model.tokenizer
    return lambda ids: [show_blanks(piece) for piece in tokenizer.convert_ids_to_tokens(ids.tolist())]


def explore_run(ids: Sequence[int], model: Pretrained, name: str, dtype: str) -> dict[str, Any]:
    """Run `model` on `ids`, with one block in memory at a time, and return the numbers of a page.

    Parameters
    ----------
    ids : sequence of int
        The token ids of the prompt.
    model : Pretrained
        The model to run.
    name, dtype : str
        The names of the model and its precision on the page.

    Returns
    -------
    dict
        The input of ``explorer.html``. Arrays are encoded by `pack`: ``attention`` is ``(layers, heads, seq (seq + 1) /
        2)`` with the keys up to each query's own; ``residual`` is ``(depth, seq)``; ``sizes`` of a tensor is ``(layers,
        seq)``; ``answers`` is ``(depth, seq, TOP)``. Depth is the number of finished blocks.

    Raises
    ------
    InputError
        If an id is outside the vocabulary, or more ids are given than fit on a page.

    Examples
    --------
    >>> import refgemma
    >>> run = explore_run([2, 300, 301], refgemma.load("tiny"), "tiny", "float32")
    >>> run["tokens"][0], run["heads"], len(run["layers"])
    ('<bos>', 6, 6)
    """
    config, seq = model.config, len(ids)
    check_length(seq, config)
    lower = np.tril_indices(seq)
    attention: list[Array] = []
    residual: list[Array] = []
    answers: list[tuple[Array, Array]] = []
    sizes: dict[str, list[Array]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for full_name, tensor in run_in_order(np.array([ids]), model.weights, config):
        _, layer, field = full_name.split(".", 2) if full_name.startswith("layers.") else ("", "", full_name)
        template = f"layers.N.{field}" if layer else field
        sizes.setdefault(template, []).append(token_sizes(tensor))
        shapes[template] = tensor.shape
        if field == "attention.probs":
            attention.append(np.asarray(wide(tensor[0]))[:, *lower])
        if field in ("embedded", "out"):
            residual.append(sizes[template][-1])
            answers.append(rank_tokens(tensor, model.weights, config))
    texts = _make_labels(model)
    best = np.stack([tokens for tokens, _ in answers])
    known = np.unique(best)
    windows = [config.sliding_window if config.is_sliding(n) else None for n in range(config.num_hidden_layers)]
    return {
        "model": escape(name),
        "dtype": dtype,
        "ids": list(ids),
        "tokens": texts(np.array(ids)),
        "heads": config.num_attention_heads,
        "groups": config.num_attention_heads // config.num_key_value_heads,
        "layers": windows,
        "attention": pack(attention),
        "residual": pack(residual),
        "answers": {"ids": best.tolist(), "shares": pack([shares for _, shares in answers])},
        "texts": dict(zip(known.tolist(), texts(known), strict=True)),
        "tensors": [
            {"name": template, "axes": axes, "shape": list(shapes[template]), "sizes": pack(sizes[template])}
            for template, axes in trace_axes()
        ],
    }


def render_page(run: dict[str, Any]) -> str:
    """Return the whole page as text.

    Parameters
    ----------
    run : dict
        The result of `explore_run`.

    Returns
    -------
    str
        The HTML; markup in the prompt is escaped.

    Raises
    ------
    InputError
        If the page is larger than `PAGE_LIMIT`, because of unusually long tokens.

    Examples
    --------
    >>> import refgemma
    >>> render_page(explore_run([2, 300], refgemma.load("tiny"), "tiny", "float32"))[:15]
    '<!doctype html>'
    """
    # Only "<" can end a script element; \\u003c is the same character in JSON.
    data = json.dumps(run, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(escape(f"{run['model']}: {' '.join(run['tokens'][1:9])}"))
    template = TEMPLATE.read_text("utf-8")
    script = template.split("<script>")[1].split("</script>")[0]  # the only script that the page's own policy allows
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    before, rest = template.replace("{{hash}}", digest).split("{{title}}")
    middle, after = rest.split("{{run}}")
    whole = before + title + middle + data + after
    if len(whole.encode()) > PAGE_LIMIT:
        raise InputError(f"the page is larger than {PAGE_LIMIT / 1e6:g} MB; use a shorter prompt")
    return whole
