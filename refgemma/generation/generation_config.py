"""Hold the settings of a generation, as given by the caller and as resolved for a prompt.

Checked against `GenerationConfig` of transformers 5.23: its default values and its files.
"""

# ruff: noqa: RUF009  # a field's default holds the function that checks its values

import difflib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.config import ConfigError, Gemma2Config
from refgemma.files import pluralise, read_object, replace_file
from refgemma.hub import find_model
from refgemma.inputs import InputError

FILE = "generation_config.json"

DEFAULT_NEW_TOKENS = 20  # if neither `max_length` nor `max_new_tokens` is set


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= int(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool) and value == value


def _is_finite(value: Any) -> bool:
    return _is_number(value) and bool(abs(value) <= sys.float_info.max)  # an integer of 400 digits does not fit a float


def _setting(is_right: Callable[[Any], bool], needed: str, default: Any = None) -> Any:
    """Return the dataclass field of a setting, with a check for its values and a default."""
    return field(default=None, metadata={"is_right": is_right, "needed": needed, "default": default})


def _whole_number(least: int, default: int | None = None) -> Any:
    return _setting(lambda value: _is_whole(value, least), f"a whole number of at least {least}", default)


def _switch(default: bool) -> Any:
    return _setting(lambda value: isinstance(value, bool | np.bool), "True or False", default)


def _share(default: float) -> Any:
    return _setting(lambda value: _is_finite(value) and 0 <= value <= 1, "a number from 0 to 1", default)


def _number(is_right: Callable[[Any], bool], needed: str, default: float | None = None) -> Any:
    return _setting(lambda value: _is_finite(value) and is_right(value), needed, default)


def _are_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_whole(token, 0) for token in value)


def _are_ends(value: Any) -> bool:
    return value != () and _are_ids(value if isinstance(value, tuple) else (value,))


def _are_words(value: Any) -> bool:
    return isinstance(value, tuple) and value != () and all(word != () and _are_ids(word) for word in value)


def _are_biases(value: Any) -> bool:
    pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
    return pairs and _are_words(tuple(pair[0] for pair in value)) and all(_is_number(pair[1]) for pair in value)


def _are_texts(value: Any) -> bool:
    texts = value if isinstance(value, tuple) else (value,)
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _is_decay(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_whole(value[0], 0) and _is_finite(value[1])


# Unsupported setting of transformers -> its values without effect in transformers, and the remedy for other values.
MOVED_AWAY = "transformers 5 implements it by code from a repository, which refgemma does not run; leave it out"
ELSEWHERE = "leave it out, or generate with transformers"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_ensemble_weight": ((), "it changes the tokens; leave it out to get the model's own tokens"),
    "cache_config": ((), "it is for quantized caches, which refgemma does not have; leave it out"),
    "constraints": ((), MOVED_AWAY), "diversity_penalty": ((0,), MOVED_AWAY), "dola_layers": ((), MOVED_AWAY),
    "encoder_no_repeat_ngram_size": ((0,), ELSEWHERE), "encoder_repetition_penalty": ((1,), ELSEWHERE),
    "epsilon_cutoff": ((0,), ELSEWHERE), "eta_cutoff": ((0,), ELSEWHERE), "top_h": ((), ELSEWHERE),
    "force_words_ids": ((), MOVED_AWAY), "num_beam_groups": ((1,), MOVED_AWAY), "penalty_alpha": ((0,), MOVED_AWAY),
    "custom_generate": ((), "refgemma runs no code from a repository; write a loop: model(ids, past_key_values=...)"),
    "generator": ((), "it is a torch object; for reproducible draws pass seed=, or call set_seed first"),
    "remove_invalid_values": ((False,), ELSEWHERE), "token_healing": ((False,), ELSEWHERE),
    "use_mtp": ((False,), "Gemma 2 has no layers for multi-token prediction; leave it out"),
    "watermarking_config": ((), ELSEWHERE),
    # These choose how the cache is stored. A quantized cache gives other numbers.
    "cache_implementation": ((
        "dynamic", "dynamic_full", "hybrid", "hybrid_chunked", "offloaded", "offloaded_static", "offloaded_hybrid",
        "offloaded_hybrid_chunked", "paged", "sliding_window", "static",
    ), "refgemma has no quantized cache, which gives other numbers; leave it out"),
}  # fmt: skip

