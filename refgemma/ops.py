"""Define the operations of Gemma 2, one function each. Checked against torch 2.13 / transformers 5.23 (eager),
operation by operation, in float32, bfloat16 and float16. If implementations round differently, a docstring says so.

An operation takes arrays and numbers, never a configuration. The code mentions half precision only where PyTorch
itself widens; see `refgemma.precision`.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from refgemma.precision import Array, narrow, wide
from refgemma.shapes import Mask, Positions, RotaryTable, Scores


def linear(
    x: Float[np.ndarray, "*batch in"],
    weight: Float[np.ndarray, "out in"],
    bias: Float[np.ndarray, " out"] | None = None,
) -> Float[np.ndarray, "*batch out"]:
    """Project: ``y[..., o] = sum_i x[..., i] * weight[o, i] + bias[o]``, with the weight's axes as in the checkpoint.

    In half precision the sum, including the bias, is computed in float32 and rounded once. Source:
    ``torch.nn.functional.linear``.

    Examples
    --------
    >>> linear(np.array([1.0, 2.0]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    array([1., 2., 3.])
    """
    if bias is None:
        y: Array = x @ weight.T
        return y
    return narrow(wide(x) @ wide(weight).T + wide(bias), like=x)


def rms_norm(
    x: Float[np.ndarray, "*batch hidden"], weight: Float[np.ndarray, " hidden"], eps: float
) -> Float[np.ndarray, "*batch hidden"]:
    """Divide by the root mean square, then scale: ``y = x / sqrt(mean(x**2) + eps) * (1 + weight)``.

    The stored weight is an offset from one. All steps use (at least) float32, and the result is rounded once at the
    end: Llama rounds before multiplying by the weight, Gemma after. Source: transformers ``Gemma2RMSNorm``; Zhang and
    Sennrich 2019, arXiv:1910.07467.

    Examples
    --------
    >>> rms_norm(np.array([3.0, 4.0]), np.zeros(2), eps=0.0).round(4)
    array([0.8485, 1.1314])
    """
    x_wide = wide(x)
    mean_square = np.mean(x_wide * x_wide, axis=-1, keepdims=True)
    normed = x_wide * (1 / np.sqrt(mean_square + eps))
    return narrow(normed * (1 + wide(weight)), like=x)


def inverse_frequencies(head_dim: int, theta: float) -> Float[np.ndarray, " half"]:
    """Return the rotary angle per position for each pair of a head: ``theta ** (-2 i / head_dim)``.

    They are float32 in every precision. This is part of the model: at position 8192, rounding the frequencies
    differently changes the cosine by 1e-3. So the formula is ``float32(1) / float32(float64 power)``, which agrees with
    torch; a float32 power differs by an ulp in many entries. Source: transformers ``Gemma2RotaryEmbedding``.

    Examples
    --------
    >>> inverse_frequencies(head_dim=4, theta=10000.0)
    array([1.  , 0.01], dtype=float32)
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers: Array = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def rotary_tables(positions: Positions, head_dim: int, theta: float, like: Array) -> tuple[RotaryTable, RotaryTable]:
    """Return cosines and sines of the angles ``position * inverse_frequency[i]``, which encode the position of a token.

    A query and a key are rotated by the angles of their positions (see `rotate`), so their product depends on the
    distance between them. Angle ``i`` rotates a pair of numbers, one in each half of a head. So the table has each
    angle twice: at ``i`` and at ``i + head_dim / 2``.

    The angles are float32 in every precision, like `inverse_frequencies`; the tables have the precision of `like`.
    Source: transformers ``Gemma2RotaryEmbedding``; Su et al. 2021, arXiv:2104.09864.

    Returns
    -------
    cos, sin : arrays of shape ``(batch, 1, seq, head_dim)``
        The axis of length 1 is for the heads, which all have the same angles.

    Examples
    --------
    >>> cos, sin = rotary_tables(np.array([[0, 1]]), head_dim=2, theta=10000.0, like=np.zeros(0))
    >>> cos[0, 0].round(4)
    array([[1.    , 1.    ],
           [0.5403, 0.5403]])
    """
    frequencies = inverse_frequencies(head_dim, theta)
    half = positions[:, None, :, None].astype(np.float32) * frequencies  # (batch, 1, seq, head_dim / 2)
    angles = np.concatenate([half, half], axis=-1).astype(np.float64)  # float64, so that only the result is rounded
    return narrow(np.cos(angles), like), narrow(np.sin(angles), like)


def rotate(
    x: Float[np.ndarray, "batch any_heads seq head_dim"], cos: RotaryTable, sin: RotaryTable
) -> Float[np.ndarray, "batch any_heads seq head_dim"]:
    """Rotate each pair ``(x[i], x[i + head_dim/2])`` by its angle: ``x * cos + (-second half, first half) * sin``.

    The two numbers of a pair are half a head apart, not side by side. Half precision has three roundings: two products
    and their sum. Source: transformers ``apply_rotary_pos_emb``.

    Examples
    --------
    >>> quarter_turn = np.full((1, 1, 1, 2), np.pi / 2)
    >>> rotate(np.array([[[[1.0, 0.0]]]]), np.cos(quarter_turn), np.sin(quarter_turn)).round(6)
    array([[[[0., 1.]]]])
    """
    first, second = np.split(x, 2, axis=-1)
    turned: Array = x * cos + np.concatenate([-second, first], axis=-1) * sin
    return turned


def repeat_kv(x: Float[np.ndarray, "batch kv_heads keys head_dim"], groups: int) -> Array:
    """Give every query head its key/value head: query head ``h`` uses key/value head ``h // groups``.

    `groups` is the number of query heads that share one key/value head, 2 in every released Gemma 2. Heads are repeated
    in place (0, 0, 1, 1), not tiled (0, 1, 0, 1). Nothing is rounded. Source: transformers ``repeat_kv``; Ainslie et
    al. 2023, arXiv:2305.13245.

    Examples
    --------
    >>> repeat_kv(np.arange(2.0).reshape(1, 2, 1, 1), groups=2).ravel()
    array([0., 0., 1., 1.])
    """
    return np.repeat(x, groups, axis=1)


def soft_cap(x: Float[np.ndarray, "*shape"], cap: float | None) -> Float[np.ndarray, "*shape"]:
    """Limit smoothly to plus and minus `cap`: ``cap * tanh(x / cap)``; with ``None``, return `x` unchanged.

    Half precision has three roundings, because PyTorch launches three kernels. Scores are capped *before* they are
    masked. After masking, the minus infinity of a masked key would become ``-cap``, and the key would be visible.
    Source: transformers ``eager_attention_forward`` and ``Gemma2ForCausalLM``; Bello et al. 2016, arXiv:1611.09940.

    Examples
    --------
    >>> soft_cap(np.array([1.0, 50.0, 1000.0]), cap=50.0).round(3)
    array([ 1.  , 38.08, 50.  ])
    """
    return x if cap is None else np.tanh(x / cap) * cap


def attention_scores(
    q: Float[np.ndarray, "batch heads seq head_dim"], k: Float[np.ndarray, "batch heads keys head_dim"], scale: float
) -> Scores:
    """Score how well each query matches each key: ``scale * (q . k)``.

    The product is scaled, not the query, as in transformers. Other implementations scale the query first, which rounds
    differently in half precision. Source: transformers ``eager_attention_forward``; Vaswani et al. 2017,
    arXiv:1706.03762.

    Examples
    --------
    >>> attention_scores(np.array([[[[3.0, 4.0]]]]), np.array([[[[1.0, 0.0], [0.0, 1.0]]]]), scale=0.5)
    array([[[[1.5, 2. ]]]])
    """
    scores: Array = (q @ k.swapaxes(-1, -2)) * scale
    return scores


def causal_mask(q_places: Int[np.ndarray, " seq"], k_places: Int[np.ndarray, " keys"]) -> Bool[Array, "seq keys"]:
    """Return the mask of a full layer: a query may see keys at its own place or before, ``k <= q``.

    A token's place is its number in the sequence, including padding. So prefill, a prompt in pieces and decoding are
    the same case, with different places. Source: transformers ``masking_utils.causal_mask_function``.

    Examples
    --------
    >>> causal_mask(np.array([2, 3]), np.arange(4)).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 1]])
    """
    return k_places <= q_places[:, None]


def sliding_mask(
    q_places: Int[np.ndarray, " seq"], k_places: Int[np.ndarray, " keys"], window: int
) -> Bool[Array, "seq keys"]:
    """Return the mask of a sliding layer: a query may see the last `window` keys, ``q - window < k <= q``.

    Source: transformers ``masking_utils.sliding_window_overlay``; Beltagy et al. 2020, arXiv:2004.05150.

    Examples
    --------
    >>> sliding_mask(np.arange(4), np.arange(4), window=2).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 1, 1]])
    """
    return causal_mask(q_places, k_places) & (k_places > q_places[:, None] - window)


def softmax(scores: Scores, mask: Mask) -> Scores:
    """Return weights over the visible keys: ``p[j] = exp(s[j]) / sum_k exp(s[k])``, and 0 where the mask is false.

    Computed in (at least) float32 and rounded once. Only a padding token's query may see no key at all; it then weighs
    all keys equally. No real token sees a padding token, so such a row affects no real row. PyTorch gives the same
    weights in float32 and bfloat16, but other weights in float16 and NaN in float64. So compare only the rows of real
    tokens. Source: transformers ``eager_attention_forward``.

    Examples
    --------
    >>> softmax(np.zeros((1, 1, 2, 2)), np.array([[[[True, False], [True, True]]]]))[0, 0]
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    # Use the lowest finite number, because minus infinity would make a row without visible keys NaN.
    lowest = np.finfo(scores.dtype).min
    masked = np.where(mask, wide(scores), lowest)
    exponentials = np.exp(masked - np.max(masked, axis=-1, keepdims=True))  # at most 1, so nothing overflows
    return narrow(exponentials / np.sum(exponentials, axis=-1, keepdims=True), like=scores)


def gelu_tanh(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Compute the tanh form of GELU: ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))``.

    The exact form, with the error function, differs by up to 5e-4. Half precision has one rounding. Source:
    ``torch.nn.functional.gelu(approximate="tanh")``; Hendrycks and Gimpel 2016, arXiv:1606.08415.

    Examples
    --------
    >>> gelu_tanh(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1588,  0.    ,  0.8412])
    """
    x_wide = wide(x)
    cube = x_wide * x_wide * x_wide  # x**3 calls pow: twelve times slower, and not more exact
    inner = math.sqrt(2 / math.pi) * (x_wide + 0.044715 * cube)
    # For x below -3, all digits except the last cancel in 1 + tanh. tanh uses float64, so that the last digit is right.
    tanh = np.tanh(inner.astype(np.float64)).astype(x_wide.dtype)
    return narrow(0.5 * x_wide * (1 + tanh), like=x)
