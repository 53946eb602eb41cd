"""Define every operation with a gradient, and three laws for gradients.

Checked by the defects in test_backward_golden.py; each breaks a law.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from refgemma import activations, backward, heads, layers, model, ops
from refgemma.activations import ACTIVATIONS
from refgemma.cache import LayerCache
from refgemma.config import FULL, SLIDING, Gemma2Config
from refgemma.weights.parameters import LayerWeights, Score, layer_tensors, tensor_shapes, weights_of

EPS = 2.0**-52
STEP = 2.0**-17  # near the cube root of EPS, where truncation and rounding of a central difference are of one size


def without_checks(module: Any) -> Any:
    """Import a module again without checking its annotations, so that it takes complex numbers."""
    spec = importlib.util.spec_from_file_location(f"plain_{module.__name__.rpartition('.')[2]}", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


PLAIN = without_checks(ops)


@dataclass(frozen=True)
class Operation:
    """A function of float64 arrays, and its gradient, a function of `refgemma.backward` that is looked up at each
    call."""

    forward: Callable[..., Any]
    backward: Callable[..., tuple[Any, ...]]  # (grad, *inputs) -> the gradient of each input
    draw: Callable[[np.random.Generator], list[Any]]
    gradient: str  # the name of the function under test
    plain: Callable[..., Any] | None = None  # the same for complex numbers, if there is such a function


def size(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 5))


def arrays(*shapes: tuple[int, ...], scale: float = 1.0) -> Callable[[np.random.Generator], list[Any]]:
    return lambda rng: [scale * rng.standard_normal(shape) for shape in shapes]


def no_bend(rng: np.random.Generator) -> list[Any]:
    """Return numbers away from 0 and 6, where the relu functions have no derivative."""
    x = rng.standard_normal(12) * 4
    return [np.where(np.minimum(np.abs(x), np.abs(x - 6)) < 0.01, 1.0, x)]


def draw_linear(rng: np.random.Generator) -> list[Any]:
    inside, out = size(rng), size(rng)
    return [rng.standard_normal(shape) for shape in ((2, size(rng), inside), (out, inside), (out,))]


def draw_scores(rng: np.random.Generator) -> list[Any]:
    heads, dim = size(rng), size(rng)
    return [rng.standard_normal((2, heads, size(rng), dim)) for _ in range(2)]


MASK = np.tri(4, 5, dtype=bool)[None, None]  # every query sees a key
COS, SIN = np.cos(np.arange(12.0)).reshape(1, 1, 3, 4), np.sin(np.arange(12.0) + 1).reshape(1, 1, 3, 4)
IDS = np.array([[2, 0, 2], [3, 2, 1]])
LABELS = np.array([1, -100, 0, 2])

SHARES = np.array([0.0, 0.25, 1.0])


def plain_cross_entropy(logits: Any, labels: Any, num_items: float) -> Any:
    """Compute the definition of `heads.cross_entropy`, for small complex numbers."""
    counted = np.flatnonzero(labels != -100)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_probs[counted, labels[counted]].sum() / num_items


def plain_binary_cross_entropy(logits: Any, labels: Any) -> Any:
    return np.mean(np.log(1 + np.exp(logits)) - logits * labels)


def classify(labels: Any, kind: str, plain: Callable[..., Any]) -> Operation:
    """Return the loss of a sequence classifier for labels of one problem type."""
    return Operation(
        lambda z: np.array(heads.sequence_classification_loss(z, labels, kind)),
        lambda g, z: (g * backward.sequence_classification_loss_backward(z, labels, kind),), arrays((2, 3)),
        "sequence_classification_loss_backward", plain,
    )  # fmt: skip


OPERATIONS: dict[str, Operation] = {
    "linear": Operation(
        ops.linear, lambda g, x, w, b: backward.linear_backward(g, x, w, b), draw_linear, "linear_backward",
        lambda x, w, b: PLAIN.linear(x, w) + b,
    ),
    "rms_norm": Operation(
        lambda x, w: ops.rms_norm(x, w, 0.1), lambda g, x, w: backward.rms_norm_backward(g, x, w, 0.1),
        arrays((2, 3, 5), (5,)), "rms_norm_backward", lambda x, w: PLAIN.rms_norm(x, w, 0.1),
    ),
    "rotate": Operation(
        lambda x: ops.rotate(x, COS, SIN), lambda g, x: (backward.rotate_backward(g, COS, SIN),),
        arrays((1, 2, 3, 4)), "rotate_backward", lambda x: PLAIN.rotate(x, COS, SIN),
    ),
    "repeat_kv": Operation(
        lambda x: ops.repeat_kv(x, 3), lambda g, x: (backward.repeat_kv_backward(g, 3),), arrays((2, 2, 3, 2)),
        "repeat_kv_backward", lambda x: PLAIN.repeat_kv(x, 3),
    ),
    "soft_cap": Operation(
        lambda x: ops.soft_cap(x, 2.0), lambda g, x: (backward.soft_cap_backward(g, x, 2.0),),
        lambda rng: [rng.standard_normal(9) * 3], "soft_cap_backward", lambda x: PLAIN.soft_cap(x, 2.0),
    ),
    "no cap": Operation(
        lambda x: ops.soft_cap(x, None), lambda g, x: (backward.soft_cap_backward(g, x, None),), arrays((9,)),
        "soft_cap_backward", lambda x: PLAIN.soft_cap(x, None),
    ),
    "attention_scores": Operation(
        lambda q, k: ops.attention_scores(q, k, 0.3),
        lambda g, q, k: backward.attention_scores_backward(g, q, k, 0.3), draw_scores, "attention_scores_backward",
        lambda q, k: PLAIN.attention_scores(q, k, 0.3),
    ),
    "softmax": Operation(
        lambda s: ops.softmax(s, MASK), lambda g, s: (backward.softmax_backward(g, ops.softmax(s, MASK)),),
        lambda rng: [rng.standard_normal((1, 2, 4, 5)) * 3], "softmax_backward", lambda s: PLAIN.softmax(s, MASK),
    ),
    "embed": Operation(
        lambda table: model.embed(IDS, table), lambda g, table: (backward.embed_backward(g, IDS, 5, None),),
        arrays((5, 7)), "embed_backward", lambda table: table[IDS] * np.sqrt(7),
    ),
    "cross_entropy": Operation(
        lambda z: np.array(heads.cross_entropy(z, LABELS)),
        lambda g, z: (g * backward.cross_entropy_backward(z, LABELS),), arrays((4, 3)), "cross_entropy_backward",
        lambda z: plain_cross_entropy(z, LABELS, 3),
    ),
    "cross_entropy of a part": Operation(
        lambda z: np.array(heads.cross_entropy(z, LABELS, 10)),
        lambda g, z: (g * backward.cross_entropy_backward(z, LABELS, 10),), arrays((4, 3)), "cross_entropy_backward",
        lambda z: plain_cross_entropy(z, LABELS, 10),
    ),
    "causal_lm_loss": Operation(
        lambda z: np.array(heads.causal_lm_loss(z, IDS)), lambda g, z: (g * backward.causal_lm_loss_backward(z, IDS),),
        arrays((2, 3, 4)), "causal_lm_loss_backward",
        lambda z: plain_cross_entropy(z[:, :-1].reshape(-1, 4), IDS[:, 1:].ravel(), 4),
    ),
    "mean_squared_error": Operation(
        lambda z: np.array(heads.mean_squared_error(z, LABELS / 50)),
        lambda g, z: (g * backward.mean_squared_error_backward(z, LABELS / 50),), arrays((4,)),
        "mean_squared_error_backward", lambda z: np.mean((z - LABELS / 50) ** 2),
    ),
    "binary_cross_entropy": Operation(
        lambda z: np.array(heads.binary_cross_entropy(z, SHARES)),
        lambda g, z: (g * backward.binary_cross_entropy_backward(z, SHARES),), arrays((3,)),
        "binary_cross_entropy_backward", lambda z: plain_binary_cross_entropy(z, SHARES),
    ),
    "regression": classify([[1.0, -2.0, 0.5]] * 2, "regression", lambda z: np.mean((z - [1.0, -2.0, 0.5]) ** 2)),
    "multi-label": classify([list(SHARES)] * 2, "multi_label_classification",
                            lambda z: plain_binary_cross_entropy(z, SHARES)),
    "single label": classify([2, -100], "single_label_classification",
                             lambda z: plain_cross_entropy(z, np.array([2, -100]), 1)),
}  # fmt: skip
PLAIN_ACTIVATIONS = without_checks(activations)


def plain_sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


# Activations of complex numbers by their definitions, for numbers near the real axis. GELU has none: NumPy's error
# function takes real numbers only.
COMPLEX_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu_pytorch_tanh": PLAIN_ACTIVATIONS.gelu_new,  # the same function, with other roundings
    "gelu_new": PLAIN_ACTIVATIONS.gelu_new,
    "quick_gelu": lambda x: x * plain_sigmoid(1.702 * x),
    "silu": lambda x: x * plain_sigmoid(x),
    "swish": lambda x: x * plain_sigmoid(x),
    "sigmoid": plain_sigmoid,
    "relu": lambda x: np.where(x.real > 0, x, 0),
    "relu2": lambda x: np.where(x.real > 0, x * x, 0),
    "relu6": lambda x: np.where((x.real > 0) & (x.real < 6), x, np.clip(x.real, 0, 6)),
    "leaky_relu": PLAIN_ACTIVATIONS.leaky_relu,
    "tanh": np.tanh,
    "linear": lambda x: x,
}


def activation_operation(name: str) -> Operation:
    forward = ACTIVATIONS[name]
    gradient = "gelu_tanh_backward" if forward is ops.gelu_tanh else "activation_backward"
    return Operation(
        forward, lambda g, x: (backward.activation_backward(g, x, forward),), no_bend, gradient,
        COMPLEX_ACTIVATIONS.get(name),
    )  # fmt: skip


OPERATIONS |= {f"activation {name}": activation_operation(name) for name in ACTIVATIONS}


# --- layers and the model: compositions, with the gradients of all their inputs and weights ---------------------------

SIZES = Gemma2Config(
    vocab_size=5, hidden_size=3, intermediate_size=2, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, query_pre_attn_scalar=3, sliding_window=2, attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0, layer_types=[SLIDING, FULL], attention_bias=True, pad_token_id=None,
)  # fmt: skip
# In GELU, 1 + tanh loses digits for inputs below -3, and a norm can make the rest large: weights are small here.
SCALE = 0.4
SHAPES = {name: x.shape for name, x in vars(weights_of(
    {name: np.zeros(shape) for name, shape in tensor_shapes(SIZES).items()}, SIZES
).layers[0]).items()}  # fmt: skip
IN_ATTENTION = [f"{name}_proj{end}" for end in ("", "_bias") for name in "qkvo"]
IN_MLP = ["gate_proj", "up_proj", "down_proj"]
PAST = np.random.default_rng(0).standard_normal((2, 2, 1, 2, 4))  # keys and values of two earlier tokens
ROTARY: dict[str, Any] = {
    "cos": np.tile(COS, (2, 1, 1, 1)),
    "sin": np.tile(SIN, (2, 1, 1, 1)),
    "scale": 0.3,
    "cap": 2.0,
}
SEEN = np.tile((np.tri(3, 5, 2) - np.tri(3, 5, -1)).astype(bool), (2, 1, 1, 1))

PLAIN_LAYERS = without_checks(layers)
for function in ("linear", "rms_norm", "rotate", "repeat_kv", "attention_scores", "soft_cap", "softmax"):
    vars(PLAIN_LAYERS)[function] = vars(PLAIN)[function]
vars(PLAIN_LAYERS)["extend"] = lambda past, k, v: SimpleNamespace(
    keys=np.concatenate([past[0], k], axis=2), values=np.concatenate([past[1], v], axis=2)
)


def layer_inputs(names: list[str]) -> Callable[[np.random.Generator], list[Any]]:
    """Return a function that draws the input of a layer, two rows of three tokens, and these weights."""
    return arrays((2, 3, 3), *(SHAPES[name] for name in names), scale=SCALE)


def layer_weights(names: list[str], given: tuple[Any, ...]) -> LayerWeights:
    """Return the weights of a layer; those not given are 0."""
    return LayerWeights(
        **{name: np.zeros(shape) for name, shape in SHAPES.items()} | dict(zip(names, given, strict=True))
    )


def attend(x: Any, *given: Any) -> Any:
    past = LayerCache(PAST[0], PAST[1], 0)
    return layers.attention(x, layer_weights(IN_ATTENTION, given), past=past, mask=SEEN, **ROTARY)


def attend_backward(grad: Any, x: Any, *given: Any) -> tuple[Any, ...]:
    weights = layer_weights(IN_ATTENTION, given)
    through, _, of = backward.attention_backward(grad, attend(x, *given), x, weights, **ROTARY)
    return through, *(of[name] for name in IN_ATTENTION)


def feed(x: Any, *given: Any) -> Any:
    return layers.feed_forward(x, layer_weights(IN_MLP, given), ops.gelu_tanh)


def feed_backward(grad: Any, x: Any, *given: Any) -> tuple[Any, ...]:
    through, _, of = backward.feed_forward_backward(
        grad, feed(x, *given), x, layer_weights(IN_MLP, given), ops.gelu_tanh
    )
    return through, *(of[name] for name in IN_MLP)


IN_BLOCK = list(SHAPES)


def run_block(x: Any, *given: Any) -> Any:
    past = LayerCache(PAST[0], PAST[1], 0)
    return layers.block(
        x, layer_weights(IN_BLOCK, given), past=past, mask=SEEN, activation=ops.gelu_tanh, eps=0.1, **ROTARY
    )


def run_block_backward(grad: Any, x: Any, *given: Any) -> tuple[Any, ...]:
    through, _, of = backward.block_backward(
        grad, run_block(x, *given), x, layer_weights(IN_BLOCK, given), activation=ops.gelu_tanh, eps=0.1, **ROTARY
    )
    return through, *(getattr(of, name) for name in IN_BLOCK)


def plain_weights(names: list[str], given: tuple[Any, ...]) -> Any:
    return SimpleNamespace(**dict(zip(names, given, strict=True)))


MODEL_SHAPES = tensor_shapes(SIZES)
SCORE = {"score.weight": (3, 3), "score.bias": (3,)}


def model_weights(given: tuple[Any, ...]) -> Any:
    return weights_of(dict(zip(MODEL_SHAPES, given, strict=True)), SIZES)


def run_model(*given: Any) -> Any:
    return model.forward(IDS, model_weights(given), SIZES)


def run_model_backward(grad: Any, *given: Any) -> tuple[Any, ...]:
    found = backward.backward(grad, run_model(*given), IDS, model_weights(given), SIZES).weights
    return tuple(found[name] for name in MODEL_SHAPES)


def plain_trunk(*given: Any) -> Any:
    """Compute the last norm of `run_model` for complex weights, block by block."""
    named = dict(zip(MODEL_SHAPES, given, strict=True))
    start = model.begin(IDS, model_weights(tuple(x.real for x in given)), SIZES)
    hidden = named["model.embed_tokens.weight"][IDS] * np.sqrt(3)
    for layer, kind in enumerate(SIZES.layer_types):
        weights = {field: named[name] for field, name in layer_tensors(layer, True).items()}
        places = np.arange(3)
        mask = ops.causal_mask(places, places) if kind == FULL else ops.sliding_mask(places, places, 2)
        hidden = PLAIN_LAYERS.block(
            hidden,
            SimpleNamespace(**weights),
            past=PAST[:, :, :, :0],
            cos=start.cos,
            sin=start.sin,
            mask=mask,
            scale=3**-0.5,
            cap=2.0,
            activation=PLAIN_ACTIVATIONS.gelu_new,
            eps=SIZES.rms_norm_eps,
        ).out
    return PLAIN.rms_norm(hidden, named["model.norm.weight"], SIZES.rms_norm_eps)


def plain_model(*given: Any) -> Any:
    table = given[list(MODEL_SHAPES).index("model.embed_tokens.weight")]
    return PLAIN.soft_cap(plain_trunk(*given) @ table.T, 3.0)


def plain_loss(*given: Any) -> Any:
    return plain_cross_entropy(plain_model(*given)[:, :-1].reshape(-1, 5), IDS[:, 1:].ravel(), 4)


def plain_classifier_loss(*given: Any) -> Any:
    logits = plain_trunk(*given[:-2]) @ given[-2].T + given[-1]
    return plain_cross_entropy(logits.reshape(-1, 3), IDS.ravel() % 3, 6)


def loss_of(compute: Callable[..., Any]) -> Operation:
    """Return the loss of a whole language model and its gradients, by a function that computes both."""

    def forward(*given: Any) -> Any:
        return np.array(heads.causal_lm_loss(run_model(*given).logits, IDS))

    def differentiate(grad: Any, *given: Any) -> tuple[Any, ...]:
        _, found = compute(IDS, IDS, model_weights(given), SIZES)
        weights = found if isinstance(found, dict) else found.weights
        return tuple(grad * weights[name] for name in MODEL_SHAPES)

    return Operation(forward, differentiate, arrays(*MODEL_SHAPES.values(), scale=SCALE), compute.__name__, plain_loss)


def classifier_gradients(*given: Any) -> Any:
    weights, score = model_weights(given[:-2]), Score(*given[-2:])
    return backward.compute_classifier_gradients(IDS, IDS % 3, weights, score, SIZES, each_token=True)


COMPOSED: dict[str, Operation] = {
    "attention": Operation(
        lambda *given: attend(*given).out, attend_backward, layer_inputs(IN_ATTENTION), "attention_backward",
        lambda x, *given: PLAIN_LAYERS.attention(
            x, plain_weights(IN_ATTENTION, given), past=PAST, mask=SEEN, **ROTARY).out,
    ),
    "feed_forward": Operation(
        lambda *given: feed(*given).out, feed_backward, layer_inputs(IN_MLP), "feed_forward_backward",
        lambda x, *given: PLAIN_LAYERS.feed_forward(x, plain_weights(IN_MLP, given), PLAIN_ACTIVATIONS.gelu_new).out,
    ),
    "block": Operation(
        lambda *given: run_block(*given).out, run_block_backward, layer_inputs(IN_BLOCK), "block_backward",
        lambda x, *given: PLAIN_LAYERS.block(
            x, plain_weights(IN_BLOCK, given), past=PAST, mask=SEEN, activation=PLAIN_ACTIVATIONS.gelu_new, eps=0.1,
            **ROTARY).out,
    ),
    "model": Operation(
        lambda *given: run_model(*given).logits, run_model_backward, arrays(*MODEL_SHAPES.values(), scale=SCALE),
        "backward", plain_model,
    ),
    "loss of a model": loss_of(backward.compute_gradients),
    "loss of a model, all gradients": loss_of(backward.compute_all_gradients),
    "loss of a classifier": Operation(
        lambda *given: np.array(classifier_gradients(*given)[0]),
        lambda g, *given: tuple(g * x for x in map(classifier_gradients(*given)[1].weights.__getitem__,
                                                   (*MODEL_SHAPES, *SCORE))),
        arrays(*MODEL_SHAPES.values(), *SCORE.values(), scale=SCALE), "compute_classifier_gradients",
        plain_classifier_loss,
    ),
}  # fmt: skip


# --- laws -------------------------------------------------------------------------------------------------------------


def along(operation: Operation, inputs: list[Any], grad: Any, moves: list[Any], step: float) -> tuple[float, float]:
    """Return the central difference of ``<grad, f(x + t move)>``, and the size of the numbers in it."""
    ends = [operation.forward(*(x + sign * step * v for x, v in zip(inputs, moves, strict=True))) for sign in (1, -1)]
    size = max(float(np.sum(np.abs(grad * end))) for end in ends)
    return float(np.sum(grad * (ends[0] - ends[1]))) / (2 * step), size


def directions(inputs: list[Any], rng: np.random.Generator) -> Iterator[list[Any]]:
    """Yield directions: each element alone, then all elements at random."""
    for number, x in enumerate(inputs):
        for place in np.ndindex(x.shape):
            moves = [np.zeros(y.shape) for y in inputs]
            moves[number][place] = 1.0
            yield moves
    yield [rng.standard_normal(x.shape) for x in inputs]


def check_differences(operation: Operation, seed: int) -> None:
    """Compare a gradient with central differences, element by element.

    A difference over a step h has the error ``h**2 f''' / 6``, and over 2 h four times this error. So three times the
    distance between both differences bounds the error. Rounding of f adds 64 roundings of its size, divided by h.
    """
    rng = np.random.default_rng(seed)
    inputs = operation.draw(rng)
    grad = rng.standard_normal(np.shape(operation.forward(*inputs)))
    found = operation.backward(grad, *inputs)
    for moves in directions(inputs, rng):
        ours = sum(float(np.sum(g * v)) for g, v in zip(found, moves, strict=True))
        fine, scale = along(operation, inputs, grad, moves, STEP)
        coarse, _ = along(operation, inputs, grad, moves, 2 * STEP)
        assert abs(ours - fine) <= 3 * abs(coarse - fine) + 64 * EPS * (scale + 1) / STEP


def inner(left: Any, right: Any) -> tuple[float, float]:
    """Return the inner product of two lists of arrays, and the sum of the sizes of its terms."""
    terms = [g * v for g, v in zip(left, right, strict=True)]
    return sum(float(np.sum(x)) for x in terms), sum(float(np.sum(np.abs(x))) for x in terms)


def check_adjoint(operation: Operation, seed: int) -> None:
    """Compare ``<grad, J move>`` with ``<backward(grad), move>``; a complex step gives J without error except rounding.

    ``f(x + i h v)`` has the imaginary part ``h J v``. No difference is taken, so h can be 1e-100. Only rounding
    remains. A computed result is the exact result for inputs that were changed by a few roundings (Higham 2002, section
    1.5). So the inputs are changed at random by 2**-26, relatively, and the change of the inner product is scaled down
    to the size of a rounding. The inner products have roundings of the size of their terms. 256 of both are allowed: no
    inner product has more terms, and no operation has more steps in a row.

    An operation without a form for complex numbers is compared with a central difference, as in `check_differences`.
    """
    rng = np.random.default_rng(seed)
    inputs = operation.draw(rng)
    grad = rng.standard_normal(np.shape(operation.forward(*inputs)))
    moves = [rng.standard_normal(x.shape) for x in inputs]
    ours, terms = inner(operation.backward(grad, *inputs), moves)
    if operation.plain is None:
        fine, scale = along(operation, inputs, grad, moves, STEP)
        coarse, _ = along(operation, inputs, grad, moves, 2 * STEP)
        assert abs(ours - fine) <= 3 * abs(coarse - fine) + 64 * EPS * (scale + 1) / STEP
        return
    moved = operation.plain(*(x + 1e-100j * v for x, v in zip(inputs, moves, strict=True))).imag / 1e-100
    theirs, their_terms = inner([grad], [moved])
    near = [x * (1 + 2.0**-26 * rng.standard_normal(x.shape)) for x in inputs]
    response = abs(inner(operation.backward(grad, *near), moves)[0] - ours) * 2.0**26
    assert abs(ours - theirs) <= 256 * EPS * (terms + their_terms + response)
