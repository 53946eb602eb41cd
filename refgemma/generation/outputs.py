"""Define the outputs of `generate`, and the base of all outputs: dataclasses that also act like a dict and a tuple.

Checked against `ModelOutput` and its subclasses in transformers 5.23."""

from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from refgemma.cache import Cache
from refgemma.generation.caches import DynamicCache
from refgemma.heads import log_softmax
from refgemma.precision import Array

PastKeyValues = Cache | DynamicCache | tuple[tuple[Array, Array], ...]


class ModelOutput(Mapping[str, Any]):
    """A dataclass whose fields can be read by attribute, key or index; fields that are None are left out.

    Examples
    --------
    >>> import numpy as np
    >>> from refgemma.modeling.model_outputs import TokenClassifierOutput
    >>> output = TokenClassifierOutput(logits=np.zeros((1, 2, 3)))
    >>> output.logits is output["logits"] is output[0], list(output), output.loss
    (True, ['logits'], None)
    """

    def _present(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # in dataclasses
        return {name: value for name, value in values.items() if value is not None}

    @property
    def cache(self) -> Any:
        """The same as `past_key_values`, under its name in transformers 5.24."""
        return getattr(self, "past_key_values", None)

    def __getitem__(self, key: Any) -> Any:
        """Return the field with a name or an index, or the fields of a slice."""
        if key == "cache" and self.cache is not None:
            return self.cache
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the fields, like a dict; to unpack the values, use `to_tuple`."""
        return iter(self._present())

    def __len__(self) -> int:
        """Return the number of fields that are not None."""
        return len(self._present())

    def keys(self) -> KeysView[str]:
        """Return the names of the fields that are not None."""
        return self._present().keys()

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order; a model returns them with ``return_dict=False``."""
        return tuple(self._present().values())

    # Comparing arrays gives no single truth value, so an output equals only itself.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class GenerateDecoderOnlyOutput(ModelOutput):
    """The output of `generate` with ``return_dict_in_generate``, greedy or sampled.

    Attributes
    ----------
    sequences : int array (rows, length)
        Prompts and generated tokens; a text that ended before others is filled with the pad token.
    scores : tuple of arrays (rows, vocab), optional
        With ``output_scores``: for each new token, the processed scores from which it was chosen.
    logits : tuple of arrays (rows, vocab), optional
        With ``output_logits``: the scores before processing.
    attentions : tuple of tuples of arrays (rows, heads, seq, keys), optional
        With ``output_attentions``: the attention weights of each layer, for each step; the first step reads the prompt.
    hidden_states : tuple of tuples of arrays (rows, seq, hidden), optional
        With ``output_hidden_states``: for each step, the embedded tokens, then the output of each layer; the last is
        normed.
    past_key_values : Cache, optional
        With ``use_cache``: the cache of all tokens but the last.
    """

    sequences: Array
    scores: tuple[Array, ...] | None = None
    logits: tuple[Array, ...] | None = None
    attentions: tuple[tuple[Array, ...], ...] | None = None
    hidden_states: tuple[tuple[Array, ...], ...] | None = None
    past_key_values: PastKeyValues | None = None


@dataclass(frozen=True, eq=False)
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """The output of a beam search by `generate` with ``return_dict_in_generate``.

    Attributes
    ----------
    sequences : int array (rows, length)
        The best texts for each prompt, best first.
    sequences_scores : array (rows,), optional
        With ``output_scores``: sums of log probabilities, divided by the length penalty.
    scores : tuple of arrays (batch * beams, vocab), optional
        With ``output_scores``: processed log probabilities of the next token, for each step.
    logits : tuple of arrays (batch * beams, vocab), optional
        With ``output_logits``: raw scores of each step.
    beam_indices : int array (rows, new)
        For each new token, the row of the previous step that it continued; -1 after the end of a text.
    attentions : tuple of tuples of arrays (rows, heads, seq, keys), optional
        With ``output_attentions``: the attention weights of each layer, for each step; the first step reads the prompt.
    hidden_states : tuple of tuples of arrays (rows, seq, hidden), optional
        With ``output_hidden_states``: for each step, the embedded tokens, then the output of each layer; the last is
        normed.
    past_key_values : Cache, optional
        With ``use_cache``: the cache of the beams after the last step.
    """

    sequences: Array
    sequences_scores: Array | None = None
    scores: tuple[Array, ...] | None = None
    logits: tuple[Array, ...] | None = None
    beam_indices: Array | None = None
    attentions: tuple[tuple[Array, ...], ...] | None = None
    hidden_states: tuple[tuple[Array, ...], ...] | None = None
    past_key_values: PastKeyValues | None = None


def compute_transition_scores(
    sequences: Array, scores: Sequence[Array], beam_indices: Array | None = None, normalize_logits: bool = False
) -> Array:
    """Return the score of each new token of `generate`; see ``Gemma2ForCausalLM.compute_transition_scores``.

    Examples
    --------
    >>> scores = [np.array([[0.1, 0.2]]), np.array([[0.3, 0.4]])]
    >>> compute_transition_scores(np.array([[1, 1, 0]]), scores)
    array([[0.2, 0.3]])
    """
    steps = np.stack([log_softmax(step) if normalize_logits else step for step in scores])
    rows = np.arange(steps.shape[1])[:, None].repeat(len(steps), 1) if beam_indices is None else beam_indices
    new = int((rows >= 0).sum(axis=1).max())
    rows, tokens = rows[:, :new], sequences[:, sequences.shape[1] - new :]
    chosen: Array = np.where(rows < 0, 0, steps[np.arange(new), rows, tokens])
    return chosen
