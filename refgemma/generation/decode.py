"""Generate texts for a batch of prompts by greedy decoding, sampling or beam search.

Checked against `generate` of transformers 5.23: the texts of greedy decoding and beam search are equal token for token,
processed scores agree within rounding.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from refgemma.cache import Cache, LayerCache
from refgemma.config import Gemma2Config
from refgemma.fast import next_token_logits
from refgemma.files import pluralise
from refgemma.generation.beams import (
    Rules,
    advance_search,
    choose_generator,
    collect_texts,
    draw,
    is_over,
    start_search,
)
from refgemma.generation.criteria import Criterion, list_criteria
from refgemma.generation.generation_config import GenerationConfig, Settings, merge_settings, resolve_settings
from refgemma.generation.greedy import last_scores
from refgemma.generation.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from refgemma.generation.processors import NextScores, Processor, constrain, warp
from refgemma.generation.stream import Streamer
from refgemma.heads import log_softmax
from refgemma.inputs import (
    InputError,
    check_embeddings,
    check_padding,
    check_positions,
    check_token_ids,
    packed_masks,
)
from refgemma.model import begin, blocks, head, next_past
from refgemma.model import next_token_logits as definition
from refgemma.ops import rms_norm
from refgemma.shapes import Positions, TokenIds
from refgemma.weights.parameters import Weights

# `next_token_logits` of one model: takes token ids or embeddings, a cache and other arguments; returns the last logits
# and a new cache.
TokenReader: TypeAlias = Callable[..., tuple[Any, Cache]]


# --- the model's inputs, step by step ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A batch of texts so far, with the inputs that the model needs to continue the texts."""

    ids: TokenIds  # prompt and new tokens; only new tokens if the prompt is embeddings
    visible: Bool[np.ndarray, "batch total"]  # false for padding; for all places, including the cache
    positions: Int[np.ndarray, "batch total"]  # positions of all places
    cache: Cache | None  # keys and values of all but the last tokens
    embeds: Float[np.ndarray, "batch embedded hidden"] | None = (
        None  # the prompt as embeddings, until the model reads it
    )

    def next_logits(self, model: TokenReader) -> tuple[Float[np.ndarray, "batch vocab"], Cache]:
        """Read the tokens that are not yet in the cache; return float32 logits of the next token, and the new cache.

        Raises
        ------
        InputError
            If a logit is NaN.
        """
        seen = self.cache.get_seq_length() if self.cache else 0
        total = self.visible.shape[1]
        logits, cache = model(
            self.ids[:, seen - total :] if self.embeds is None else None,
            attention_mask=None if self.visible.all() else self.visible,
            position_ids=self.positions[:, seen:],
            cache=self.cache,
            inputs_embeds=self.embeds,
        )
        return last_scores(logits), cache

    def add_tokens(self, ids: TokenIds, cache: Cache | None) -> "Reading":
        """Return the texts with one more token each, at the next position."""
        one = np.ones((len(ids), 1), bool)
        visible = np.concatenate([self.visible, one], axis=1)
        positions = np.concatenate([self.positions, self.positions[:, -1:] + 1], axis=1)
        return Reading(ids, visible, positions, cache)

    def repeat(self, times: int) -> "Reading":
        """Repeat each text `times` times; copies of a text are adjacent."""
        ids, visible, positions = (np.repeat(x, times, axis=0) for x in (self.ids, self.visible, self.positions))
        cache = self.cache and self.cache.repeat_interleave(times)
        return Reading(ids, visible, positions, cache, None if self.embeds is None else self.embeds.repeat(times, 0))


def mask_padding(ids: TokenIds, pad: int | None, ends: Collection[int]) -> Bool[np.ndarray, "batch seq"]:
    """Return the default padding mask: false for the pad token, true for all other tokens.

    If the pad token can also end a text, padding cannot be recognised, and the mask is true everywhere. Source:
    transformers ``_prepare_attention_mask_for_generation``.

    Examples
    --------
    >>> mask_padding(np.array([[0, 2, 5], [2, 6, 7]]), pad=0, ends=[1]).astype(int)
    array([[0, 1, 1],
           [1, 1, 1]])
    """
    told: Bool[np.ndarray, "batch seq"] = ids != (-1 if pad is None or pad in ends else pad)
    return told


