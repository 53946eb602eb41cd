"""Draw pictures of Gemma 2, and compute the numbers for them.

Checked by tests that read the numbers back from the drawing, and look for truncated text.

Every picture function draws into `axes`, or into a new figure, writes `title` above, and returns the axes. `tokens` are
the texts of the input tokens, `names` the texts of the whole vocabulary. `with_sliders` and `array_view` make
interactive pictures. The first picture imports matplotlib: ``pip install "refgemma[viz]"``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from refgemma.config import Gemma2Config
from refgemma.errors import explain_renames
from refgemma.files import pluralise
from refgemma.model import Forward, head
from refgemma.ops import rms_norm, rotary_tables, soft_cap
from refgemma.precision import Array, as_float64, wide
from refgemma.weights.parameters import Weights

Axes: TypeAlias = Any  # matplotlib.axes.Axes, which is not imported here
__getattr__ = explain_renames(__name__, shown="show_blanks", likeliest="most_likely_tokens")

# --- numbers ----------------------------------------------------------------------------------------------------------


def residual_streams(run: Forward) -> Float[np.ndarray, "depth batch seq hidden"]:
    """Return the residual stream before the first block and after each; ``depth`` is the number of finished blocks.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> residual_streams(refgemma.forward([[2, 300]], tiny.weights, tiny.config)).shape
    (7, 1, 2, 234)
    """
    return np.stack([run.embedded, *(layer.out for layer in run.layers)])


def root_mean_square(x: Float[np.ndarray, "*batch hidden"]) -> Float[np.ndarray, "*batch"]:
    """Return the root mean square of each vector: ``sqrt(mean(x**2))`` over the last axis, in at least float32.

    Examples
    --------
    >>> root_mean_square(np.array([[3.0, 4.0], [0.0, 0.0]])).round(4)
    array([3.5355, 0.    ])
    """
    return np.asarray(np.sqrt(np.mean(wide(x) ** 2, axis=-1)))


def lens_logits(run: Forward, weights: Weights, config: Gemma2Config) -> Float[np.ndarray, "depth batch seq vocab"]:
    """Return the logits after each block, by applying the model's norm and head to every residual stream.

    The last depth gives the logits of the run itself. This is called the logit lens (nostalgebraist 2020).

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> run = refgemma.forward([[2, 300]], tiny.weights, tiny.config)
    >>> lens = lens_logits(run, tiny.weights, tiny.config)
    >>> lens.shape, bool((lens[-1] == run.logits).all())
    ((7, 1, 2, 2048), True)
    """
    streams = residual_streams(run)
    return np.stack([head(rms_norm(x, weights.norm, config.rms_norm_eps), weights, config)[1] for x in streams])


def probabilities(logits: Float[np.ndarray, "*batch vocab"]) -> Float[np.ndarray, "*batch vocab"]:
    """Compute the softmax of logits: ``exp(z) / sum(exp(z))``, in at least float32.

    Examples
    --------
    >>> probabilities(np.log(np.array([1.0, 3.0])))
    array([0.25, 0.75])
    """
    scores = wide(logits)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def relative_error(x: Float[np.ndarray, "*shape"], exact: Float[np.ndarray, "*shape"]) -> float:
    """Return the root mean square of ``x - exact``, divided by the root mean square of `exact`.

    Examples
    --------
    >>> relative_error(np.array([1.01, 0.99]), np.array([1.0, 1.0]))  # doctest: +ELLIPSIS
    0.01...
    """
    apart = as_float64(x) - as_float64(exact)
    return float(np.sqrt(np.mean(apart**2) / np.mean(as_float64(exact) ** 2)))


def show_blanks(token: str) -> str:
    """Return `token` as a label in which spaces (▁ in the tokenizer) and line breaks are visible.

    Examples
    --------
    >>> show_blanks("▁time"), show_blanks(chr(10))
    ('·time', '⏎')
    """
    return token.replace("\u2581", "·").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


# --- pictures ---------------------------------------------------------------------------------------------------------


def new_axes(width: float = 6.4, height: float = 4.0) -> Axes:
    """Return the axes of a new figure, `width` by `height` inches, with room for all labels."""
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def label_tokens(axes: Axes, tokens: Sequence[str], queries: Sequence[str] | None = None) -> None:
    """Label the lower side with tokens and the left side with `queries`; if there are many, label only some."""
    for axis, texts, turned in ((axes.xaxis, tokens, 90), (axes.yaxis, queries or (), 0)):
        every = 1 + len(texts) // 40
        labels = [show_blanks(text) for text in texts[::every]]
        axis.set_ticks(range(0, len(texts), every), labels, rotation=turned, fontsize=9 if len(texts) <= 24 else 7)


def attention_map(
    probs: Float[np.ndarray, "seq keys"],
    tokens: Sequence[str],
    window: int | None = None,
    title: str = "attention",
    taken: Float[np.ndarray, "seq keys"] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the attention weights of one head: a row for each query, a column for each key.

    Parameters
    ----------
    probs : (seq, keys)
        ``run.layers[layer].attention.probs[0, head]``; rows sum to 1.
    tokens : sequence of str
        The texts of the keys; the last ``seq`` are those of the queries.
    window : int, optional
        The window of a sliding layer; a dashed line marks the first key that a query may see.
    taken : (seq, keys), optional
        The reduction of each score by the soft cap, ``attention.scores - attention.capped`` of that head. Each visible
        key gets a dot whose area is proportional to it.

    Examples
    --------
    >>> attention_map(np.array([[1.0, 0.0], [0.25, 0.75]]), ["<bos>", "Once"]).get_xlabel()
    'key: the token looked at'
    """
    seq, keys = probs.shape
    queries = tokens[keys - seq :]
    axes = axes or new_axes(np.clip(0.32 * keys + 2.2, 4.2, 9.0), np.clip(0.32 * seq + 1.6, 2.6, 8.0))
    image = axes.imshow(wide(probs), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="attention weight")
    label_tokens(axes, tokens, queries)
    if window is not None and window < keys:
        # Query q sees keys from q - window + 1 on; the left edge of that cell is half a cell earlier.
        edge = np.arange(seq) + keys - seq - window + 0.5
        sides = np.ravel([(query - 0.5, query + 0.5) for query in range(seq)])
        axes.plot(np.repeat(edge, 2), sides, "--", color="tab:red")
        axes.set_xlim(-0.5, keys - 0.5)
    if taken is not None:
        rows, columns = np.nonzero(wide(probs))
        sizes = np.abs(wide(taken))[rows, columns]
        most = max(float(sizes.max()), 1e-30)
        axes.scatter(
            columns, rows, 80 * sizes / most, color="tab:orange", label=f"reduced by the cap, at most {most:.2g}"
        )
        axes.legend(loc="upper right")  # no key is visible there
    axes.set(xlabel="key: the token looked at", ylabel="query: the token that looks", title=title)
    return axes


