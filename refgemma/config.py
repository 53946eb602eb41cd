"""The numbers that make a Gemma 2: sizes, window, caps. Checked against transformers 5.23 `configuration_gemma2.py`
and, for the defaults, the Transformers documentation page of Gemma 2."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SLIDING = "sliding_attention"
FULL = "full_attention"

# A config.json without one of these would silently become another model: sizes have no sensible default, and the
# default of the query scalar differs between the documentation (224) and transformers (256).
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "query_pre_attn_scalar",
)


class ConfigError(ValueError):
    """A configuration that no Gemma 2 can have, or that asks for something this reference does not compute."""


@dataclass(frozen=True)
class Gemma2Config:
    """The configuration of a Gemma 2 model, with Hugging Face's names and the documented defaults.

    Parameters
    ----------
    vocab_size : int
        Rows of the embedding table (axis ``vocab``).
    hidden_size : int
        Width of the residual stream (axis ``hidden``).
    intermediate_size : int
        Width inside the feed-forward layer (axis ``intermediate``).
    num_hidden_layers : int
        Number of blocks.
    num_attention_heads, num_key_value_heads : int
        Query heads (axis ``heads``) and the key/value heads they share (axis ``kv_heads``).
    head_dim : int
        Width of one head (axis ``head_dim``); even, because rotary positions turn pairs.
    hidden_activation : str
        Always ``"gelu_pytorch_tanh"`` in Gemma 2.
    max_position_embeddings : int
        Longest sequence the model was made for; beyond it ``forward`` warns.
    initializer_range : float
        Standard deviation of freshly initialised weights.
    rms_norm_eps : float
        Added to the mean square in every norm.
    use_cache : bool
        Kept for compatibility; caching is an argument here.
    pad_token_id, eos_token_id, bos_token_id : int or tuple of int, optional
        Special ids.
    tie_word_embeddings : bool
        Always true in Gemma 2: the head is the embedding table.
    rope_theta : float
        Base of the rotary frequencies.
    attention_bias : bool
        Whether the projections of attention have biases; no released Gemma 2 has them.
    attention_dropout : float
        Inactive outside training, hence never applied here.
    final_logit_softcapping, attn_logit_softcapping : float, optional
        Caps of the final logits and of the attention scores; ``None`` switches one off.
    query_pre_attn_scalar : float
        Attention scores are multiplied by ``query_pre_attn_scalar ** -0.5``.
    sliding_window : int
        Keys that a query of a sliding layer may see, itself included.
    layer_types : tuple of str, optional
        ``"sliding_attention"`` or ``"full_attention"`` for each layer; sliding on even layers if not given.

    Raises
    ------
    ConfigError
        For an impossible combination, naming the field and the reason.

    Examples
    --------
    >>> config = Gemma2Config(num_hidden_layers=3, layer_types=None)
    >>> config.layer_types
    ('sliding_attention', 'full_attention', 'sliding_attention')
    >>> Gemma2Config.preset("9b").hidden_size
    3584
    """

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    query_pre_attn_scalar: float = 224
    sliding_window: int = 4096
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        # A frozen dataclass is written through object.__setattr__; only the derived default is filled in here.
        if self.layer_types is None and _is_size(self.num_hidden_layers):
            alternating = tuple(FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", alternating)
        for problem in _problems(self):
            raise ConfigError(f"Gemma2Config: {problem}")

    def is_sliding(self, layer: int) -> bool:
        """Whether `layer` sees only the last ``sliding_window`` keys."""
        assert self.layer_types is not None  # filled in by __post_init__
        return self.layer_types[layer] == SLIDING

    @property
    def attention_scale(self) -> float:
        """What the attention scores are multiplied by: ``query_pre_attn_scalar ** -0.5``."""
        return float(self.query_pre_attn_scalar**-0.5)

    def to_dict(self) -> dict[str, Any]:
        """The configuration with the keys of a Hugging Face ``config.json``.

        Examples
        --------
        >>> Gemma2Config.from_dict(Gemma2Config().to_dict()) == Gemma2Config()
        True
        """
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return plain | {"model_type": "gemma2", "hidden_act": self.hidden_activation}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config") -> "Gemma2Config":
        """Read the keys of a Hugging Face ``config.json``, as released or as transformers 5.x writes it.

        Parameters
        ----------
        raw : mapping
            The parsed JSON object.
        source : str
            What to call it in an error message.

        Raises
        ------
        ConfigError
            If it is no Gemma 2, lacks a size, or asks for something that changes the maths and is not Gemma 2's.
        """
        if raw.get("model_type", "gemma2") != "gemma2":
            raise ConfigError(f"{source}: model_type is {raw['model_type']!r}; refgemma reads 'gemma2' only")
        if missing := [key for key in REQUIRED if key not in raw]:
            raise ConfigError(f"{source}: lacks {', '.join(missing)}")
        for key, harmless in {"rope_scaling": None, "quantization_config": None}.items():
            if raw.get(key, harmless) != harmless:
                raise ConfigError(f"{source}: {key} = {raw[key]!r} is no part of Gemma 2 and is not computed here")
        if raw.get("use_bidirectional_attention"):
            raise ConfigError(f"{source}: use_bidirectional_attention is not Gemma 2's causal attention")
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items() if key in known}
        values["rope_theta"] = _rope_theta(raw, source)
        # transformers reads hidden_activation; hidden_act is the older key, which it leaves unread.
        values["hidden_activation"] = raw.get("hidden_activation") or raw.get("hidden_act") or cls.hidden_activation
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {str(error).removeprefix('Gemma2Config: ')}") from None

    @classmethod
    def from_json_file(cls, path: str | Path) -> "Gemma2Config":
        """Read a ``config.json``; see `from_dict`."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: is not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: holds a {type(raw).__name__}, not a JSON object")
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def preset(cls, name: str) -> "Gemma2Config":
        """The shape of a released Gemma 2: ``"2b"``, ``"9b"`` or ``"27b"``.

        Examples
        --------
        >>> round(Gemma2Config.preset("27b").attention_scale ** -2)
        144
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


# The released sizes. The query scalar of the 27B is hidden_size / num_attention_heads, not head_dim.
PRESETS: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "9b": {
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "27b": {
        "hidden_size": 4608,
        "num_hidden_layers": 46,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
}


def _rope_theta(raw: Mapping[str, Any], source: str) -> float:
    """The rotary base: ``rope_theta`` up to transformers 4.x, ``rope_parameters["rope_theta"]`` since 5.x."""
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{source}: rope_parameters is a {type(parameters).__name__}, not an object")
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError(f"{source}: rope_type {parameters['rope_type']!r} is not Gemma 2's; only 'default' is")
    theta = parameters.get("rope_theta", raw.get("rope_theta", Gemma2Config.rope_theta))
    return float(theta) if _is_number(theta) else theta


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _are_ids(value: object, several: bool) -> bool:
    if several and isinstance(value, tuple):
        return all(_are_ids(item, several=False) and item is not None for item in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _problems(config: Gemma2Config) -> list[str]:
    """What is wrong with `config`, a sentence each, the first cause first."""
    found = []
    sizes = [*REQUIRED[:-1], "max_position_embeddings", "sliding_window"]
    for name in sizes:
        value = getattr(config, name)
        if not _is_size(value):
            found.append(f"{name} must be a whole number from 1 to 2147483647, not {value!r}")
    for name in ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar"):
        value = getattr(config, name)
        if not _is_number(value) or value <= 0:
            found.append(f"{name} must be a number above 0 and below 1e300, not {value!r}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name)
        if value is not None and (not _is_number(value) or value <= 0):
            found.append(f"{name} must be a number above 0, or None for no cap, not {value!r}")
    if found:
        return found  # the rules below calculate with these numbers
    if config.num_attention_heads % config.num_key_value_heads:
        found.append(
            f"num_attention_heads ({config.num_attention_heads}) is no multiple of "
            f"num_key_value_heads ({config.num_key_value_heads}): every key/value head serves equally many query heads"
        )
    if config.head_dim % 2:
        found.append(f"head_dim ({config.head_dim}) is odd: rotary positions turn pairs")
    if config.hidden_activation != "gelu_pytorch_tanh":
        found.append(f"hidden_activation {config.hidden_activation!r} is not Gemma 2's 'gelu_pytorch_tanh'")
    if not config.tie_word_embeddings:
        found.append("tie_word_embeddings is false: Gemma 2's head is its embedding table")
    if config.attention_bias:
        found.append("attention_bias is true: no released Gemma 2 has biases, and they are not computed here")
    kinds = config.layer_types
    named = isinstance(kinds, tuple) and all(kind in (SLIDING, FULL) for kind in kinds)
    if not named or len(kinds or ()) != config.num_hidden_layers:
        found.append(
            f"layer_types must name {SLIDING!r} or {FULL!r} for each of the {config.num_hidden_layers} layers, "
            f"not {kinds!r}"
        )
    found += [
        f"{name} must be a token id or None, not {getattr(config, name)!r}"
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if not _are_ids(getattr(config, name), several=name == "eos_token_id")
    ]
    return found