def count_positions(visible: Bool[np.ndarray, "batch total"]) -> Positions:
    """Return the position of each token in its row, without counting padding; padding has position 0.

    Thus left padding does not change the result. Source: transformers ``_prepare_position_ids_for_generation``.

    Examples
    --------
    >>> count_positions(np.array([[False, False, True, True]]))
    array([[0, 0, 0, 1]])
    """
    return np.where(visible, np.cumsum(visible, axis=1) - 1, 0)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call of `generate`; see ``Gemma2ForCausalLM.generate``."""

    input_ids: npt.ArrayLike | None = None
    attention_mask: npt.ArrayLike | None = None
    position_ids: npt.ArrayLike | None = None
    inputs_embeds: npt.ArrayLike | None = None
    past_key_values: Cache | None = None

    def reading(self, call: GenerationConfig, config: Gemma2Config) -> Reading:
        """Check the prompts and return them as a `Reading`, before the model reads anything.

        With a cache, `input_ids` has all tokens, including those in the cache. If `attention_mask` is longer, it may
        have only the tokens after the cache.
        """
        if self.inputs_embeds is not None:
            if self.input_ids is not None or self.past_key_values is not None:
                raise InputError("inputs_embeds must be the whole prompt; leave out input_ids and past_key_values")
            embeds = check_embeddings(self.inputs_embeds, config.hidden_size)
            batch, seq = embeds.shape[:2]
            ids = np.zeros((batch, 0), np.int64)
            visible = check_padding(self.attention_mask, batch, seq)
        else:
            embeds, ids = None, _prompt_ids(self.input_ids, call, config)
            visible = self._visible(ids, call)
        total = visible.shape[1]
        seen = self.past_key_values.get_seq_length() if self.past_key_values else 0
        if embeds is None and not seen < total:
            raise InputError(
                f"the prompt has {pluralise(total, 'token')} and the cache has {seen}; the prompt must "
                "include the cached tokens "
                "and at least one more"
            )
        positions = count_positions(visible)
        if self.position_ids is not None:
            limit = config.max_position_embeddings
            positions = check_positions(self.position_ids, np.arange(total), len(visible), limit)
        return Reading(ids, visible, positions, self.past_key_values, embeds)

    def _visible(self, ids: TokenIds, call: GenerationConfig) -> Bool[np.ndarray, "batch total"]:
        """Return the padding mask over all tokens so far."""
        batch, seq = ids.shape
        if self.attention_mask is not None:
            total = np.shape(self.attention_mask)[-1] if self.past_key_values and np.ndim(self.attention_mask) else seq
            return check_padding(self.attention_mask, batch, total)
        eos = call.eos_token_id
        ends = () if eos is None else eos if isinstance(eos, tuple) else (eos,)
        return mask_padding(ids, call.pad_token_id, ends)


def _prompt_ids(input_ids: npt.ArrayLike | None, call: GenerationConfig, config: Gemma2Config) -> TokenIds:
    """Return the token ids of the prompts; without input_ids, return one prompt of ``<bos>``."""
    if input_ids is not None:
        return check_token_ids(input_ids, config.vocab_size)
    if call.bos_token_id is None:
        raise InputError("give input_ids, or set bos_token_id to begin a text with it")
    return check_token_ids([[call.bos_token_id]], config.vocab_size)


# --- decoding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """The settings of a call, with the caller's processors and criteria."""

    settings: Settings
    skipped: Int[np.ndarray, " batch"]  # number of leading pad tokens of each text
    processors: Sequence[Processor] = ()
    criteria: Sequence[Criterion] = ()
    allowed: Callable[[int, Any], Any] | None = None  # `prefix_allowed_tokens_fn`
    guide: Processor | None = None

    def scores(self, ids: TokenIds, raw: NextScores) -> NextScores:
        """Process raw scores of the next tokens: apply constraints, the caller's processors, then temperature, top k
        and so on."""
        guided = raw if self.guide is None else self.guide(ids, raw)
        processed = constrain(guided, ids, self.skipped, self.settings, self.allowed)
        for processor in self.processors:
            processed = processor(ids, processed)
        if (
            self.settings.num_beams == 1 and np.isneginf(processed.max(axis=1)).any()
        ):  # one of several beams may end this way
            raise InputError("the settings and processors forbid every token; allow at least one")
        drawn = warp(processed, self.settings) if self.settings.do_sample else processed
        return log_softmax(drawn) if self.settings.renormalize_logits else drawn

    def check_ended(
        self, ids: Int[np.ndarray, "rows length"], scores: Float[np.ndarray, "beams vocab"]
    ) -> Bool[np.ndarray, " rows"]:
        """Return true for each text that is complete: by an end token, the maximum length, or the caller's criteria."""
        complete: Bool[np.ndarray, " rows"] = np.isin(ids[:, -1], self.settings.eos_token_ids)
        complete = complete | (ids.shape[1] >= self.settings.max_length)
        for criterion in self.criteria:
            complete = complete | np.asarray(criterion(ids, scores), bool)
        return complete


