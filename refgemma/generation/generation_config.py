"""The settings of a generation: what was said, and what it comes to for a prompt. Checked against `GenerationConfig` of
transformers 5.23, its default values and its files."""

import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.config import ConfigError, Gemma2Config
from refgemma.files import read_object, replace_file
from refgemma.hub import find_model
from refgemma.inputs import InputError

FILE = "generation_config.json"

DEFAULT_NEW_TOKENS = 20  # where neither `max_length` nor `max_new_tokens` is said


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and least <= int(value) < 2**63


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and abs(float(value)) < float("inf")


def _setting(is_right: Callable[[Any], bool], needed: str, default: Any = None) -> Any:
    """A setting that nobody has to say: which values it may have, and what it is where nobody says it."""
    return field(default=None, metadata={"is_right": is_right, "needed": needed, "default": default})


def _whole_number(least: int, default: int | None = None) -> Any:
    return _setting(lambda value: _is_whole(value, least), f"a whole number of at least {least}", default)


def _switch(default: bool) -> Any:
    return _setting(lambda value: isinstance(value, bool | np.bool), "True or False", default)


def _share(default: float) -> Any:
    return _setting(lambda value: _is_finite(value) and 0 <= value <= 1, "a number from 0 to 1", default)


def _number(is_right: Callable[[Any], bool], needed: str, default: float) -> Any:
    return _setting(lambda value: _is_finite(value) and is_right(value), needed, default)


def _are_ends(value: Any) -> bool:
    ids = value if isinstance(value, tuple) else (value,)
    return bool(ids) and all(_is_whole(token, 0) for token in ids)


# Settings of transformers that are not computed here, with the values that change nothing there.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,), "assistant_ensemble_weight": (None,), "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,), "cache_config": (None,), "constraints": (None,), "diversity_penalty": (None, 0),
    "dola_layers": (None,), "encoder_no_repeat_ngram_size": (None, 0), "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0), "eta_cutoff": (None, 0), "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1), "is_assistant": (None, False), "low_memory": (None, False), "max_time": (None,),
    "num_beam_groups": (None, 1), "output_attentions": (None, False), "output_hidden_states": (None, False),
    "penalty_alpha": (None, 0), "prompt_lookup_num_tokens": (None,), "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False), "sequence_bias": (None,), "stop_strings": (None,), "suppress_tokens": (None,),
    "token_healing": (None, False), "top_h": (None,), "typical_p": (None, 1), "use_mtp": (None, False),
    "watermarking_config": (None,),
    # How the cache is stored. A quantized one gives other numbers.
    "cache_implementation": (
        None, "dynamic", "hybrid", "hybrid_chunked", "offloaded", "offloaded_static", "offloaded_hybrid",
        "offloaded_hybrid_chunked", "sliding_window", "static",
    ),
}  # fmt: skip

# Settings of transformers that say how it computes, and not what; and notes that files hold.
WITHOUT_EFFECT = frozenset({
    "_commit_hash", "_from_model_config", "assistant_confidence_threshold", "assistant_lookbehind", "compile_config",
    "continuous_batching_config", "decoder_start_token_id", "disable_compile", "max_cache_len",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "prefill_chunk_size",
    "speculation_type", "target_lookbehind", "transformers_version",
})  # fmt: skip


