"""The numbers that make a Gemma 2: sizes, window, caps. Checked against transformers 5.23 ``configuration_gemma2.py``
and, for the defaults, the Transformers documentation page of Gemma 2."""

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

# A config.json without one of these would silently become another model: sizes have no sensible default, and the
# default of the query scalar differs between the documentation (224) and transformers (256).
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "query_pre_attn_scalar",
)  # fmt: skip

LABELS_LIMIT = 2**20  # more classes than any classifier has; their names are written out
# Four times and more of what any Gemma has. Without limits, a few lines of JSON and a file of holes take all memory.
LAYERS_LIMIT = 2**10
LIMITS = {
    LAYERS_LIMIT: ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2**12: ("head_dim",),
    2**15: ("hidden_size",), 2**18: ("intermediate_size",), 2**20: ("vocab_size",),
}  # fmt: skip
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Left out of a file where they have their defaults: they say how a model is used, not which one it is.
OMITTED = (
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)


# Keys of a file that are not fields, or that are derived when it is written.
READ_ELSEWHERE = (
    "hidden_act", "model_type", "num_labels", "quantization_config", "rope_scaling", "torch_dtype",
    "transformers_version", "use_bidirectional_attention",
)  # fmt: skip


class Derived(dict[Any, Any]):
    """A mapping that was filled in, not given: with another `rope_theta` or `num_labels` it is filled in again."""


class ConfigError(RefgemmaError):
    """A configuration that no Gemma 2 can have, or that asks for something this reference does not compute."""