@dataclass(frozen=True)
class Step:
    """One more token for each text."""

    tokens: Int[np.ndarray, " batch"]
    scores: NextScores  # processed scores that chose the token
    logits: Float[np.ndarray, "batch vocab"]
    cache: Cache


def run_steps(reading: Reading, model: TokenReader, how: Decoding) -> Iterator[Step]:
    """Yield steps until every text is complete; complete texts are continued with the pad token."""
    settings, rng = how.settings, choose_generator(how.settings.seed)
    unfinished = np.ones(len(reading.ids), bool)
    while unfinished.any():
        logits, cache = reading.next_logits(model)
        scores = how.scores(reading.ids, logits)
        chosen = draw(scores, 1, rng)[:, 0] if settings.do_sample else np.argmax(scores, axis=1)
        pad = settings.pad_token_id
        tokens = chosen if pad is None or not settings.eos_token_ids else np.where(unfinished, chosen, pad)
        yield Step(tokens, scores, logits, cache)
        ids = np.concatenate([reading.ids, tokens[:, None]], axis=1)
        reading = reading.add_tokens(ids, cache if settings.use_cache else None)
        unfinished &= ~how.check_ended(ids, scores)


def decode_steps(
    reading: Reading, model: TokenReader, how: Decoding, streamer: Streamer | None
) -> GenerateDecoderOnlyOutput:
    """Run greedy decoding or sampling to the end, and return the output."""
    scores, logits, new = [], [], []
    if streamer is not None:
        streamer.put(reading.ids)
    for step in run_steps(reading, model, how):
        new.append(step.tokens)
        scores += [step.scores] * how.settings.output_scores
        logits += [step.logits] * how.settings.output_logits
        if streamer is not None:
            streamer.put(step.tokens)
    if streamer is not None:
        streamer.end()
    return GenerateDecoderOnlyOutput(
        sequences=np.concatenate([reading.ids, np.stack(new, axis=1)], axis=1),
        scores=tuple(scores) if how.settings.output_scores else None,
        logits=tuple(logits) if how.settings.output_logits else None,
        past_key_values=step.cache if how.settings.use_cache else None,
    )


def _rules(settings: Settings) -> Rules:
    """Return the settings of a search, with enough candidates so that `num_beams` can continue if others end."""
    ends = settings.eos_token_ids
    return Rules(
        num_beams=settings.num_beams,
        candidates=max(2, 1 + len(ends)) * settings.num_beams,
        longest=settings.max_length - settings.prompt_length,
        early_stopping=settings.early_stopping,
        length_penalty=settings.length_penalty,
        # `pad or eos[0]` in transformers: so a pad token with id 0, as in Gemma, counts as missing.
        fill=(settings.pad_token_id or ends[0]) if ends else -1,
    )


def beam_search(reading: Reading, model: TokenReader, how: Decoding) -> GenerateBeamDecoderOnlyOutput:
    """Run a beam search for each prompt; `reading` contains each prompt `num_beams` times."""
    settings, rules = how.settings, _rules(how.settings)
    rng = choose_generator(settings.seed) if settings.do_sample else None
    beams = start_search(reading.ids[:: rules.num_beams], rules)
    all_scores, all_logits = [], []
    while True:
        logits, cache = reading.next_logits(model)
        scores = how.scores(reading.ids, log_softmax(logits).astype(np.float32))
        all_scores += [scores] * settings.output_scores
        all_logits += [logits] * settings.output_logits
        beams = advance_search(beams, scores, partial(how.check_ended, scores=scores), rules, rng)
        cache = cache.reorder(beams.running_origins[:, :, -1].reshape(-1))
        running = beams.running.reshape(len(reading.ids), -1)
        reading = reading.add_tokens(running, cache if settings.use_cache else None)
        if is_over(beams, rules):
            break
    sequences, sequences_scores, origins = collect_texts(beams, settings.num_return_sequences)
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,
        sequences_scores=sequences_scores if settings.output_scores else None,
        scores=tuple(all_scores) if settings.output_scores else None,
        logits=tuple(all_logits) if settings.output_logits else None,
        beam_indices=origins,
        past_key_values=cache if settings.use_cache else None,
    )