@dataclass(frozen=True, repr=False)
class GenerationConfig:
    """The settings of a generation, as far as somebody has given them; the others are None.

    Names and meanings are those of transformers.

    Parameters
    ----------
    max_length, max_new_tokens : int, optional
        When to stop: after so many tokens with the prompt, or without it; the second counts if both are there. By
        default after 20 new tokens.
    min_length, min_new_tokens : int, optional
        No end of text before so many tokens, counted in the same two ways.
    do_sample : bool, optional
        Draw tokens (True) or take the most likely (False, the default).
    num_beams : int, optional
        Beams to search with; 1, the default, is no search.
    early_stopping : bool or "never", optional
        When a search ends: as soon as `num_beams` texts are complete (True), once a better one is unlikely (False, the
        default), or impossible ("never").
    length_penalty : float, optional
        The sum of log probabilities of a text is divided by its new tokens to this power, by default 1.
    temperature : float, optional
        When sampling: scores are divided by it.
    top_k, top_p, min_p : int, float, float, optional
        When sampling: draw only from the k most likely, by default 50 and all for 0; only from the most likely that
        together reach probability p; only from those at least `min_p` times as likely as the most likely.
    repetition_penalty : float, optional
        Above 1 makes tokens that are there already less likely, by a factor of their scores.
    no_repeat_ngram_size : int, optional
        No n tokens in a row occur twice; 0, the default, for no such rule.
    num_return_sequences : int, optional
        Texts for each prompt.
    pad_token_id, bos_token_id : int, optional
        What fills a text that has ended, and what a text begins with if there is no prompt.
    eos_token_id : int or sequence of int, optional
        What ends a text.
    use_cache : bool, optional
        False computes everything anew for each token, and gives the same ones.
    output_scores, output_logits, return_dict_in_generate : bool, optional
        What comes back: with the third a record in place of the tokens, and in it what the first two ask for.
    seed : int, optional
        Of the draws; refgemma's own. The same seed, by default 0, gives the same tokens.

    Raises
    ------
    InputError
        Naming the setting that means nothing.

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
    eos_token_id: Any = _setting(_are_ends, "a token id, or several")  # kept as a tuple  # noqa: RUF009
    use_cache: bool | None = _switch(True)
    output_scores: bool | None = _switch(False)
    output_logits: bool | None = _switch(False)
    return_dict_in_generate: bool | None = _switch(False)
    seed: int | None = _whole_number(0, default=0)

    def __post_init__(self) -> None:
        """Check every setting that is said."""
        eos = self.eos_token_id
        if isinstance(eos, list | tuple | np.ndarray):
            several = tuple(eos.tolist() if isinstance(eos, np.ndarray) and eos.ndim else eos)
            object.__setattr__(self, "eos_token_id", several)
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None and not setting.metadata["is_right"](value):
                raise InputError(f"{setting.name} must be {setting.metadata['needed']}, not {value!r}")

    def __repr__(self) -> str:
        """The settings that are said."""
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def changed(self, **changes: Any) -> "GenerationConfig":
        """The same with other values of some settings.

        Raises
        ------
        InputError
            For a setting that means nothing, is unknown, or is not computed here.

        Examples
        --------
        >>> GenerationConfig().changed(top_q=0.9)
        Traceback (most recent call last):
        ...
        refgemma.inputs.InputError: top_q is no setting of generate; is top_p meant?
        """
        return replace(self, **_supported(changes))

    def over(self, other: "GenerationConfig") -> "GenerationConfig":
        """These settings, and where they say nothing those of `other`."""
        return replace(other, **{name: value for name, value in vars(self).items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The settings that are said, as JSON can hold them."""
        said = {name: value for name, value in vars(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else _plain(value) for name, value in said.items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "GenerationConfig":
        """The settings of a ``generation_config.json``, as released or as transformers writes it.

        Raises
        ------
        InputError
            For a setting that means nothing, is unknown, or is not computed here.

        Examples
        --------
        >>> GenerationConfig.from_dict({"eos_token_id": [1, 107], "cache_implementation": "hybrid"}).eos_token_id
        (1, 107)
        """
        return cls(**_supported(raw))

    @classmethod
    def from_model_config(cls, config: Gemma2Config) -> "GenerationConfig":
        """Return what a model's configuration says about generating, for a model without a ``generation_config.json``.

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
            Naming the file, and what is wrong with it.
        """
        try:
            return cls.from_dict(read_object(path, ConfigError))
        except InputError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(cls, name: str | Path, **changes: Any) -> "GenerationConfig":
        """Read the ``generation_config.json`` of a model; see `refgemma.hub.find_model` for the names there are.

        Examples
        --------
        >>> GenerationConfig.from_pretrained("tiny", max_new_tokens=5).max_new_tokens
        5
        """
        place = find_model(name)
        if place.is_file():  # a GGUF file says no more than these
            return cls.from_model_config(Gemma2Config.from_pretrained(place)).changed(**changes)
        return cls.from_json_file(place / FILE).changed(**changes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``generation_config.json`` into `folder`, made if there is none; the file appears whole or not at all.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     GenerationConfig(top_k=5).save_pretrained(folder)
        ...     GenerationConfig.from_pretrained(folder).top_k
        5
        """
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        Path(folder).mkdir(parents=True, exist_ok=True)
        replace_file(Path(folder) / FILE, text.encode())


def _plain(value: Any) -> Any:
    """A NumPy number as Python's: JSON knows no other."""
    return value.item() if isinstance(value, np.generic) else value


def _supported(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `given` that are computed here, after a look at the others."""
    known = [setting.name for setting in fields(GenerationConfig)]
    for name, value in given.items():
        if name in NEUTRAL and not (isinstance(value, int | float | str | None) and value in NEUTRAL[name]):
            raise InputError(f"{name} = {value!r} is not computed here; leave it out, or generate with transformers")
        if name not in known and name not in NEUTRAL and name not in WITHOUT_EFFECT:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{name} is no setting of generate" + (f"; is {near[0]} meant?" if near else ""))
    return {name: value for name, value in given.items() if name in known}


# --- what they come to ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The settings of a call for one prompt: here every one has a value."""

    prompt_length: int  # tokens that the returned texts begin with
    max_length: int  # counted with the prompt
    min_length: int
    do_sample: bool
    num_beams: int
    num_return_sequences: int
    early_stopping: bool | str
    length_penalty: float
    temperature: float
    top_k: int  # 0 for all
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
    seed: int

    @property
    def min_kept(self) -> int:
        """The number of tokens that the cuts leave at least: in a beam search one that is no end of text."""
        if self.num_beams == 1:
            return 1
        return len(self.eos_token_ids) + 1 if self.eos_token_ids else 2


def merge_settings(
    own: GenerationConfig | None, model: GenerationConfig, changes: Mapping[str, Any]
) -> GenerationConfig:
    """The settings of one call: `changes` over the caller's `own` over those of the `model` over the default values.

    None among the changes switches a setting off: with ``top_k=None`` there is no top-k, although the default is 50.

    Examples
    --------
    >>> call = merge_settings(None, GenerationConfig(top_p=0.9), {"do_sample": True, "top_k": None})
    >>> call.top_p, call.top_k, call.temperature
    (0.9, 0, 1.0)
    """
    said = model if own is None else own.over(model)
    defaults = GenerationConfig(**{setting.name: setting.metadata["default"] for setting in fields(GenerationConfig)})
    return said.over(defaults).changed(**changes).over(replace(defaults, top_k=0))


def _lengths(call: GenerationConfig, prompt_length: int, embedded: int, limit: int) -> tuple[int, int]:
    """The greatest and the least number of tokens, counted with the prompt ids.

    Of a prompt of `embedded` embeddings there are no ids, so that those are taken off again.
    """
    if call.max_new_tokens is not None:
        longest = prompt_length + call.max_new_tokens
    elif call.max_length is not None:
        longest = call.max_length - embedded
    else:
        longest = min(prompt_length + DEFAULT_NEW_TOKENS, limit)
    if longest <= prompt_length:
        raise InputError(
            f"the prompt has {prompt_length + embedded} tokens, which leaves none of max_length "
            f"({longest + embedded}, prompt included); raise max_length, or set max_new_tokens"
        )
    if call.min_new_tokens is not None:
        name, shortest = "min_new_tokens", prompt_length + call.min_new_tokens
    else:
        name, shortest = "min_length", max((call.min_length or 0) - embedded, 0)
    if shortest > longest:
        warnings.warn(
            f"{name} ({getattr(call, name)}) cannot be reached: there are {longest - prompt_length} new tokens at most",
            stacklevel=5,
        )
    return longest, shortest


def _check_together(call: GenerationConfig, longest_new: int) -> None:
    """Refuse settings that contradict one another."""
    beams, wanted = call.num_beams or 1, call.num_return_sequences or 1
    if beams == 1 and wanted > 1 and not call.do_sample:
        raise InputError(
            f"num_return_sequences is {wanted}, but without do_sample=True or num_beams there is one most likely text "
            "only, and all would be the same"
        )
    if 1 < beams < wanted:
        raise InputError(f"num_return_sequences ({wanted}) is more than num_beams ({beams})")
    if call.do_sample and call.temperature == 0:
        raise InputError(
            "temperature is 0: scores cannot be divided by it; for the most likely token use do_sample=False"
        )
    with np.errstate(over="ignore"):
        divisor = np.float64(longest_new) ** np.float64(call.length_penalty or 0)
    if beams > 1 and not 1e-30 < divisor < 1e30:
        raise InputError(
            f"length_penalty is {call.length_penalty}: {longest_new} new tokens to that power are out of range"
        )


def resolve_settings(
    call: GenerationConfig, prompt_length: int, vocab_size: int, limit: int, embedded: int = 0
) -> Settings:
    """Resolve the settings of a call for its prompt.

    Parameters
    ----------
    call : GenerationConfig
        As `merge_settings` gives it.
    prompt_length : int
        Token ids in the prompt; 0 if it is one of embeddings.
    vocab_size : int
        Ids are below it.
    limit : int
        ``max_position_embeddings``: where neither `max_length` nor `max_new_tokens` is said, the 20 new tokens end
        there at the latest.
    embedded : int
        Embeddings in the prompt.

    Raises
    ------
    InputError
        For settings that contradict one another or do not fit the prompt.

    Examples
    --------
    >>> call = merge_settings(None, GenerationConfig(eos_token_id=1), {})
    >>> settings = resolve_settings(call, prompt_length=7, vocab_size=64, limit=8192)
    >>> settings.max_length, settings.pad_token_id
    (27, 1)
    """
    eos = () if call.eos_token_id is None else call.eos_token_id
    ends = eos if isinstance(eos, tuple) else (eos,)
    pad = call.pad_token_id if call.pad_token_id is not None or not ends else ends[0]
    for name, tokens in (("eos_token_id", ends), ("pad_token_id", () if pad is None else (pad,))):
        if any(token >= vocab_size for token in tokens):
            raise InputError(f"{name} is {max(tokens)}: not in the vocabulary of {vocab_size} tokens")
    longest, shortest = _lengths(call, prompt_length, embedded, limit)
    _check_together(call, longest - prompt_length)
    apart = ("prompt_length", "max_length", "min_length", "pad_token_id", "eos_token_ids")
    # Python's own numbers: a NumPy float64 would make the float32 scores float64.
    rest = {f.name: _plain(getattr(call, f.name)) for f in fields(Settings) if f.name not in apart}
    return Settings(
        prompt_length=prompt_length, max_length=int(longest), min_length=int(shortest), pad_token_id=_plain(pad),
        eos_token_ids=tuple(_plain(token) for token in ends), **rest,
    )  # fmt: skip
