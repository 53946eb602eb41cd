"""Hold the numbers that define a Gemma 2: sizes, window and caps.

Checked against transformers 5.23 ``configuration_gemma2.py`` and, for the defaults, the Transformers documentation page
of Gemma 2.
"""

import difflib
import functools
import json
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from refgemma.activations import ACTIVATIONS, Activation
from refgemma.arguments import drop_arguments, refuse_arguments
from refgemma.errors import RefgemmaError
from refgemma.files import quote, read_object, replace_file
from refgemma.gguf import config_fields, read_gguf
from refgemma.hub import find_model

SLIDING = "sliding_attention"
FULL = "full_attention"

# A config.json must have these fields; defaults would silently give another model. Sizes have no sensible default, and
# the query scalar has two: 224 in the documentation, 256 in transformers.
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "query_pre_attn_scalar",
)  # fmt: skip

LABELS_LIMIT = 2**20  # far more classes than any classifier has; without a limit, their names could fill the memory
# At least four times the largest Gemma. Without limits, a few lines of JSON and a sparse file could take all memory.
LAYERS_LIMIT = 2**10
LIMITS = {
    LAYERS_LIMIT: ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2**12: ("head_dim",),
    2**15: ("hidden_size",), 2**18: ("intermediate_size",), 2**20: ("vocab_size",),
}  # fmt: skip
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# These fields describe the use of a model, not the model; a file omits those with default values.
OMITTED = (
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)


# Keys of a file that are not fields, or are derived when it is written.
READ_ELSEWHERE = (
    "hidden_act", "model_type", "num_labels", "quantization", "quantization_config", "rope_scaling", "torch_dtype",
    "transformers_version", "use_bidirectional_attention",
)  # fmt: skip


class Derived(dict[Any, Any]):
    """A mapping that was derived, not given by the caller; a new `rope_theta` or `num_labels` replaces it."""


class ConfigError(RefgemmaError):
    """Raised for a configuration that is impossible, or that refgemma does not compute."""


