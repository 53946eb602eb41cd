"""Name each gradient: ``grads.``, then the name of its tensor or weight. Checked against the recorded gradients
of transformers 5.23."""

from collections.abc import Iterator

from refgemma.backward import Gradients
from refgemma.precision import Array
from refgemma.trace.names import GRADS, named_tensors


def named_gradients(gradients: Gradients) -> Iterator[tuple[str, Array]]:
    """Yield every gradient with its name: activations in the order of the forward pass, then weights.

    Examples
    --------
    >>> import refgemma
    >>> from refgemma.backward import compute_all_gradients
    >>> tiny = refgemma.load("tiny")
    >>> _, grads = compute_all_gradients([[2, 300]], [[2, 300]], tiny.weights, tiny.config)
    >>> names = [name for name, _ in named_gradients(grads)]
    >>> names[0], names[22], names[-1]
    ('grads.embedded', 'grads.layers.1.input_layernorm', 'grads.model.embed_tokens.weight')
    """
    yield from named_tensors(gradients, GRADS)
    yield from ((GRADS + name, x) for name, x in gradients.weights.items())