@dataclass(repr=False)
class Gemma2Config:
    """The configuration of a Gemma 2 model, with Hugging Face's names and the documented defaults.

    A field can be set, ``config.num_hidden_layers = 2``; what follows from it is set with it. Other attributes can be
    set too: nothing here reads them, and they are written to files. Fields that contradict one another are refused
    where a model is made or run.

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
        Query heads (axis ``heads``) and the key/value heads they share (axis ``kv_heads``): as many as query heads is
        multi-head attention, one is multi-query attention. ``None`` means as many as query heads.
    head_dim : int
        Width of one head (axis ``head_dim``); even, because rotary positions turn pairs.
    hidden_activation : str or callable
        ``"gelu_pytorch_tanh"`` in every released Gemma 2. Another name of `refgemma.activations`, or a function of an
        array that returns one of the same shape.
    max_position_embeddings : int
        Longest sequence the model was made for; beyond it ``forward`` warns.
    initializer_range : float
        Standard deviation of freshly initialised weights, before the tails are cut off.
    rms_norm_eps : float
        Added to the mean square in every norm.
    use_cache : bool
        Whether the documented classes return ``past_key_values`` unless a call says otherwise.
    pad_token_id, eos_token_id, bos_token_id : int or tuple of int, optional
        Special ids.
    tie_word_embeddings : bool
        Whether the head is the embedding table, as in every released Gemma 2, or has a table of its own.
    rope_theta : float
        Base of the rotary frequencies.
    attention_bias : bool
        Whether the four projections of attention have biases; no released Gemma 2 has them.
    attention_dropout : float
        Accepted and kept; inactive outside training, hence never applied here.
    final_logit_softcapping, attn_logit_softcapping : float, optional
        Caps of the final logits and of the attention scores; ``None`` switches one off.
    query_pre_attn_scalar : float
        Attention scores are multiplied by ``query_pre_attn_scalar ** -0.5``.
    sliding_window : int
        Keys that a query of a sliding layer may see, itself included.
    layer_types : tuple of str, optional
        ``"sliding_attention"`` or ``"full_attention"`` for each layer; sliding on even layers if not given.
    rope_parameters : mapping, optional
        transformers 5.x's way to write `rope_theta`: ``{"rope_type": "default", "rope_theta": 10000.0}``.
    num_labels : int, optional
        Classes of a classifier; 2 unless `id2label` says otherwise.
    id2label, label2id : mapping, optional
        Names of the classes, and back; ``LABEL_0`` and so on if not given.
    problem_type : str, optional
        The loss of a sequence classifier: ``"regression"``, ``"single_label_classification"`` or
        ``"multi_label_classification"``; follows from the labels if not given.
    output_attentions, output_hidden_states, return_dict : bool
        What the documented classes return unless a call says otherwise.
    dtype : str, optional
        The precision of the weights on disk; ``from_pretrained(dtype="auto")`` computes in it.
    architectures : tuple of str, optional
        The class that wrote the checkpoint.

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
    >>> Gemma2Config(head_dim=7)
    Traceback (most recent call last):
    ...
    refgemma.config.ConfigError: Gemma2Config: head_dim (7) is odd: rotary positions turn pairs
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
    # Where the weights come from: of two equal models these may differ.
    dtype: str | None = field(default=None, compare=False)
    architectures: tuple[str, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        vars(self).update(_derive(self))
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field and what follows from it, as `changed` does; a value that no Gemma 2 can have is refused."""
        if name not in self.__dataclass_fields__ and hasattr(type(self), name):
            raise ConfigError(f"Gemma2Config: {name} is no field, but a method or a property, and cannot be set")
        if name not in self.__dataclass_fields__ or [*self.__dataclass_fields__][-1] not in vars(self):
            object.__setattr__(self, name, value)  # an attribute of the caller's own; or in __init__, before the last
            return
        before = dict(vars(self))
        vars(self).update(_refill(self, {name: value}))
        vars(self).update(_derive(self))
        if problem := next(_find_value_problems(self, [name]), None):
            vars(self).update(before)
            raise ConfigError(f"Gemma2Config: {problem}")

    def __repr__(self) -> str:
        """Return the class and the text of a ``config.json``, as transformers prints it."""
        return f"{type(self).__name__} {json.dumps(self._file_values(), indent=2, sort_keys=True, default=repr)}"

    def check(self) -> None:
        """Check all fields, and whether they go together.

        Raises
        ------
        ConfigError
            Naming the first field that is wrong.
        """
        for problem in _find_problems(self):  # the first one is said
            raise ConfigError(f"Gemma2Config: {problem}")

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several fields, one after the other."""
        for name, value in values.items():
            setattr(self, name, value)

    def is_sliding(self, layer: int) -> bool:
        """Tell whether `layer` sees only the last ``sliding_window`` keys."""
        assert self.layer_types is not None  # filled in by __post_init__
        return self.layer_types[layer] == SLIDING

    @property
    def attention_scale(self) -> float:
        """What the attention scores are multiplied by: ``query_pre_attn_scalar ** -0.5``."""
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def activation(self) -> Activation:
        """The function that `hidden_activation` names, or is."""
        named = self.hidden_activation
        return ACTIVATIONS[named] if isinstance(named, str) else named

    def changed(self, **changes: Any) -> "Gemma2Config":
        """Return the configuration with other values, and what follows from them.

        Raises
        ------
        ConfigError
            If a name is none of the configuration's, or a value does not fit.

        Examples
        --------
        >>> Gemma2Config().changed(num_hidden_layers=1).layer_types
        ('sliding_attention',)
        """
        own = self._own_attributes()
        if unknown := changes.keys() - {f.name for f in fields(self)} - own.keys():
            raise ConfigError(f"Gemma2Config: there is no field {min(unknown)!r}")
        given = own | changes
        config = replace(self, **_refill(self, {name: x for name, x in given.items() if name not in own}))
        vars(config).update({name: given[name] for name in own})
        return config

    def _own_attributes(self) -> dict[str, Any]:
        """Return the attributes that are no fields of this class: a caller's own, or a newer release's."""
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
        """Return the text of a ``config.json``, without the fields that transformers leaves out too.

        Raises
        ------
        ConfigError
            If `hidden_activation` is a function, or an attribute an object: a file can only hold names and numbers.

        Examples
        --------
        >>> print(Gemma2Config.preset("9b").to_json_string()[:28])
        {
          "attention_bias": false,
        """
        if not isinstance(self.hidden_activation, str):
            raise ConfigError(
                f"Gemma2Config: hidden_activation is the function {self.hidden_activation!r}, which no file can hold; "
                "put its name in its place"
            )
        return json.dumps(self._file_values(), indent=2, sort_keys=True, default=_refuse_value) + "\n"

    def _file_values(self) -> dict[str, Any]:
        """Return what a ``config.json`` says: not what is usual."""
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
        if raw.get("rope_scaling") is not None:
            raise ConfigError(
                f"{source}: rope_scaling = {raw['rope_scaling']!r} is no part of Gemma 2 and is not computed here"
            )
        if raw.get("use_bidirectional_attention"):
            raise ConfigError(f"{source}: use_bidirectional_attention is not Gemma 2's causal attention")
        known = {f.name for f in fields(cls)} - {"num_labels"}
        # null where a field may be left out; any other is kept, and refused where it means nothing.
        left_out = {f.name for f in fields(cls) if f.default is None and raw.get(f.name) is None}
        values: dict[str, Any] = {key: value for key, value in raw.items() if key in known - left_out}
        if "hidden_activation" not in raw and raw.get("hidden_act") not in (None, cls.hidden_activation):
            warnings.warn(
                f"{source}: hidden_act = {quote(raw['hidden_act'])} is not read, as in transformers; the activation is "
                f"hidden_activation, {cls.hidden_activation!r} if not given",
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
            If it cannot be read, naming the file and the field.
        """
        return cls.from_dict(read_object(path, ConfigError), source=str(path))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, revision: str | None = "main", download: bool = False,
        cache_dir: str | Path | None = None, **changes: Any,
    ) -> "Gemma2Config":  # fmt: skip
        """Read the ``config.json`` of a model; see `refgemma.hub.find_model` for the names there are.

        Parameters
        ----------
        name : str or path
            ``"tiny"``, ``"conformance"``, a folder, or a hub id whose snapshot is in the Hugging Face cache.
        revision, download, cache_dir
            As of `refgemma.hub.find_model`.
        **changes
            Fields to replace. Arguments of transformers that change nothing here are taken and ignored.

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
        """Write ``config.json`` into `folder`, which is made if there is none; the file appears whole or not at all.

        Arguments of transformers that change nothing here are taken, ``push_to_hub=False`` for instance.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Gemma2Config.preset("9b").save_pretrained(folder)
        ...     Gemma2Config.from_pretrained(folder) == Gemma2Config.preset("9b")
        True
        """
        refuse_arguments(ignored, "Gemma2Config.save_pretrained")
        text = self.to_json_string()
        Path(folder).mkdir(parents=True, exist_ok=True)
        replace_file(Path(folder) / "config.json", text.encode())

    @classmethod
    def preset(cls, name: str) -> "Gemma2Config":
        """Return the shape of a released Gemma 2: ``"2b"``, ``"9b"`` or ``"27b"``.

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
            raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])