def generate_batch(
    prompts: Prompts, weights: Weights, config: Gemma2Config, call: GenerationConfig,
    processors: Sequence[Processor] = (), criteria: Sequence[Criterion] = (), streamer: Streamer | None = None,
    reference: bool = False, *, allowed: Callable[[int, Any], Any] | None = None, tokenizer: Any = None,
    negative: tuple[npt.ArrayLike | None, npt.ArrayLike | None] = (None, None),
) -> GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:  # fmt: skip
    """Continue a batch of prompts; ``Gemma2ForCausalLM.generate`` does the same with transformers' arguments.

    Parameters
    ----------
    prompts : Prompts
        The prompts to continue.
    call : GenerationConfig
        All settings of this call, from `refgemma.generation.generation_config.merge_settings`.
    processors, criteria : sequence of callable
        ``processor(ids, scores)`` returns new scores; ``criterion(ids, scores)`` returns true for complete texts.
    streamer : Streamer, optional
        Receives tokens as they are generated.
    reference : bool
        If true, compute with the definition, `refgemma.model`, instead of `refgemma.fast`.
    allowed : callable, optional
        The argument ``prefix_allowed_tokens_fn`` of ``Gemma2ForCausalLM.generate``.
    tokenizer : Tokenizer, optional
        The tokenizer, needed for ``stop_strings``.
    negative : tuple
        ``negative_prompt_ids`` and ``negative_prompt_attention_mask``, used with ``guidance_scale``.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> call = merge_settings(None, GenerationConfig(eos_token_id=1, pad_token_id=0), {"max_new_tokens": 3})
    >>> prompts = Prompts([[0, 2, 300], [2, 300, 400]])  # the first has left padding
    >>> generate_batch(prompts, tiny.weights, tiny.config, call).sequences.shape
    (2, 6)
    """
    reading = prompts.reading(call, config)
    embedded = 0 if reading.embeds is None else reading.embeds.shape[1]
    limit = config.max_position_embeddings
    asked = resolve_settings(call, reading.ids.shape[1], config.vocab_size, limit, embedded)
    # Without a cache every step reads all tokens again, but tokens in the given cache may have no ids.
    settings = asked if reading.cache is None and not embedded else replace(asked, use_cache=True)
    if streamer is not None and settings.num_beams > 1:
        raise InputError(
            "a streamer cannot show a beam search, because its tokens may change until the end; set num_beams=1"
        )
    _warn_of_right_padding(reading.visible)
    times = max(settings.num_beams, settings.num_return_sequences)
    expanded = reading.repeat(times) if times > 1 else reading
    read = choose_reader(weights, config, reference)
    # Number of leading pad tokens, as in transformers.
    how = Decoding(
        settings, np.argmax(expanded.visible, axis=1), processors, [*list_criteria(settings, tokenizer), *criteria],
        allowed, None if settings.guidance_scale == 1 else Guide(settings.guidance_scale, read, *negative),
    )  # fmt: skip
    layers: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    if settings.return_dict_in_generate and (settings.output_hidden_states or settings.output_attentions):
        read = record_layers(weights, config, layers)
    if not settings.use_cache and prompts.position_ids is not None:
        read = keep_apart(read, config)
    output = beam_search(expanded, read, how) if settings.num_beams > 1 else decode_steps(expanded, read, how, streamer)
    if not layers:
        return output
    hidden_states, attentions = zip(*layers, strict=True)
    return replace(
        output, hidden_states=hidden_states if settings.output_hidden_states else None,
        attentions=attentions if settings.output_attentions else None,
    )  # fmt: skip


