"""What the documented classes return: dataclasses that also answer like a dict and a tuple. Checked against
`ModelOutput` and its subclasses in transformers 5.23."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.generation.outputs import ModelOutput, PastKeyValues
from refgemma.precision import Array


@dataclass(frozen=True, eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """What `Gemma2Model` returns.

    Attributes
    ----------
    last_hidden_state : array (batch, seq, hidden)
        The residual stream after the final norm.
    past_key_values : Cache or tuple of pairs, optional
        With ``use_cache``: what the next call continues from.
    hidden_states : tuple of arrays (batch, seq, hidden), optional
        With ``output_hidden_states``: the embeddings, then what each layer gave; of the last layer its normed output,
        which is `last_hidden_state`.
    attentions : tuple of arrays (batch, heads, seq, keys), optional
        With ``output_attentions``: the attention weights of each layer.
    """

    last_hidden_state: Array
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """What `Gemma2ForCausalLM` returns.

    Attributes
    ----------
    loss : float, optional
        With ``labels``: the cross entropy of each token given those before it, in nats a token.
    logits : array (batch, kept, vocab)
        Scores of all tokens of the vocabulary, capped.
    past_key_values, hidden_states, attentions
        As of `BaseModelOutputWithPast`.
    """

    loss: np.floating[Any] | None = None
    logits: Array | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """What `Gemma2ForSequenceClassification` returns.

    Attributes
    ----------
    loss : float, optional
        With ``labels``: mean square, cross entropy or binary cross entropy, after ``config.problem_type``.
    logits : array (batch, num_labels)
        Scores of the classes, taken at the last token of each sequence.
    past_key_values, hidden_states, attentions
        As of `BaseModelOutputWithPast`.
    """

    loss: np.floating[Any] | None = None
    logits: Array | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenClassifierOutput(ModelOutput):
    """What `Gemma2ForTokenClassification` returns.

    Attributes
    ----------
    loss : float, optional
        With ``labels``: the cross entropy over all tokens whose label is not -100.
    logits : array (batch, seq, num_labels)
        Scores of the classes for each token.
    hidden_states, attentions
        As of `BaseModelOutputWithPast`.
    """

    loss: np.floating[Any] | None = None
    logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
