"""Define the outputs of the documented classes: dataclasses that also act like a dict and a tuple. Checked against
`ModelOutput` and its subclasses in transformers 5.23."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refgemma.generation.outputs import ModelOutput, PastKeyValues
from refgemma.precision import Array


@dataclass(frozen=True, eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """The output of `Gemma2Model`.

    Attributes
    ----------
    last_hidden_state : array (batch, seq, hidden)
        The residual stream after the final norm.
    past_key_values : Cache or tuple of pairs, optional
        With ``use_cache``: the cache to pass to the next call.
    hidden_states : tuple of arrays (batch, seq, hidden), optional
        With ``output_hidden_states``: the embeddings, then the output of each layer; the last is normed and equals
        `last_hidden_state`.
    attentions : tuple of arrays (batch, heads, seq, keys), optional
        With ``output_attentions``: the attention weights of each layer.
    """

    last_hidden_state: Array
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """The output of `Gemma2ForCausalLM`.

    Attributes
    ----------
    loss : float, optional
        With ``labels``: the mean cross entropy of each token given all earlier tokens, in nats per token.
    logits : array (batch, kept, vocab)
        Capped scores for all tokens of the vocabulary.
    past_key_values, hidden_states, attentions
        As in `BaseModelOutputWithPast`.
    """

    loss: np.floating[Any] | None = None
    logits: Array | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """The output of `Gemma2ForSequenceClassification`.

    Attributes
    ----------
    loss : float, optional
        With ``labels``: mean squared error, cross entropy or binary cross entropy, depending on
        ``config.problem_type``.
    logits : array (batch, num_labels)
        Scores of the classes, taken at the last token of each sequence.
    past_key_values, hidden_states, attentions
        As in `BaseModelOutputWithPast`.
    """

    loss: np.floating[Any] | None = None
    logits: Array | None = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenClassifierOutput(ModelOutput):
    """The output of `Gemma2ForTokenClassification`.

    Attributes
    ----------
    loss : float, optional
        With ``labels``: the mean cross entropy of all tokens whose label is not -100.
    logits : array (batch, seq, num_labels)
        Scores of the classes for each token.
    hidden_states, attentions
        As in `BaseModelOutputWithPast`.
    """

    loss: np.floating[Any] | None = None
    logits: Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