@dataclass(repr=False)
class Gemma2Config:
    """The configuration of a Gemma 2 model, with Hugging Face's names and the documented defaults.

    Fields can be set, as in ``config.num_hidden_layers = 2``; derived fields follow. Fields that contradict each other
    raise an error when a model is made or run. Other attributes can be set too: files keep them, but refgemma does not
    use them.

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
        Query heads (axis ``heads``) and the key/value heads they share (axis ``kv_heads``). Multi-head attention has as
        many key/value heads as query heads (``None``); multi-query attention has one.
    head_dim : int
        Width of one head (axis ``head_dim``); even, because rotary positions rotate pairs.
    hidden_activation : str or callable
        Always ``"gelu_pytorch_tanh"`` in released models. It may be another name of `refgemma.activations`, or a
        function that takes an array and returns an array of the same shape.
    max_position_embeddings : int
        Longest sequence that the model was designed for; ``forward`` warns beyond it.
    initializer_range : float
        Standard deviation of new random weights, before truncation.
    rms_norm_eps : float
        Added to the mean square in every norm.
    use_cache : bool
        If true, the documented classes return ``past_key_values``; a call can override it.
    pad_token_id, eos_token_id, bos_token_id : int or tuple of int, optional
        Ids of the tokens for padding, end and beginning.
    tie_word_embeddings : bool
        If true, as in every released Gemma 2, the head is the embedding table; otherwise it is a separate table.
    rope_theta : float
        Base of the rotary frequencies.
    attention_bias : bool
        If true, the four projections of attention have biases; in released models they have none.
    attention_dropout : float
        Stored but not applied; it only affects training in transformers.
    final_logit_softcapping, attn_logit_softcapping : float, optional
        Caps of the final logits and of the attention scores; ``None`` means no cap.
    query_pre_attn_scalar : float
        Attention scores are multiplied by ``query_pre_attn_scalar ** -0.5``.
    sliding_window : int
        Number of keys that a query of a sliding layer may see, including its own.
    layer_types : tuple of str, optional
        ``"sliding_attention"`` or ``"full_attention"`` for each layer. By default, layers 0, 2, 4, ... slide.
    rope_parameters : mapping, optional
        `rope_theta` as transformers 5.x writes it: ``{"rope_type": "default", "rope_theta": 10000.0}``.
    num_labels : int, optional
        Number of classes of a classifier; by default that of `id2label`, or 2.
    id2label, label2id : mapping, optional
        Names of the classes, and the reverse mapping; ``LABEL_0`` and so on if not given.
    problem_type : str, optional
        The loss of a sequence classifier: ``"regression"``, ``"single_label_classification"`` or
        ``"multi_label_classification"``; derived from the labels if not given.
    output_attentions, output_hidden_states, return_dict : bool
        Outputs that the documented classes return; a call can override these.
    dtype : str, optional
        The precision of the weights on disk; ``from_pretrained(dtype="auto")`` computes in this precision.
    architectures : tuple of str, optional
        The class that wrote the checkpoint.

    Raises
    ------
    ConfigError
        For an impossible combination; the message names the field and the reason.

    Examples
    --------
    >>> config = Gemma2Config(num_hidden_layers=3, layer_types=None)
    >>> config.layer_types
    ('sliding_attention', 'full_attention', 'sliding_attention')
    >>> Gemma2Config.preset("9b").hidden_size
    3584
    >>> Gemma2Config(head_dim=7)
    Traceback (most recent call last):
    ...
    refgemma.config.ConfigError: Gemma2Config: head_dim is 7; it must be even, because rotary positions rotate pairs
    """

    model_type: ClassVar[str] = "gemma2"

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_activation: str | Callable[[Any], Any] = "gelu_pytorch_tanh"
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
    rope_parameters: Mapping[str, Any] | None = None
    num_labels: int | None = None
    id2label: Mapping[int, str] | None = None
    label2id: Mapping[str, int] | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    # These fields describe the origin of the weights, so the comparison of two configurations ignores them.
    dtype: str | None = field(default=None, compare=False)
    architectures: tuple[str, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        vars(self).update(_derive(self))
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field and derive others from it, as `changed` does; raise an error for an impossible value."""
        name = "dtype" if name == "torch_dtype" else name  # the name before transformers 5
        if name not in self.__dataclass_fields__ and hasattr(type(self), name):
            raise ConfigError(f"Gemma2Config: {name} is a method or a property, not a field; it cannot be set")
        if name not in self.__dataclass_fields__ or [*self.__dataclass_fields__][-1] not in vars(self):
            object.__setattr__(self, name, value)  # the caller's own attribute; or in __init__, before the last field
            return
        before = dict(vars(self))
        vars(self).update(_refill(self, {name: value}))
        vars(self).update(_derive(self))
        if problem := next(_find_value_problems(self, [name]), None):
            vars(self).update(before)
            raise ConfigError(f"Gemma2Config: {problem}")

    def __repr__(self) -> str:
        """Return the name of the class and the JSON text, as transformers prints them."""
        return f"{type(self).__name__} {json.dumps(self._file_values(), indent=2, sort_keys=True, default=repr)}"

    def check(self) -> None:
        """Check all fields and their combination.

        Raises
        ------
        ConfigError
            If a field is wrong; the message names the first such field.
        """
        for problem in _find_problems(self):  # report only the first problem
            raise ConfigError(f"Gemma2Config: {problem}")

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several fields, one after the other."""
        for name, value in values.items():
            setattr(self, name, value)

    def is_sliding(self, layer: int) -> bool:
        """Return True if `layer` sees only the last ``sliding_window`` keys."""
        assert self.layer_types is not None  # set by __post_init__
        return self.layer_types[layer] == SLIDING

    @property
    def is_encoder_decoder(self) -> bool:
        """Always False, because Gemma 2 has only a decoder."""
        return False

    def get_text_config(self, **ignored: Any) -> "Gemma2Config":
        """Return this configuration: Gemma 2 reads only text."""
        return self

    @property
    def torch_dtype(self) -> str | None:
        """The same as `dtype`, under its name before transformers 5."""
        return self.dtype

    @property
    def attention_scale(self) -> float:
        """The factor of the attention scores: ``query_pre_attn_scalar ** -0.5``."""
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def activation(self) -> Activation:
        """The activation function; `hidden_activation` is the function or its name."""
        named = self.hidden_activation
        return ACTIVATIONS[named] if isinstance(named, str) else named

    def changed(self, **changes: Any) -> "Gemma2Config":
        """Return a copy with the given values; fields that depend on these are derived again.

        Raises
        ------
        ConfigError
            If a field does not exist, or a value does not fit.

        Examples
        --------
        >>> Gemma2Config().changed(num_hidden_layers=1).layer_types
        ('sliding_attention',)
        """
        own = self._own_attributes()
        if unknown := changes.keys() - {f.name for f in fields(self)} - own.keys():
            raise ConfigError(f"Gemma2Config: unknown field {min(unknown)!r}")
        given = own | changes
        config = replace(self, **_refill(self, {name: x for name, x in given.items() if name not in own}))
        vars(config).update({name: given[name] for name in own})
        return config

    def _own_attributes(self) -> dict[str, Any]:
        """Return the attributes that are not fields: set by the caller, or from a newer transformers."""
        known = {f.name for f in fields(self)}
        return {name: value for name, value in vars(self).items() if name not in known}

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the keys of a Hugging Face ``config.json``.

        Examples
        --------
        >>> Gemma2Config.from_dict(Gemma2Config().to_dict()) == Gemma2Config()
        True
        """
        values = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return plain | {"model_type": self.model_type, "hidden_act": self.hidden_activation}

    def to_json_string(self) -> str:
        """Return the text of a ``config.json``; it omits the same fields as in transformers.

        Raises
        ------
        ConfigError
            If `hidden_activation` is a function, or an attribute is an object; a file can hold only names and numbers.

        Examples
        --------
        >>> print(Gemma2Config.preset("9b").to_json_string()[:28])
        {
          "attention_bias": false,
        """
        if not isinstance(self.hidden_activation, str):
            raise ConfigError(
                f"Gemma2Config: hidden_activation is {self.hidden_activation!r}, a function, which JSON cannot hold; "
                "set it to the function's name"
            )
        return json.dumps(self._file_values(), indent=2, sort_keys=True, default=_refuse_value) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the text of `to_json_string` to a file, which appears complete or not at all.

        Raises
        ------
        ConfigError
            As in `to_json_string`.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Gemma2Config.preset("2b").to_json_file(f"{folder}/config.json")
        ...     Gemma2Config.from_json_file(f"{folder}/config.json").hidden_size
        2304
        """
        replace_file(Path(json_file_path), self.to_json_string().encode())

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the contents of `to_json_string` as a dict.

        Examples
        --------
        >>> "id2label" in Gemma2Config().to_dict(), "id2label" in Gemma2Config().to_diff_dict()
        (True, False)
        """
        return self._file_values()

    def _file_values(self) -> dict[str, Any]:
        """Return the contents of a ``config.json``, without fields that are omitted at their defaults."""
        usual = {f.name: f.default for f in fields(self) if f.name in OMITTED}
        names = _name_labels(2)
        usual |= {"id2label": names, "label2id": _number_labels(names), "num_labels": self.num_labels}
        return {k: v for k, v in self.to_dict().items() if k not in usual or usual[k] != v}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config") -> "Gemma2Config":
        """Read the keys of a Hugging Face ``config.json``, as released or as transformers 5.x writes it.

        Parameters
        ----------
        raw : mapping
            The parsed JSON object.
        source : str
            The file's name, for error messages.

        Raises
        ------
        ConfigError
            If `raw` is not a Gemma 2, lacks a size, or has a setting that Gemma 2 does not have.
        """
        if raw.get("model_type", "gemma2") != "gemma2":
            raise ConfigError(f"{source}: model_type is {raw['model_type']!r}; refgemma reads 'gemma2' only")
        if missing := [key for key in REQUIRED if key not in raw]:
            raise ConfigError(f"{source}: lacks {', '.join(missing)}")
        if raw.get("rope_scaling") is not None:
            raise ConfigError(
                f"{source}: rope_scaling is {raw['rope_scaling']!r}; Gemma 2 has no such scaling, and refgemma does "
                "not compute it"
            )
        if raw.get("use_bidirectional_attention"):
            raise ConfigError(
                f"{source}: use_bidirectional_attention is set; Gemma 2 has causal attention, and refgemma computes "
                "no other"
            )
        known = {f.name for f in fields(cls)} - {"num_labels"}
        # For an optional field null means that it is missing; for any other field null is an error, reported later.
        left_out = {f.name for f in fields(cls) if f.default is None and raw.get(f.name) is None}
        values: dict[str, Any] = {key: value for key, value in raw.items() if key in known - left_out}
        if "hidden_activation" not in raw and raw.get("hidden_act") not in (None, cls.hidden_activation):
            warnings.warn(
                f"{source}: hidden_act = {quote(raw['hidden_act'])} is ignored, as in transformers; "
                f"set hidden_activation instead, whose default is {cls.hidden_activation!r}",
                stacklevel=2,
            )
        values["dtype"] = raw.get("dtype", raw.get("torch_dtype"))
        if "id2label" not in values and raw.get("num_labels") is not None:
            values["num_labels"] = raw["num_labels"]
        unread = {name for name in raw if name.startswith("_") or hasattr(cls, name)} | {*READ_ELSEWHERE}
        try:
            config = cls(**values)
            vars(config).update({name: value for name, value in raw.items() if name not in known | unread})
            return config
        except ConfigError as error:
            raise ConfigError(f"{source}: {str(error).removeprefix('Gemma2Config: ')}") from None

    @classmethod
    def from_json_file(cls, path: str | Path) -> "Gemma2Config":
        """Read a ``config.json``; see `from_dict`.

        Raises
        ------
        ConfigError
            If the file cannot be read; the message names the file and the field.
        """
        return cls.from_dict(read_object(path, ConfigError), source=str(path))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, revision: str | None = "main", download: bool = False,
        cache_dir: str | Path | None = None, **changes: Any,
    ) -> "Gemma2Config":  # fmt: skip
        """Read the ``config.json`` of a model; `refgemma.hub.find_model` lists the possible names.

        Parameters
        ----------
        name : str or path
            ``"tiny"``, ``"conformance"``, a folder, or a hub id whose snapshot is in the Hugging Face cache.
        revision, download, cache_dir
            As in `refgemma.hub.find_model`.
        **changes
            Values that replace fields of the file. Arguments of transformers that have no effect here are ignored.

        Examples
        --------
        >>> Gemma2Config.from_pretrained("tiny", num_labels=3).num_labels
        3
        """
        place = find_model(name, revision or "main", download, cache_dir=cache_dir)
        changes = drop_arguments(changes, "Gemma2Config.from_pretrained", ConfigError)
        if place.is_file():
            read = cls.from_dict(config_fields(read_gguf(place, ConfigError), ConfigError), str(place))
        else:
            read = cls.from_json_file(place / "config.json")
        return read.changed(**changes)

    def save_pretrained(self, folder: str | Path, **ignored: Any) -> None:
        """Write ``config.json`` into `folder`; the file appears complete or not at all.

        The folder is created if necessary.

        Arguments of transformers that have no effect here are ignored, for example ``push_to_hub=False``.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Gemma2Config.preset("9b").save_pretrained(folder)
        ...     Gemma2Config.from_pretrained(folder) == Gemma2Config.preset("9b")
        True
        """
        refuse_arguments(ignored, "Gemma2Config.save_pretrained")
        self.to_json_string()  # raises an error before the folder is made
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(folder) / "config.json")

    @classmethod
    def preset(cls, name: str) -> "Gemma2Config":
        """Return the configuration of a released Gemma 2: ``"2b"``, ``"9b"`` or ``"27b"``.

        Raises
        ------
        ConfigError
            If there is no preset of that name.

        Examples
        --------
        >>> round(Gemma2Config.preset("27b").attention_scale ** -2)
        144
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


def _keep_unknown(make: Callable[..., None]) -> Callable[..., None]:
    """Let ``__init__`` keep unknown arguments, as in transformers; warn if a name looks misspelt."""

    @functools.wraps(make)
    def init(config: Gemma2Config, *args: Any, **given: Any) -> None:
        known = list(config.__dataclass_fields__)
        own = {name: given.pop(name) for name in given.keys() - set(known)}
        make(config, *args, **given)
        for name, value in own.items():
            if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
                warnings.warn(
                    f"Gemma2Config: unknown field {name!r} is stored but has no effect; did you mean {near[0]!r}?",
                    stacklevel=2,
                )
            setattr(config, name, value)

    return init


Gemma2Config.__init__ = _keep_unknown(Gemma2Config.__init__)  # type: ignore[method-assign]

# The released sizes. The query scalar of the 27B is hidden_size / num_attention_heads, not head_dim.
_SIZES = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "query_pre_attn_scalar",
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "2b": dict(zip(_SIZES, (2304, 26, 9216, 8, 4, 256, 256), strict=True)),
    "9b": dict(zip(_SIZES, (3584, 42, 14336, 16, 8, 256, 256), strict=True)),
    "27b": dict(zip(_SIZES, (4608, 46, 36864, 32, 16, 128, 144), strict=True)),
}


def _name_labels(count: int) -> "Derived":
    return Derived({label: f"LABEL_{label}" for label in range(count)})


def _number_labels(names: Mapping[int, str]) -> "Derived":
    return Derived({name: label for label, name in names.items()})


def _refuse_value(value: Any) -> None:
    raise ConfigError(f"Gemma2Config: the attribute {value!r} is an object, which a file cannot hold; delete it first")


def _refill(config: Gemma2Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes`, with None for each field that must be derived again."""
    refilled: dict[str, Any] = {}
    if "id2label" in changes:
        refilled["num_labels"] = None
    elif "num_labels" in changes and changes["num_labels"] != config.num_labels:
        refilled |= {"id2label": None, "label2id": None}
    if "num_hidden_layers" in changes:
        count, kinds = changes["num_hidden_layers"], config.layer_types or ()
        refilled["layer_types"] = kinds[:count] if _is_size(count) and count <= len(kinds) else None
    return refilled | dict(changes)


def _derive(config: Gemma2Config) -> dict[str, Any]:
    """Return the fields that are derived from others, without checking any; `_find_problems` does that."""
    values: dict[str, Any] = {}
    for name in ("layer_types", "eos_token_id", "architectures"):
        if isinstance(getattr(config, name), list):
            values[name] = tuple(getattr(config, name))
    heads: int | None = config.num_key_value_heads
    if heads is None:
        values["num_key_value_heads"] = config.num_attention_heads
    if config.layer_types is None and _is_size(config.num_hidden_layers) and config.num_hidden_layers <= LAYERS_LIMIT:
        values["layer_types"] = tuple(FULL if layer % 2 else SLIDING for layer in range(config.num_hidden_layers))
    return values | _derive_rope(config) | _derive_labels(config)


def _derive_rope(config: Gemma2Config) -> dict[str, Any]:
    """Return the rotary base, and the equivalent mapping."""
    given: Any = config.rope_parameters
    if not (given is None or isinstance(given, Mapping)) or set(given or ()) - {"rope_type", "rope_theta"}:
        return {}
    explicit = {} if isinstance(given, Derived) else dict(given or {})
    theta = explicit.get("rope_theta", config.rope_theta)
    theta = float(theta) if _is_finite_number(theta) else theta
    named = Derived({"rope_type": explicit.get("rope_type", "default"), "rope_theta": theta})
    return {"rope_theta": theta, "rope_parameters": named}


def _derive_labels(config: Gemma2Config) -> dict[str, Any]:
    """Return the number and the names of the classes; whichever is missing is derived from the other."""
    names: Any = config.id2label
    count = config.num_labels
    if names is None or isinstance(names, Derived):
        count = 2 if count is None else count
        if not _is_size(count) or count > LABELS_LIMIT:
            return {}
        names = _name_labels(count)
    elif isinstance(names, Mapping) and all(str(key).isdecimal() and len(str(key)) < 10 for key in names):
        names = {int(key): name for key, name in names.items()}  # in JSON every key is a string
        count = len(names) if count is None else count
    else:
        return {}
    ids: Any = config.label2id
    if ids is None or isinstance(ids, Derived):
        ids = _number_labels(names)
    elif isinstance(names, Derived) and ids != _number_labels(names):
        warnings.warn("label2id without id2label is ignored, as in transformers; set id2label", stacklevel=4)
        ids = _number_labels(names)
    return {"num_labels": count, "id2label": names, "label2id": ids}


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_positive(value: Any) -> bool:
    return _is_finite_number(value) and value > 0


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_id(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31)


# Requirement -> the function that checks it, and the fields that must meet it.
_VALUES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a whole number from 1 to 2147483647": (_is_size, (*REQUIRED[:-1], "max_position_embeddings", "sliding_window")),
    **{f"at most {limit}": (functools.partial(operator.ge, limit), names) for limit, names in LIMITS.items()},
    "a number above 0 and below 1e300": (_is_positive, ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar")),
    "a number above 0, or None for no cap": (
        lambda value: value is None or _is_positive(value), ("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "a number from 0 to below 1": (lambda value: _is_finite_number(value) and 0 <= value < 1, ("attention_dropout",)),
    "a number of at least 0": (lambda value: _is_finite_number(value) and value >= 0, ("initializer_range",)),
    "true or false": (
        lambda value: isinstance(value, bool),
        (
            "attention_bias", "tie_word_embeddings", "use_cache", "return_dict", "output_attentions",
            "output_hidden_states",
        ),
    ),
    "a token id or None": (_is_id, ("pad_token_id", "bos_token_id")),
    "a token id, several of them or None": (
        lambda value: all(map(_is_id, value)) and None not in value if isinstance(value, tuple) else _is_id(value),
        ("eos_token_id",),
    ),
    f"one of {', '.join(PROBLEM_TYPES)}": (lambda value: value in (None, *PROBLEM_TYPES), ("problem_type",)),
}  # fmt: skip


def _find_value_problems(config: Gemma2Config, wanted: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each of the `wanted` fields with an invalid value."""
    for what, (holds, names) in _VALUES.items():
        for name in names:
            if name in wanted and not holds(getattr(config, name)):
                yield f"{name} is {getattr(config, name)!r}; it must be {what}"


def _find_problems(config: Gemma2Config) -> Iterator[str]:
    """Yield one sentence for each problem of `config`; later rules rely on earlier ones."""
    yield from _find_value_problems(config, vars(config))
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"num_attention_heads is {config.num_attention_heads}; it must be a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}), because all key/value heads serve the same number of query heads"
        )
    if config.head_dim % 2:
        yield f"head_dim is {config.head_dim}; it must be even, because rotary positions rotate pairs"
    activation: Any = config.hidden_activation
    if not callable(activation) and not (isinstance(activation, str) and activation in ACTIVATIONS):
        known = ", ".join(ACTIVATIONS)
        yield f"hidden_activation is {activation!r}; it must be one of {known}, or a function of an array"
    rope = config.rope_parameters
    if not isinstance(rope, Derived) or rope["rope_type"] != "default":
        yield f"rope_parameters is {rope!r}; it must be {{'rope_type': 'default', 'rope_theta': ...}}, as in Gemma 2"
    labels, label_names = config.num_labels, config.id2label
    if not isinstance(label_names, Mapping) or sorted(label_names) != list(range(labels or 0)):
        yield f"id2label is {label_names!r}; it must name each of the {labels!r} labels, starting at 0"
    if not isinstance(config.label2id, Mapping):
        yield f"label2id is {config.label2id!r}; it must be an object from names to numbers"
    if config.problem_type == "single_label_classification" and labels == 1:
        yield "num_labels is 1; problem_type single_label_classification needs at least 2"
    kinds: Any = config.layer_types
    layers = config.num_hidden_layers
    if not isinstance(kinds, tuple) or len(kinds) != layers or not all(kind in (SLIDING, FULL) for kind in kinds):
        yield f"layer_types is {kinds!r}; it must name {SLIDING!r} or {FULL!r} for each of the {layers} layers"