class Guide:
    """Classifier-free guidance: move log probabilities away from those after another prompt.

    The result is ``other + scale * (log_probs - other)``, where ``other`` are the log probabilities of the same tokens
    after the other prompt. Source: transformers ``UnbatchedClassifierFreeGuidanceLogitsProcessor``.

    Parameters
    ----------
    scale : float
        The strength; 1 changes nothing.
    read : TokenReader
        Function that reads tokens with the model.
    prompt, mask
        The other prompt, and its padding; by default the last token of each text.
    """

    def __init__(
        self, scale: float, read: TokenReader, prompt: npt.ArrayLike | None = None, mask: npt.ArrayLike | None = None
    ) -> None:
        self.scale, self.read, self.prompt, self.mask = scale, read, prompt, mask
        self.cache: Cache | None = None

    def __call__(self, ids: TokenIds, scores: NextScores) -> NextScores:
        """Return the guided log probabilities of the tokens after `ids`."""
        if self.cache is None:
            unread = ids[:, -1:] if self.prompt is None else self._repeat(self.prompt, len(ids))
            self.visible = np.ones(unread.shape, bool) if self.mask is None else self._repeat(self.mask, len(ids)) != 0
        else:
            unread = ids[:, -1:]
            self.visible = np.concatenate([self.visible, np.ones(unread.shape, bool)], axis=1)
        mask = None if self.visible.all() else self.visible
        logits, self.cache = self.read(unread, attention_mask=mask, cache=self.cache)
        other = log_softmax(last_scores(logits))
        guided: NextScores = other + self.scale * (log_softmax(scores) - other)
        return guided

    @staticmethod
    def _repeat(given: npt.ArrayLike, rows: int) -> Any:
        array = np.asarray(given)
        if array.ndim != 2 or rows % len(array):
            raise InputError(
                f"the negative prompt has shape {array.shape}; it must have one row for each of the {rows} texts"
            )
        return array.repeat(rows // len(array), axis=0)


def record_layers(
    weights: Weights, config: Gemma2Config, layers: list[tuple[tuple[Any, ...], tuple[Any, ...]]]
) -> TokenReader:
    """Return a `refgemma.model.next_token_logits` that also appends hidden states and attentions to `layers`."""

    def read(input_ids: npt.ArrayLike | None, **given: Any) -> tuple[Any, Cache]:
        start = begin(input_ids, weights, config, **given)
        present: list[LayerCache] = []
        states, attentions = [start.embedded], []
        for record in blocks(start, weights, config):
            present.append(next_past(len(present), record, config))
            states.append(record.out)
            attentions.append(record.attention.probs)
            del record
        norm = rms_norm(states[-1], weights.norm, config.rms_norm_eps)
        layers.append(((*states[:-1], norm), tuple(attentions)))
        return head(norm[:, -1:], weights, config)[1], Cache(present)

    return read


def choose_reader(weights: Weights, config: Gemma2Config, reference: bool) -> TokenReader:
    """Return the function that reads tokens with these weights: the fast code, or the definition if `reference`."""
    read = definition if reference else next_token_logits
    return partial(read, weights=weights, config=config)


def keep_apart(read: TokenReader, config: Gemma2Config) -> TokenReader:
    """Wrap `read` so that it separates packed texts, as transformers does without mask and cache."""

    def read_apart(*args: Any, **given: Any) -> tuple[Any, Cache]:
        if given["attention_mask"] is None:
            given["attention_mask"] = packed_masks(given["position_ids"], config)
        return read(*args, **given)

    return read_apart


def _warn_of_right_padding(visible: Bool[np.ndarray, "batch total"]) -> None:
    if not visible[:, -1].all():
        warnings.warn(
            "a prompt has right padding, so that new tokens follow the padding; set padding_side='left'",
            stacklevel=4,
        )


# --- one prompt, token by token ---------------------------------------------------------------------------------------


def generate(
    prompt: Sequence[int] | Int[np.ndarray, " seq"],
    weights: Weights,
    config: Gemma2Config,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = 0,
    stop_ids: Collection[int] | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Iterator[int]:
    """Continue a prompt; yield each new token as soon as it is chosen.

    Parameters
    ----------
    prompt : sequence of int
        Token ids, usually beginning with ``<bos>``.
    max_new_tokens : int
        The maximum number of new tokens.
    temperature : float
        0 always takes the most likely token (greedy). Above 0, tokens are drawn from ``softmax(logits / temperature)``.
    top_k, top_p : int, float, optional
        Draw only from the k most likely tokens, and only from the most likely tokens that together reach probability p.
        Both are ignored if greedy.
    seed : int, optional
        The seed of the draws; the same seed gives the same tokens. None continues the draws of
        `refgemma.generation.beams.set_seed`.
    stop_ids : collection of int, optional
        Tokens that end the text; the last generated token is then one of these. By default the configuration's
        ``eos_token_id``.
    tokenizer : Tokenizer, optional
        The tokenizer, needed for the setting ``stop_strings``.
    **settings
        More settings of `GenerationConfig`, such as ``min_p``, ``repetition_penalty`` or ``min_new_tokens``.

    Yields
    ------
    int
        The next token.

    Raises
    ------
    InputError
        If the prompt or a setting is invalid; raised by the call itself, not at the first token.

    Examples
    --------
    >>> import refgemma
    >>> tiny = refgemma.load("tiny")
    >>> prompt = tiny.tokenizer.encode("Once upon a time")
    >>> new = list(generate(prompt, tiny.weights, tiny.config, max_new_tokens=5))
    >>> len(new)
    5
    """
    call = collect_settings(config, max_new_tokens, temperature, top_k, top_p, seed, stop_ids, settings)
    return continue_prompt(prompt, weights, config, call, tokenizer=tokenizer)


class Memory:
    """A store of earlier texts with their caches; a new text that begins with an earlier text continues from its cache.

    Examples
    --------
    >>> Memory().find([2, 300]) is None
    True
    """

    def __init__(self) -> None:
        self.texts: list[tuple[list[int], Cache]] = []

    def find(self, ids: list[int]) -> Cache | None:
        """Return the cache of the longest stored text that is a proper prefix of `ids`, or None."""
        known = [(len(text), cache) for text, cache in self.texts if len(text) < len(ids) and ids[: len(text)] == text]
        return max(known, key=lambda found: found[0])[1] if known else None

    def keep(self, prompt: list[int], steps: Iterator[Step]) -> Iterator[Step]:
        """Yield the steps after a prompt, and store the caches after the prompt and after the last step."""
        new: list[int] = []
        for step in steps:
            self.texts = [*self.texts[:1] * bool(new), (prompt + new, step.cache)]
            new.append(int(step.tokens[0]))
            yield step


def continue_prompt(
    prompt: Sequence[int] | Int[np.ndarray, " seq"], weights: Weights, config: Gemma2Config, call: GenerationConfig,
    reference: bool = False, tokenizer: Any = None, memory: Memory | None = None,
) -> Iterator[int]:  # fmt: skip
    """Continue a prompt as `generate` does, with all settings in one object; `memory` keeps caches between turns of a
    chat."""
    if len(prompt) == 0:
        raise InputError("the prompt is empty; it must have at least one token, for example <bos>")
    ids = check_token_ids([list(prompt)], config.vocab_size)
    text, memory = ids[0].tolist(), memory or Memory()
    reading = Reading(ids, np.ones(ids.shape, bool), np.arange(ids.shape[1])[None], memory.find(text))
    limit = config.max_position_embeddings
    settings = resolve_settings(call, ids.shape[1], config.vocab_size, limit)
    if settings.num_beams > 1 or settings.num_return_sequences > 1:
        raise InputError("num_beams and num_return_sequences must be 1 for one text; use Gemma2ForCausalLM.generate")
    read = choose_reader(weights, config, reference)
    guide = None if settings.guidance_scale == 1 else Guide(settings.guidance_scale, read)
    how = Decoding(settings, np.zeros(1, int), criteria=[*list_criteria(settings, tokenizer)], guide=guide)
    return (int(step.tokens[0]) for step in memory.keep(text, run_steps(reading, read, how)))


def collect_settings(
    config: Gemma2Config, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    seed: int | None, stop_ids: Collection[int] | None, settings: Mapping[str, Any],
) -> GenerationConfig:  # fmt: skip
    """Check the settings of `generate`, and return a `GenerationConfig` with all of them."""
    stops = stop_tokens(config) if stop_ids is None else stop_ids
    if top_k is not None and top_k == 0:
        raise InputError("top_k is 0; it must be at least 1: leave it out to draw from all tokens")
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    ends = {"eos_token_id": sorted(stops) or None, "pad_token_id": config.pad_token_id}
    return merge_settings(None, GenerationConfig(), given | {"do_sample": temperature > 0} | ends | dict(settings))


def stop_tokens(config: Gemma2Config) -> frozenset[int]:
    """Return the set of ids that end a text.

    Examples
    --------
    >>> sorted(stop_tokens(Gemma2Config(eos_token_id=(1, 107))))
    [1, 107]
    """
    eos = config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