# Settings of transformers that change only speed or memory, and keys of files that are not settings.
WITHOUT_EFFECT = frozenset({
    "_commit_hash", "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "compile_config", "continuous_batching_config", "decoder_start_token_id",
    "disable_compile", "is_assistant", "low_memory", "max_cache_len", "max_matching_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "speculation_type", "synced_gpus", "target_lookbehind", "transformers_version", "trust_remote_code",
})  # fmt: skip


@dataclass(init=False, repr=False)
class GenerationConfig:
    """Generation options; None means not set.

    Names and meanings are those of transformers. Options can also be set later: ``config.top_k = 5``.

    Parameters
    ----------
    max_length, max_new_tokens : int, optional
        The maximum number of tokens: `max_length` includes the prompt, `max_new_tokens` does not and has priority.
        Default: 20 new tokens.
    min_length, min_new_tokens : int, optional
        The minimum number of tokens before an end token, counted in the same two ways.
    do_sample : bool, optional
        Draw tokens if True; take the most likely token if False, the default.
    num_beams : int, optional
        Number of beams of a beam search; 1, the default, means no search.
    early_stopping : bool or "never", optional
        When a search ends: True when `num_beams` texts are complete, False (the default) when a better text is
        unlikely, "never" when a better text is impossible.
    length_penalty : float, optional
        Exponent p of the length: a beam's sum of log probabilities is divided by ``new_tokens ** p``. Default: 1.
    temperature : float, optional
        The scores are divided by this number before sampling.
    top_k, top_p, min_p : int, float, float, optional
        Tokens to draw from when sampling. `top_k`: the k most likely (default 50; 0 means all). `top_p`: the most
        likely that together reach this probability. `min_p`: those at least `min_p` times as likely as the most likely.
    repetition_penalty : float, optional
        A factor that, above 1, makes tokens of the text so far less likely.
    no_repeat_ngram_size : int, optional
        If n is above 0, no sequence of n tokens occurs twice. Default: 0.
    num_return_sequences : int, optional
        Number of returned texts for each prompt.
    pad_token_id, bos_token_id : int, optional
        The token that fills a text after its end, and the first token if there is no prompt.
    eos_token_id : int or sequence of int, optional
        The tokens that end a text.
    typical_p : float, optional
        When sampling, draw only from the tokens whose information is closest to the entropy, as many as together reach
        this probability.
    renormalize_logits : bool, optional
        If true, turn the processed scores into log probabilities.
    guidance_scale : float, optional
        Above 1, move the scores away from those after another prompt (``negative_prompt_ids``; by default the last
        token).
    sequence_bias : dict or sequence of pairs, optional
        Pairs of a tuple of token ids and a number. The number is added to the last token's score where the other tokens
        precede it.
    bad_words_ids : sequence of sequence of int, optional
        Sequences of tokens that never occur.
    suppress_tokens, begin_suppress_tokens : sequence of int, optional
        Tokens that never occur, and tokens with which the new text never begins.
    forced_bos_token_id, forced_eos_token_id : int, optional
        The token forced after a prompt of one token, and the token or tokens forced at the maximum length.
    exponential_decay_length_penalty : tuple (int, float), optional
        A number of new tokens and a factor; after that many tokens, powers of the factor make an end token more likely.
    stop_strings : str or sequence of str, optional
        A text is complete when it contains one of these strings. ``generate`` then needs the argument ``tokenizer``.
    max_time : float, optional
        The maximum time in seconds; no token is added afterwards.
    use_cache : bool, optional
        If False, read the whole text again for each token, with the same result.
    output_scores, output_logits, output_attentions, output_hidden_states, return_dict_in_generate : bool, optional
        `return_dict_in_generate` returns a record instead of tokens; the others add entries to the record.
    seed : int, optional
        The seed of one call's draws; transformers has no such setting. By default, draws continue from call to call;
        see `refgemma.generation.beams.set_seed`.

    Raises
    ------
    InputError
        If a setting is unknown, unsupported or has an invalid value; the message names the setting.

    Examples
    --------
    >>> GenerationConfig(max_new_tokens=30, eos_token_id=[1, 107]).to_dict()
    {'max_new_tokens': 30, 'eos_token_id': [1, 107]}
    """

    max_length: int | None = _whole_number(1)
    max_new_tokens: int | None = _whole_number(1)
    min_length: int | None = _whole_number(0, default=0)
    min_new_tokens: int | None = _whole_number(0)
    do_sample: bool | None = _switch(False)
    num_beams: int | None = _whole_number(1, default=1)
    early_stopping: bool | str | None = _setting(
        lambda value: isinstance(value, bool) or value == "never", "True, False or 'never'", default=False
    )
    length_penalty: float | None = _number(lambda value: True, "a number", 1.0)
    temperature: float | None = _number(lambda value: value >= 0, "a number above 0, or 0 without do_sample", 1.0)
    top_k: int | None = _whole_number(0, default=50)
    top_p: float | None = _share(1.0)
    min_p: float | None = _share(0.0)
    repetition_penalty: float | None = _number(lambda value: value > 0, "a number above 0", 1.0)
    no_repeat_ngram_size: int | None = _whole_number(0, default=0)
    num_return_sequences: int | None = _whole_number(1, default=1)
    pad_token_id: int | None = _whole_number(0)
    bos_token_id: int | None = _whole_number(0)
    eos_token_id: Any = _setting(_are_ends, "a token id or several")  # kept as a tuple
    use_cache: bool | None = _switch(True)
    output_scores: bool | None = _switch(False)
    output_logits: bool | None = _switch(False)
    return_dict_in_generate: bool | None = _switch(False)
    typical_p: float | None = _number(lambda value: 0 < value <= 1, "a number above 0, up to 1", 1.0)
    renormalize_logits: bool | None = _switch(False)
    guidance_scale: float | None = _number(lambda value: True, "a number", 1.0)
    sequence_bias: Any = _setting(_are_biases, "a dict of tuples of token ids to numbers, or a list of such pairs")
    bad_words_ids: Any = _setting(_are_words, "a list of lists of token ids")
    suppress_tokens: Any = _setting(_are_ids, "a list of token ids")
    begin_suppress_tokens: Any = _setting(_are_ids, "a list of token ids")
    forced_bos_token_id: int | None = _whole_number(0)
    forced_eos_token_id: Any = _setting(_are_ends, "a token id or several")
    exponential_decay_length_penalty: Any = _setting(_is_decay, "a number of new tokens and a factor")
    stop_strings: Any = _setting(_are_texts, "a nonempty text or several")
    max_time: float | None = _number(lambda value: value >= 0, "a number of seconds")
    output_attentions: bool | None = _switch(False)
    output_hidden_states: bool | None = _switch(False)
    seed: int | None = _whole_number(0)

    def __init__(self, **settings: Any) -> None:
        given = _supported(settings)
        for setting in fields(self):
            value = vars(self)[setting.name] = _freeze(given.get(setting.name))
            if value is not None and not setting.metadata["is_right"](value):
                raise InputError(f"{setting.name} is {value!r}; it must be {setting.metadata['needed']}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option; for an invalid value, raise an error and change nothing."""
        if [*self.__dataclass_fields__][-1] in vars(self):  # only true after __init__, which sets this field last
            value = vars(self.changed(**{name: value})).get(name)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> None:
        """Return None for a setting of transformers that refgemma does not support: it is never set."""
        if name in NEUTRAL or name in WITHOUT_EFFECT:
            return
        raise AttributeError(f"{name!r} is not a setting of generate", name=name, obj=self)

    def __repr__(self) -> str:
        """Return the class's name and the options that are set."""
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def changed(self, **changes: Any) -> "GenerationConfig":
        """Return a copy with changed settings.

        Raises
        ------
        InputError
            If a setting is unknown, unsupported or has an invalid value.

        Examples
        --------
        >>> GenerationConfig().changed(top_q=0.9)
        Traceback (most recent call last):
        ...
        refgemma.inputs.InputError: unexpected generation option 'top_q'; did you mean top_p?
        """
        return replace(self, **changes)

    def over(self, other: "GenerationConfig") -> "GenerationConfig":
        """Return these settings; settings that are None come from `other`."""
        return replace(other, **{name: value for name, value in vars(self).items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the options that are set, as JSON types."""
        said = {name: value for name, value in vars(self).items() if value is not None}
        return {name: _plain(value) for name, value in said.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return `to_dict`, which has no settings that are None."""
        return self.to_dict()

    def to_json_string(self) -> str:
        """Return the text of a ``generation_config.json``.

        Examples
        --------
        >>> print(GenerationConfig(top_k=5).to_json_string(), end="")
        {
          "top_k": 5
        }
        """
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write `to_json_string` to a file, which appears complete or not at all."""
        replace_file(Path(json_file_path), self.to_json_string().encode())

    def update(self, **changes: Any) -> dict[str, Any]:
        """Set several settings; return the arguments that are not settings of generate.

        Raises
        ------
        InputError
            If a value is invalid; then no setting is changed.

        Examples
        --------
        >>> GenerationConfig().update(top_k=5, colour="red")
        {'colour': 'red'}
        """
        ours = {name: value for name, value in changes.items() if hasattr(self, name)}
        vars(self).update(vars(self.changed(**ours)))
        return {name: value for name, value in changes.items() if name not in ours}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "GenerationConfig":
        """Return the settings in the contents of a ``generation_config.json``.

        Raises
        ------
        InputError
            If a setting is unknown, unsupported or has an invalid value.

        Examples
        --------
        >>> GenerationConfig.from_dict({"eos_token_id": [1, 107], "cache_implementation": "hybrid"}).eos_token_id
        (1, 107)
        """
        return cls(**raw)

    @classmethod
    def from_model_config(cls, config: Gemma2Config) -> "GenerationConfig":
        """Return settings from a model's configuration, for a model without ``generation_config.json``.

        Examples
        --------
        >>> GenerationConfig.from_model_config(Gemma2Config()).to_dict()
        {'pad_token_id': 0, 'bos_token_id': 2, 'eos_token_id': 1}
        """
        return cls(pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)

    @classmethod
    def from_json_file(cls, path: str | Path) -> "GenerationConfig":
        """Read a ``generation_config.json``; see `from_dict`.

        Raises
        ------
        ConfigError
            If the file is invalid; the message names the file and the problem.
        """
        try:
            return cls.from_dict(read_object(path, ConfigError))
        except InputError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(cls, name: str | Path, **changes: Any) -> "GenerationConfig":
        """Read the ``generation_config.json`` of a model; `refgemma.hub.find_model` lists the possible names.

        Examples
        --------
        >>> GenerationConfig.from_pretrained("tiny", max_new_tokens=5).max_new_tokens
        5
        """
        place = find_model(name)
        if place.is_file():  # a GGUF file has no other settings
            return cls.from_model_config(Gemma2Config.from_pretrained(place)).changed(**changes)
        return cls.from_json_file(place / FILE).changed(**changes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``generation_config.json`` into `folder`, which is created if needed.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     GenerationConfig(top_k=5).save_pretrained(folder)
        ...     GenerationConfig.from_pretrained(folder).top_k
        5
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / FILE)


def _freeze(value: Any) -> Any:
    """Return lists, arrays and dicts as tuples, at any depth; return other values unchanged."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        value = list(value.items())
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """Return NumPy numbers as Python numbers and tuples as lists, for JSON."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _changes_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    return value is None or (isinstance(value, int | float | str) and value in harmless)


def _supported(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the supported settings of `given`; raise an error for any other setting that would change the result."""
    known = [setting.name for setting in fields(GenerationConfig)]
    for name, value in given.items():
        if name in NEUTRAL and not _changes_nothing(value, NEUTRAL[name][0]):
            raise InputError(f"{name} = {value!r} is not supported; {NEUTRAL[name][1]}")
        if value is not None and name not in known and name not in NEUTRAL and name not in WITHOUT_EFFECT:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            raise InputError(f"unexpected generation option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return {name: value for name, value in given.items() if name in known}


# --- resolved settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The settings of a call for one prompt; every setting has a value."""

    prompt_length: int  # number of prompt tokens at the start of the returned texts
    max_length: int  # including the prompt
    min_length: int
    do_sample: bool
    num_beams: int
    num_return_sequences: int
    early_stopping: bool | str
    length_penalty: float
    temperature: float
    top_k: int  # 0 means all
    top_p: float
    min_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    use_cache: bool
    output_scores: bool
    output_logits: bool
    return_dict_in_generate: bool
    typical_p: float
    renormalize_logits: bool
    guidance_scale: float
    sequence_bias: list[Any] | None
    bad_words_ids: list[list[int]] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    exponential_decay_length_penalty: list[Any] | None
    stop_strings: str | list[str] | None
    max_time: float | None
    output_attentions: bool
    output_hidden_states: bool
    seed: int | None

    @property
    def min_kept(self) -> int:
        """The minimum number of tokens that top k and so on must keep; in a beam search one of these must not end the
        text."""
        if self.num_beams == 1:
            return 1
        return len(self.eos_token_ids) + 1 if self.eos_token_ids else 2


def merge_settings(own: Any, model: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """Return the settings of one call; `changes` have priority over `own`, `own` over `model`, `model` over the
    defaults.

    None in `changes` switches a setting off: ``top_k=None`` means no top k, although the default is 50.

    Examples
    --------
    >>> call = merge_settings(None, GenerationConfig(top_p=0.9), {"do_sample": True, "top_k": None})
    >>> call.top_p, call.top_k, call.temperature
    (0.9, 0, 1.0)
    """
    if own is not None and not isinstance(own, GenerationConfig):
        raise InputError(
            f"generation_config is a {type(own).__name__}; it must be a GenerationConfig: use "
            "GenerationConfig.from_dict"
        )
    said = model if own is None else own.over(model)
    defaults = GenerationConfig(**{setting.name: setting.metadata["default"] for setting in fields(GenerationConfig)})
    return said.over(defaults).changed(**changes).over(replace(defaults, top_k=0))


def _lengths(call: GenerationConfig, prompt_length: int, embedded: int, limit: int) -> tuple[int, int]:
    """Return the maximum and the minimum number of tokens, including the prompt's ids.

    A prompt of `embedded` embeddings has no ids, so its length is subtracted.
    """
    if call.max_new_tokens is not None:
        longest = prompt_length + call.max_new_tokens
    elif call.max_length is not None:
        longest = call.max_length - embedded
    else:
        longest = min(prompt_length + DEFAULT_NEW_TOKENS, limit)
    if longest <= prompt_length:
        raise InputError(
            f"the prompt has {pluralise(prompt_length + embedded, 'token')}; max_length, which includes the prompt, is "
            f"{longest + embedded}; raise max_length, or set max_new_tokens"
        )
    if call.min_new_tokens is not None:
        name, shortest = "min_new_tokens", prompt_length + call.min_new_tokens
    else:
        name, shortest = "min_length", max((call.min_length or 0) - embedded, 0)
    if shortest > longest:
        warnings.warn(
            f"{name} is {getattr(call, name)}, but at most {longest - prompt_length} new tokens are possible",
            stacklevel=5,
        )
    return longest, shortest


def _listed(ids: Any) -> tuple[int, ...]:
    """Return a token id, several ids or None as a tuple."""
    return () if ids is None else ids if isinstance(ids, tuple) else (ids,)


def _check_vocabulary(call: GenerationConfig, vocab_size: int) -> None:
    """Raise an error for token ids that are not in the vocabulary."""
    words = {"bad_words_ids": call.bad_words_ids, "sequence_bias": [pair[0] for pair in call.sequence_bias or ()]}
    listed = {name: [token for word in several or () for token in word] for name, several in words.items()}
    for name in ("eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
                 "forced_eos_token_id"):  # fmt: skip
        listed[name] = list(_listed(getattr(call, name)))
    for name, tokens in listed.items():
        if any(token >= vocab_size for token in tokens):
            raise InputError(f"{name} is {max(tokens)}; the vocabulary has {pluralise(vocab_size, 'token')}")


def _check_together(call: GenerationConfig, longest_new: int) -> None:
    """Raise an error for settings that contradict each other."""
    beams, wanted = call.num_beams or 1, call.num_return_sequences or 1
    if beams == 1 and wanted > 1 and not call.do_sample:
        raise InputError(
            f"num_return_sequences is {wanted}, but without do_sample=True or num_beams all texts would be the same; "
            "set one of these"
        )
    if 1 < beams < wanted:
        raise InputError(f"num_return_sequences is {wanted}; it must be at most num_beams, {beams}")
    if call.do_sample and call.temperature == 0:
        raise InputError(
            "temperature is 0; it must be above 0 for sampling: use do_sample=False for the most likely token"
        )
    if call.guidance_scale != 1 and beams > 1:
        raise InputError("guidance_scale is not supported with beam search; use num_beams=1")
    if call.exponential_decay_length_penalty is not None and call.eos_token_id is None:
        raise InputError("exponential_decay_length_penalty needs an end token; set eos_token_id")
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = _listed(getattr(call, name))
        if forced and set(forced) <= set(call.suppress_tokens or ()):
            raise InputError(
                f"{name} is {_plain(forced)}, but suppress_tokens forbids this token; remove it from one of the two"
            )
    with np.errstate(over="ignore"):
        divisor = np.float64(longest_new) ** np.float64(call.length_penalty or 0)
    if beams > 1 and not 1e-30 < divisor < 1e30:
        raise InputError(
            f"length_penalty is {call.length_penalty}; {longest_new} new tokens to this power exceed the range of "
            "floats: "
            "set it closer to 0"
        )


def resolve_settings(
    call: GenerationConfig, prompt_length: int, vocab_size: int, limit: int, embedded: int = 0
) -> Settings:
    """Return the settings of a call with a value for each setting, for a given prompt.

    Parameters
    ----------
    call : GenerationConfig
        The settings from `merge_settings`.
    prompt_length : int
        Number of token ids in the prompt; 0 if the prompt is embeddings.
    vocab_size : int
        The size of the vocabulary; all ids must be below it.
    limit : int
        ``max_position_embeddings``, which limits the default of `max_length`.
    embedded : int
        Number of embeddings in the prompt.

    Raises
    ------
    InputError
        If settings contradict each other or do not fit the prompt.

    Examples
    --------
    >>> call = merge_settings(None, GenerationConfig(eos_token_id=1), {})
    >>> settings = resolve_settings(call, prompt_length=7, vocab_size=64, limit=8192)
    >>> settings.max_length, settings.pad_token_id
    (27, 1)
    """
    ends = _listed(call.eos_token_id)
    pad = call.pad_token_id if call.pad_token_id is not None or not ends else ends[0]
    _check_vocabulary(call, vocab_size)
    longest, shortest = _lengths(call, prompt_length, embedded, limit)
    _check_together(call, longest - prompt_length)
    apart = ("prompt_length", "max_length", "min_length", "pad_token_id", "eos_token_ids")
    # Convert to Python floats, because a NumPy float64 would make the float32 scores float64.
    rest = {f.name: _plain(getattr(call, f.name)) for f in fields(Settings) if f.name not in apart}
    return Settings(
        prompt_length=prompt_length, max_length=int(longest), min_length=int(shortest), pad_token_id=_plain(pad),
        eos_token_ids=tuple(_plain(token) for token in ends), **rest,
    )  # fmt: skip