def mask_picture(
    mask: Bool[np.ndarray, "seq keys"],
    q_places: Int[np.ndarray, " seq"],
    k_places: Int[np.ndarray, " keys"],
    title: str = "mask",
    axes: Axes | None = None,
) -> Axes:
    """Draw a mask: dark cells are the keys that each query may see.

    Examples
    --------
    >>> places = np.arange(4)
    >>> mask_picture(places <= places[:, None], places, places).get_ylabel()
    'place of the query'
    """
    axes = axes or new_axes(
        np.clip(0.22 * len(k_places) + 1.2, 3.2, 8.0), np.clip(0.22 * len(q_places) + 1.2, 2.2, 8.0)
    )
    axes.pcolormesh(mask[:, :], cmap="Blues", vmin=0, vmax=1.4, edgecolors="white", linewidth=0.5)
    for axis, places in ((axes.xaxis, k_places), (axes.yaxis, q_places)):
        every = 1 + (len(places) - 1) // 12
        axis.set_ticks(np.arange(len(places))[::every] + 0.5, [str(place) for place in places[::every]])
    axes.invert_yaxis()
    axes.set(xlabel="place of the key", ylabel="place of the query", title=title, aspect="equal")
    return axes


def rotary_phases(
    positions: Int[np.ndarray, " seq"], head_dim: int, theta: float = 10000.0, axes: Axes | None = None
) -> Axes:
    """Draw the cosine of every rotary angle (a row) at every position (a column); fast angles are at the top.

    `theta` is the base of the angles, 10000 in Gemma 2.

    Examples
    --------
    >>> rotary_phases(np.arange(8), head_dim=4).get_ylabel()
    'pair of numbers'
    """
    cos, _ = rotary_tables(positions[None], head_dim, theta, np.zeros(0, np.float32))
    axes = axes or new_axes()
    image = axes.imshow(cos[0, 0, :, : head_dim // 2].T, cmap="RdBu", vmin=-1, vmax=1, aspect="auto",
                        extent=(positions[0] - 0.5, positions[-1] + 0.5, head_dim // 2 - 0.5, -0.5),
                        interpolation="nearest")  # fmt: skip
    axes.figure.colorbar(image, ax=axes, label="cosine of the angle")
    axes.set(xlabel="position", ylabel="pair of numbers", title="rotary angles: each pair turns at its own speed")
    return axes


def residual_norms(run: Forward, tokens: Sequence[str], axes: Axes | None = None) -> Axes:
    """Draw the size of the residual stream after each block, with one line for each token of the batch's first row.

    The last token's line is highlighted; the lines of the tokens before it are grey.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> run = refgemma.forward([[2, 300]], tiny.weights, tiny.config)
    >>> residual_norms(run, ["<bos>", "a"]).get_xlabel()
    'blocks done'
    """
    sizes = root_mean_square(residual_streams(run))[:, 0]  # (depth, seq)
    axes = axes or new_axes()
    before = axes.plot(sizes[:, :-1], marker="o", markersize=3, color="darkgrey")
    last = axes.plot(sizes[:, -1], marker="o", color="tab:blue")
    labels = ["tokens before", f"{len(tokens) - 1} {show_blanks(tokens[-1])}, the last token"]
    axes.set(xlabel="blocks done", ylabel="root mean square", title="size of the residual stream")
    axes.set_xticks(range(len(sizes)))
    axes.legend([*before[:1], *last], labels[-1 - bool(before) :])
    return axes


def logit_lens(
    lens: Float[np.ndarray, "depth seq vocab"],
    tokens: Sequence[str],
    names: Sequence[str],
    title: str = "logit lens: the most likely next token after each block",
    axes: Axes | None = None,
) -> Axes:
    """Draw the most likely next token after each block, shaded by its probability; the last block is at the top.

    Parameters
    ----------
    lens : (depth, seq, vocab)
        One row of the batch of `lens_logits`.
    tokens : sequence of str
        The input tokens.
    names : sequence of str
        The text of every token of the vocabulary.

    Examples
    --------
    >>> axes = logit_lens(np.log([[[0.1, 0.9]], [[0.8, 0.2]]]), ["<bos>"], ["a", "b"])
    >>> [text.get_text() for text in axes.texts]
    ['b', 'a']
    """
    shares = probabilities(lens)
    depth, seq, _ = shares.shape
    axes = axes or new_axes(max(4.5, 0.75 * seq + 1.8), max(2.5, 0.36 * depth + 1.6))
    image = axes.imshow(shares.max(axis=-1), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.figure.colorbar(image, ax=axes, label="probability")
    for row, column in np.ndindex(depth, seq):
        best = int(shares[row, column].argmax())
        dark = shares[row, column, best] > 0.5
        axes.text(column, row, show_blanks(names[best])[:9], ha="center", va="center", fontsize=8,
                  color="white" if dark else "black")  # fmt: skip
    label_tokens(axes, tokens)
    axes.set_yticks(range(depth), range(depth))
    axes.set(xlabel="token read", ylabel="blocks done", title=title)
    return axes


def cap_curves(caps: Sequence[float] = (50.0, 30.0), reach: float = 150.0, axes: Axes | None = None) -> Axes:
    """Draw soft caps from ``-reach`` to `reach`, together with no cap and with clipping at the first cap.

    Examples
    --------
    >>> [line.get_label() for line in cap_curves([50.0]).lines]
    ['no cap', 'clipped at 50', 'soft cap 50']
    """
    x = np.linspace(-reach, reach, 601)
    axes = axes or new_axes()
    axes.plot(x, x, ":", color="grey", label="no cap")
    axes.plot(x, np.clip(x, -caps[0], caps[0]), "--", color="grey", label=f"clipped at {caps[0]:g}")
    for cap in caps:
        axes.plot(x, soft_cap(x, cap), label=f"soft cap {cap:g}")
    axes.set(xlabel="before", ylabel="after", title="cap · tanh(x / cap)", ylim=(-1.5 * max(caps), 1.5 * max(caps)))
    axes.grid(alpha=0.3)
    axes.legend()
    return axes


def rounding_growth(runs: Mapping[str, Forward], exact: Forward, axes: Axes | None = None) -> Axes:
    """Draw the relative error of each run's residual stream after each block, compared with the `exact` run.

    Parameters
    ----------
    runs : mapping
        Name of a precision -> a run in this precision.
    exact : Forward
        The same tokens in float64.

    Examples
    --------
    >>> import refgemma
    >>> models = [refgemma.load("tiny", dtype) for dtype in ("float32", "float64")]
    >>> rough, exact = (refgemma.forward([[2, 300]], model.weights, model.config) for model in models)
    >>> rounding_growth({"float32": rough}, exact).get_yscale()
    'log'
    """
    axes = axes or new_axes()
    truth = residual_streams(exact)
    for name, run in runs.items():
        errors = [relative_error(x, y) for x, y in zip(residual_streams(run), truth, strict=True)]
        axes.plot(errors, marker="o", label=name)
    axes.set(xlabel="blocks done", ylabel="relative error", yscale="log", title="rounding error, compared with float64")
    axes.set_xticks(range(len(truth)))
    axes.grid(alpha=0.3)
    axes.legend()
    return axes


def most_likely_tokens(
    logits: Float[np.ndarray, " vocab"],
    names: Sequence[str],
    count: int = 12,
    title: str = "the most likely next tokens",
    axes: Axes | None = None,
) -> Axes:
    """Draw bars with the probabilities of the `count` most likely tokens.

    Examples
    --------
    >>> bars = most_likely_tokens(np.log(np.array([0.2, 0.7, 0.1])), ["a", "b", "c"], count=2).patches
    >>> [round(float(bar.get_width()), 2) for bar in bars]
    [0.7, 0.2]
    """
    shares = probabilities(logits)
    best = np.argsort(-shares, kind="stable")[:count]
    axes = axes or new_axes(5.6, 0.26 * len(best) + 1.2)
    axes.barh(range(len(best)), shares[best], color="tab:blue")
    axes.set_yticks(range(len(best)), [show_blanks(names[token]) for token in best])
    axes.invert_yaxis()
    axes.set(xlabel="probability", title=title)
    return axes


# --- interactive pictures ---------------------------------------------------------------------------------------------


def with_sliders(draw: Callable[..., Axes], **choices: Sequence[Any]) -> Axes:
    """Draw the picture for the first value of each of the `choices`; in Jupyter, add a slider for each.

    There are no sliders without ipywidgets, outside Jupyter, or if a program runs the notebook, for example to build
    the site.

    Parameters
    ----------
    draw : callable
        Function that takes one value for each of the `choices`, by name, and returns the axes of a new figure.
    **choices : sequence
        The values of each slider.

    Returns
    -------
    axes
        The axes of the first picture.

    Examples
    --------
    >>> axes = with_sliders(lambda cap: cap_curves([cap]), cap=[50.0, 30.0, 5.0])
    >>> axes.lines[-1].get_label()
    'soft cap 50'
    """
    axes = draw(**{name: values[0] for name, values in choices.items()})
    if _can_show_sliders():
        _show_with_sliders(axes, draw, choices)
    return axes


def array_view(x: Array, axes: str) -> Any:
    """Return a view of `x` with a coloured square for each number; hover over a square to see the number and its index.

    Rows are the second last axis, columns the last. Earlier axes are drawn side by side and below one another. The
    middle of a large array is omitted. The result is an object of treescope (``pip install "refgemma[viz]"``). Jupyter
    shows the object directly; ``treescope.render_to_html`` writes it as a page.

    Parameters
    ----------
    x : array
        An array of any precision, with at least one axis.
    axes : str
        The names of the array's axes, as in `refgemma.trace.names.trace_axes`: ``"batch heads seq keys"``.

    Raises
    ------
    ValueError
        If the number of names differs from the number of axes of `x`.

    Examples
    --------
    >>> import treescope
    >>> view = array_view(np.eye(3), "seq keys")
    >>> "seq: 3" in treescope.render_to_html(view, compressed=False)
    True
    """
    names = axes.split()
    if len(names) != x.ndim:
        raise ValueError(f"axes has {pluralise(len(names), 'name')} ({axes}); the array has {x.ndim} axes: {x.shape}")
    import treescope

    outwards = range(x.ndim - 1, -1, -1)
    labels = {number: f"{name}: {x.shape[number]}" for number, name in enumerate(names)}
    return treescope.render_array(
        np.asarray(wide(x)), columns=tuple(outwards[::2]), rows=tuple(outwards[1::2]), axis_labels=labels,
        trim_outliers=False, truncate=True,
    )  # fmt: skip


def _can_show_sliders() -> bool:
    """Return True if a person can use sliders; a kernel that a program runs takes no input."""
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def _show_with_sliders(first: Axes, draw: Callable[..., Axes], choices: Mapping[str, Sequence[Any]]) -> None:
    """Show the first picture, and below it sliders that replace it."""
    from IPython.display import display
    from ipywidgets import SelectionSlider, VBox
    from matplotlib import pyplot as plt

    shown_figure = display(first.figure, display_id=True)
    plt.close(first.figure)  # else Jupyter would show it again at the end of the cell
    sliders = {
        name: SelectionSlider(options=[(str(value), value) for value in values], description=name)
        for name, values in choices.items()
    }

    def draw_again(_: Any) -> None:
        figure = draw(**{name: slider.value for name, slider in sliders.items()}).figure
        shown_figure.update(figure)
        plt.close(figure)

    for slider in sliders.values():
        slider.observe(draw_again, "value")
    display(VBox(list(sliders.values())))