def _keep_unknown(make: Callable[..., None]) -> Callable[..., None]:
    """Let ``__init__`` keep arguments that are no fields, as in transformers; one that looks misspelt is warned of."""

    @functools.wraps(make)
    def init(config: Gemma2Config, *args: Any, **given: Any) -> None:
        known = list(config.__dataclass_fields__)
        own = {name: given.pop(name) for name in given.keys() - set(known)}
        make(config, *args, **given)
        for name, value in own.items():
            if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
                warnings.warn(
                    f"Gemma2Config: {name} is no field; it is kept, and nothing reads it; is {near[0]} meant?",
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
    raise ConfigError(f"Gemma2Config: the attribute {value!r} is an object, which no file can hold; delete it first")


def _refill(config: Gemma2Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes`, and what else they change: a value that is to be derived again is None."""
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
    """Return the fields that follow from others; a value that makes no sense is left to `_find_problems`."""
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
    """Return the rotary base, and the mapping that says the same."""
    given: Any = config.rope_parameters
    if not (given is None or isinstance(given, Mapping)) or set(given or ()) - {"rope_type", "rope_theta"}:
        return {}
    explicit = {} if isinstance(given, Derived) else dict(given or {})
    theta = explicit.get("rope_theta", config.rope_theta)
    theta = float(theta) if _is_finite(theta) else theta
    named = Derived({"rope_type": explicit.get("rope_type", "default"), "rope_theta": theta})
    return {"rope_theta": theta, "rope_parameters": named}


def _derive_labels(config: Gemma2Config) -> dict[str, Any]:
    """Return number and names of the classes: each follows from the other."""
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
        warnings.warn("label2id without id2label is not read, as in transformers: give id2label", stacklevel=4)
        ids = _number_labels(names)
    return {"num_labels": count, "id2label": names, "label2id": ids}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_id(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31)


# What a value must be -> how that is seen, and of which fields.
_VALUES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a whole number from 1 to 2147483647": (_is_size, (*REQUIRED[:-1], "max_position_embeddings", "sliding_window")),
    **{f"at most {limit}": (functools.partial(operator.ge, limit), names) for limit, names in LIMITS.items()},
    "a number above 0 and below 1e300": (_is_positive, ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar")),
    "a number above 0, or None for no cap": (
        lambda value: value is None or _is_positive(value), ("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "a number from 0 to below 1": (lambda value: _is_finite(value) and 0 <= value < 1, ("attention_dropout",)),
    "a number of at least 0": (lambda value: _is_finite(value) and value >= 0, ("initializer_range",)),
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
    """Yield what is wrong with the value of each of the `wanted` fields by itself."""
    for what, (holds, names) in _VALUES.items():
        for name in names:
            if name in wanted and not holds(getattr(config, name)):
                yield f"{name} must be {what}, not {getattr(config, name)!r}"


def _find_problems(config: Gemma2Config) -> Iterator[str]:
    """Yield what is wrong with `config`, a sentence each; a rule may take for granted what those before it say."""
    yield from _find_value_problems(config, vars(config))
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"num_attention_heads ({config.num_attention_heads}) is no multiple of "
            f"num_key_value_heads ({config.num_key_value_heads}): every key/value head serves equally many query heads"
        )
    if config.head_dim % 2:
        yield f"head_dim ({config.head_dim}) is odd: rotary positions turn pairs"
    activation: Any = config.hidden_activation
    if not callable(activation) and not (isinstance(activation, str) and activation in ACTIVATIONS):
        known = ", ".join(ACTIVATIONS)
        yield f"hidden_activation {activation!r} is unknown; there are {known}, and any function of an array"
    rope = config.rope_parameters
    if not isinstance(rope, Derived) or rope["rope_type"] != "default":
        yield f"rope_parameters {rope!r} is not Gemma 2's {{'rope_type': 'default', 'rope_theta': ...}}"
    labels, label_names = config.num_labels, config.id2label
    if not isinstance(label_names, Mapping) or sorted(label_names) != list(range(labels or 0)):
        yield f"id2label must name each of the {labels!r} labels, 0 and up, not {label_names!r}"
    if not isinstance(config.label2id, Mapping):
        yield f"label2id must be an object from names to numbers, not {config.label2id!r}"
    if config.problem_type == "single_label_classification" and labels == 1:
        yield "problem_type single_label_classification needs num_labels above 1: one class is no choice"
    kinds: Any = config.layer_types
    layers = config.num_hidden_layers
    if not isinstance(kinds, tuple) or len(kinds) != layers or not all(kind in (SLIDING, FULL) for kind in kinds):
        yield f"layer_types must name {SLIDING!r} or {FULL!r} for each of the {layers} layers, not {kinds!r}"
