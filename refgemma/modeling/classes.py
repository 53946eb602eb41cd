"""Provide the classes of transformers' documentation page of Gemma 2, with the same calls.

Checked against the classes of transformers 5.23 in the parity tests, on random configurations, inputs and arguments.

This file handles arguments and results; `refgemma.model` and `refgemma.heads` do the computation.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from refgemma.arguments import drop_arguments, refuse_arguments
from refgemma.cache import Cache, LayerCache, LegacyCache
from refgemma.config import ConfigError, Gemma2Config
from refgemma.files import pluralise
from refgemma.generation.caches import DynamicCache
from refgemma.generation.criteria import Criterion
from refgemma.generation.decode import Prompts, generate_batch
from refgemma.generation.generation_config import FILE as GENERATION_CONFIG
from refgemma.generation.generation_config import GenerationConfig, merge_settings
from refgemma.generation.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    ModelOutput,
    PastKeyValues,
    compute_transition_scores,
)
from refgemma.generation.processors import Processor
from refgemma.generation.stream import Streamer
from refgemma.heads import (
    IGNORED,
    causal_lm_loss,
    infer_problem_type,
    last_tokens,
    sequence_classification_loss,
    token_classification_loss,
)
from refgemma.hub import find_model
from refgemma.inputs import InputError, as_array, packed_masks
from refgemma.model import begin, blocks, head, next_past
from refgemma.modeling.model_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from refgemma.modeling.modules import Module, ModuleMethods
from refgemma.ops import linear, rms_norm
from refgemma.precision import Array, as_dtype, precision_named, wide
from refgemma.weights.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from refgemma.weights.initial import initial_score, initial_weights
from refgemma.weights.parameters import (
    EMBED_TOKENS,
    LM_HEAD,
    NORM,
    SCORE_BIAS,
    SCORE_WEIGHT,
    Rows,
    Score,
    Weights,
    named_weights,
    tensor_shapes,
    weights_of,
)
from refgemma.weights.save import OutputTensor, write_checkpoint

# Types of the documented arguments, which are the same for all four classes.
Given: TypeAlias = npt.ArrayLike | None
PastArgument: TypeAlias = Cache | DynamicCache | LegacyCache | None
Flag: TypeAlias = bool | None  # None means: as in the configuration

AnyOutput = TypeVar("AnyOutput", bound=ModelOutput)


def _count_seen(places: Array | None, attention_mask: Any, seq: int) -> int | None:
    """Return the number of earlier tokens, given the places of these `seq` tokens or a mask over all tokens."""
    if places is not None and places.size:
        return int(places[0])
    if attention_mask is None or isinstance(attention_mask, Mapping):
        return None
    mask = as_array(attention_mask, "attention_mask")
    return int(mask.shape[-1] - seq) if mask.ndim in (2, 4) else None


def read_cache(
    past_key_values: PastArgument, config: Gemma2Config, like: Array, seq: int, attention_mask: Any,
    cache_position: Given,
) -> Cache | None:  # fmt: skip
    """Return a caller's cache, of any format, as a `Cache`; check that `cache_position` agrees with it."""
    places = None if cache_position is None else as_array(cache_position, "cache_position")
    if places is not None and (places.shape != (seq,) or places.dtype.kind not in "iu"):
        raise InputError(
            f"cache_position has shape {places.shape} and dtype {places.dtype}; "
            f"it must hold the places of {pluralise(seq, 'token')}, with shape ({seq},)"
        )
    given = past_key_values.value if isinstance(past_key_values, DynamicCache) else past_key_values
    if given is None or isinstance(given, Cache):
        cache = given or None  # treat an empty cache as None
    else:
        seen = _count_seen(places, attention_mask, seq)
        cache = Cache.from_legacy(given, config, like, seen)
    seen_now = cache.get_seq_length() if cache else 0
    if places is not None and (places != np.arange(seen_now, seen_now + seq)).any():
        raise InputError(
            f"cache_position is {places.tolist()}; after {pluralise(seen_now, 'token')} in the cache it must be "
            f"{seen_now} to {seen_now + seq - 1}: use position_ids for other rotary positions"
        )
    return cache


def _format_cache(cache: Cache, given: PastArgument) -> PastKeyValues:
    """Return the cache after a call, in the format of the caller's cache."""
    if isinstance(given, DynamicCache):
        return given
    return cache if given is None or isinstance(given, Cache) else cache.to_legacy()


def name_once(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was given as ``cache``, the name in transformers 5.24, or as ``past_key_values``."""
    if past_key_values is not None and cache is not None:
        raise InputError("past_key_values and cache are both given; give only one")
    return cache if past_key_values is None else past_key_values


def _choose(given: Flag, configured: bool) -> bool:
    """Return the caller's value, or the configuration's if it is None."""
    return configured if given is None else given


def select_tokens(hidden: Any, logits_to_keep: int | npt.NDArray[Any]) -> Any:
    """Return the tokens of `hidden` whose logits are requested; see `Gemma2ForCausalLM.forward`.

    Examples
    --------
    >>> hidden = np.arange(6.0).reshape(2, 3, 1)
    >>> select_tokens(hidden, 1)[:, :, 0], select_tokens(hidden, np.array([[0], [1]]))[:, :, 0]
    (array([[2.],
           [5.]]), array([[0.],
           [4.]]))
    """
    batch, seq = hidden.shape[:2]
    if isinstance(logits_to_keep, int | np.integer) and not isinstance(logits_to_keep, bool):
        if logits_to_keep < 0:
            raise InputError(
                f"logits_to_keep is {logits_to_keep}; it must be the number of last tokens to keep, or 0 for all"
            )
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    kept = as_array(logits_to_keep, "logits_to_keep")
    if kept.dtype == bool and kept.shape == (batch, seq):
        return hidden[kept]
    rows = kept.ndim == 1 or (kept.ndim == 2 and len(kept) == batch)
    if kept.dtype.kind not in "iu" or not rows or ((kept < -seq) | (kept >= seq)).any():
        raise InputError(
            f"logits_to_keep has shape {kept.shape} and dtype {kept.dtype}; it must hold places from {-seq} to "
            f"{seq - 1} in shape (kept,) or ({batch}, kept), or booleans in shape {(batch, seq)}"
        )
    return hidden[:, kept] if kept.ndim == 1 else hidden[np.arange(batch)[:, None], kept]


def _count_tokens(input_ids: Any, inputs_embeds: Any) -> int:
    """Return the number of tokens per row; return 0 for a wrong shape, and let `check_inputs` raise the error."""
    given = as_array(input_ids, "input_ids") if inputs_embeds is None else as_array(inputs_embeds, "inputs_embeds")
    return given.shape[1] if given.ndim > 1 else 0


def _warn_of_bools(attention_mask: Any) -> None:
    masks = attention_mask.values() if isinstance(attention_mask, Mapping) else [attention_mask]
    if any(str(getattr(mask, "dtype", "")).endswith("bool") and mask.ndim == 4 for mask in masks):
        warnings.warn(
            "attention_mask is boolean: here true means visible, but transformers adds true and false to the scores as "
            "1 and 0, which hides nothing; use 0 and np.finfo(np.float32).min, which mean the same in both",
            stacklevel=3,
        )


def _check_config(config: object, name: str) -> None:
    if not isinstance(config, Gemma2Config):
        raise ConfigError(
            f"{name}: config is a {type(config).__name__}; it must be a Gemma2Config; to load a model by name use "
            f"{name}.from_pretrained"
        )
    config.check()  # fields that were set one by one may contradict each other


def _check_shapes(config: Gemma2Config, checkpoint: Checkpoint) -> None:
    """Raise an error if weights do not fit the configuration; warn if the configuration has fewer layers."""
    layers, stored_layers = config.num_hidden_layers, checkpoint.config.num_hidden_layers
    if layers < stored_layers:
        warnings.warn(
            f"{checkpoint.folder}: layers {layers} to {stored_layers - 1} are left out, because num_hidden_layers is "
            f"{layers}",
            stacklevel=3,
        )
    for name, shape in tensor_shapes(config).items():
        stored = checkpoint.tensors.get(name)
        if name != LM_HEAD and (stored is None or tuple(stored.shape) != shape):
            found = "is missing" if stored is None else f"has shape {tuple(stored.shape)}"
            raise ConfigError(
                f"{checkpoint.folder}: {name} {found}; according to the given configuration it must be {shape}: leave "
                "out fields"
                " that change the shapes of the folder's weights"
            )


class Gemma2PreTrainedModel(ModuleMethods):
    """The base of the four classes: makes, loads and saves models.

    Parameters
    ----------
    config : Gemma2Config
        The model's configuration.
    seed : int
        The seed of new random weights; the same seed gives the same weights.
    dtype : str
        ``float32``, ``float64``, ``bfloat16`` or ``float16``: the precision of the weights and of the computation.
    weights, score : Weights, Score, optional
        Weights to use instead of random weights, and the head of a classifier.
    """

    has_head: ClassVar[bool] = False  # true if the class has a language-model head
    has_score: ClassVar[bool] = False  # true if the class has a classifier's head
    has_score_bias: ClassVar[bool] = False
    prefix: ClassVar[str] = ""  # prefix of the names in a language model, which this class's state dict leaves out

    def __init__(
        self, config: Gemma2Config, seed: int = 0, dtype: Any = "float32", weights: Weights | None = None,
        score: Score | None = None,
    ) -> None:  # fmt: skip
        _check_config(config, type(self).__name__)
        dtype = precision_named(dtype)
        self.config = config
        self._folder: Path | None = None  # folder from which the model was loaded
        self.weights = initial_weights(config, seed, dtype) if weights is None else weights
        fresh = self.has_score and score is None
        self.score = initial_score(config, seed, dtype, self.has_score_bias) if fresh else score

    def __repr__(self) -> str:
        """Return the class, the size and the precision."""
        return f"{type(self).__name__}({self.num_parameters():,} parameters, {self.dtype})"

    @classmethod
    def tensor_shapes(cls, config: Gemma2Config) -> dict[str, tuple[int, ...]]:
        """Return the shapes of this class's tensors, by their names in a causal language model."""
        shapes = tensor_shapes(config)
        if not cls.has_head:
            shapes.pop(LM_HEAD, None)
        labels = config.num_labels or 0  # not None, because the configuration sets a default
        score = {SCORE_WEIGHT: (labels, config.hidden_size)} if cls.has_score else {}
        bias = {SCORE_BIAS: (labels,)} if cls.has_score_bias else {}
        return shapes | score | bias

    @classmethod
    def from_config(
        cls, config: Gemma2Config, seed: int = 0, dtype: Any = None, torch_dtype: Any = None, **ignored: Any
    ) -> Self:
        """Make a model with new random weights: truncated normal with ``config.initializer_range``; norms and biases
        are zero.

        Arguments of transformers that change nothing here are ignored, as in `from_pretrained`. The configuration is
        copied.

        Raises
        ------
        UsageError
            If an argument is unknown, or would change the result.
        ConfigError
            If fields contradict each other.

        Examples
        --------
        >>> Gemma2ForCausalLM.from_config(Gemma2Config.from_pretrained("tiny"), seed=1)
        Gemma2ForCausalLM(2,922,426 parameters, float32)
        """
        refuse_arguments(ignored, f"{cls.__name__}.from_config")
        return cls(copy.deepcopy(config), seed, dtype or torch_dtype or "float32")

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: Any = None, seed: int = 0, revision: str | None = "main", download: bool = False,
        *, torch_dtype: Any = None, config: Gemma2Config | str | Path | None = None,
        ignore_mismatched_sizes: bool = False, cache_dir: str | Path | None = None, gguf_file: str | None = None,
        **changes: Any,
    ) -> Self:  # fmt: skip
        """Load a model by name.

        Parameters
        ----------
        name : str or path
            ``"tiny"``, ``"conformance"``, a folder, a ``.gguf`` file, or a hub id whose snapshot is in the Hugging Face
            cache; see `refgemma.hub.find_model`.
        dtype, torch_dtype : str or numpy.dtype, optional
            The precision of the computation, under either name. Default: float32, but transformers 5 uses the
            configuration's. ``"auto"`` uses the precision in the configuration or, if there is none, of the file.
        seed : int
            The seed of a classifier's head if the folder has none (with a warning).
        revision : str
            The branch, tag or commit of a hub id.
        download : bool
            If true, a hub id that is not in the cache is downloaded.
        config : Gemma2Config, str or path, optional
            A configuration to use instead of the folder's own. If it has fewer layers, the model uses the first layers.
        ignore_mismatched_sizes : bool
            If true, replace a classifier's head that has another number of labels by a new random head.
        cache_dir : str or path, optional
            A folder to use instead of the Hugging Face cache.
        gguf_file : str, optional
            A GGUF file of the folder or hub id, to be read instead of the other files.
        **changes
            Configuration fields to replace, for example ``num_labels=3``. Arguments of transformers without effect
            here, for example ``device_map="auto"``, are ignored; other arguments raise an error.

        Returns
        -------
        Gemma2PreTrainedModel
            A model of this class. If the model takes more than 4 GiB in its precision, each call reads the weights from
            disk, layer by layer.

        Raises
        ------
        CheckpointError, ConfigError, ModelNameError
            If the model cannot be loaded; the message names the file and the tensor.

        Examples
        --------
        >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
        >>> model([[2, 300, 400]]).logits.shape
        (1, 3, 2048)
        """
        changes = drop_arguments(changes, f"{cls.__name__}.from_pretrained", ConfigError)
        place = find_model(name, revision or "main", download, cache_dir=cache_dir, gguf_file=gguf_file)
        checkpoint = open_checkpoint(place)
        if config is None or isinstance(config, Gemma2Config):
            config = checkpoint.config if config is None else config
        else:
            config = Gemma2Config.from_pretrained(config, cache_dir=cache_dir)
        config = config.changed(**changes)
        _check_shapes(config, checkpoint)
        if cls.has_head and not config.tie_word_embeddings and LM_HEAD not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.folder}: has no {LM_HEAD!r}, but tie_word_embeddings is false; set tie_word_embeddings "
                "to true"
            )
        dtype = dtype or torch_dtype or "float32"
        if dtype == "auto":
            dtype = config.dtype or checkpoint.tensors[NORM].dtype.name
        precision = precision_named(dtype)
        score = None
        if cls.has_score:
            score = cls._read_score(checkpoint, config, seed, precision, ignore_mismatched_sizes)
        elif SCORE_WEIGHT in checkpoint.tensors:
            warnings.warn(f"{checkpoint.folder}: {SCORE_WEIGHT} is not used by {cls.__name__}", stacklevel=2)
        weights = replace(checkpoint, config=config).weights(precision)
        model = cls(config, weights=weights, score=score)
        model._folder = checkpoint.folder
        return model

    @classmethod
    def _read_score(
        cls, checkpoint: Checkpoint, config: Gemma2Config, seed: int, dtype: str, ignore_mismatched_sizes: bool
    ) -> Score:
        score = checkpoint.score(dtype)
        fits = score and len(score.weight) == config.num_labels and (score.bias is not None) == cls.has_score_bias
        if score and not fits and not ignore_mismatched_sizes:
            raise CheckpointError(
                f"{checkpoint.folder}: the classifier's head has {len(score.weight)} labels and "
                f"{'no' if score.bias is None else 'a'} bias; {cls.__name__} needs {config.num_labels} labels and "
                f"{'a' if cls.has_score_bias else 'no'} bias: set ignore_mismatched_sizes=True for a new random head"
            )
        if score and fits:
            return score
        warnings.warn(
            f"{checkpoint.folder} has no {'matching ' if score else ''}classifier's head, so the head of "
            f"{cls.__name__} "
            "has random (untrained) weights; train it before use",
            stacklevel=3,
        )
        return initial_score(config, seed, dtype, cls.has_score_bias)

    @classmethod
    def from_state_dict(
        cls, config: Gemma2Config, state_dict: Mapping[str, npt.ArrayLike], dtype: Any = "float32"
    ) -> Self:
        """Make a model from a state dict of arrays or PyTorch tensors.

        Raises
        ------
        CheckpointError
            If a tensor is missing or unknown, or has the wrong shape.

        Examples
        --------
        >>> model = Gemma2Model.from_pretrained("tiny")
        >>> again = Gemma2Model.from_state_dict(model.config, model.state_dict())
        >>> bool((again([[2, 300]]).last_hidden_state == model([[2, 300]]).last_hidden_state).all())
        True
        """
        given = {name if name == LM_HEAD else cls.prefix + name: as_array(x, name) for name, x in state_dict.items()}
        own_head = cls.has_head and config.tie_word_embeddings and {LM_HEAD, EMBED_TOKENS} <= given.keys()
        if own_head and not np.array_equal(given[LM_HEAD], given[EMBED_TOKENS]):
            warnings.warn(
                f"the state dict's {LM_HEAD!r} differs from {EMBED_TOKENS!r}, although the configuration ties the "
                "two; it is used unchanged: set tie_word_embeddings to false",
                stacklevel=2,
            )
            config = config.changed(tie_word_embeddings=False)
        shapes = cls.tensor_shapes(config)
        for name, shape in shapes.items():
            if name not in given:
                raise CheckpointError(f"the state dict lacks {name.removeprefix(cls.prefix)!r}; add it")
            if given[name].shape != shape:
                raise CheckpointError(
                    f"the state dict's {name.removeprefix(cls.prefix)!r} has shape {given[name].shape}; according to "
                    "the "
                    f"configuration it must be {shape}"
                )
        tied = {LM_HEAD} if cls.has_head else set()  # a copy of the embedding
        if extra := given.keys() - shapes.keys() - tied:
            raise CheckpointError(f"the state dict has {min(extra)!r}, which {cls.__name__} does not have; remove it")
        tensors = {name: as_dtype(given[name], precision_named(dtype)) for name in shapes}
        score = Score(tensors[SCORE_WEIGHT], tensors.get(SCORE_BIAS)) if cls.has_score else None
        return cls(config, weights=weights_of(tensors, config), score=score)

    def named_tensors(self) -> dict[str, Rows]:
        """Return every tensor by its Hugging Face name. A tied table appears once. Weights on disk are not read."""
        named = named_weights(self.weights, self.config)
        if not self.has_head:
            named.pop(LM_HEAD, None)
        score = (
            {}
            if self.score is None or not self.has_score
            else {SCORE_WEIGHT: self.score.weight, SCORE_BIAS: self.score.bias}
        )
        tensors = {name.removeprefix(self.prefix): tensor for name, tensor in named.items()}
        return tensors | {name: tensor for name, tensor in score.items() if tensor is not None}

    def state_dict(self) -> dict[str, Array]:
        """Return every tensor by its Hugging Face name; read weights that are on disk.

        Examples
        --------
        >>> list(Gemma2ForCausalLM.from_pretrained("tiny").state_dict())[1]
        'model.layers.0.self_attn.q_proj.weight'
        """
        tensors: dict[str, Array] = {name: tensor[:] for name, tensor in self.named_tensors().items()}
        return tensors | ({LM_HEAD: tensors[EMBED_TOKENS]} if self.has_head and LM_HEAD not in tensors else {})

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "50GB", **ignored: Any) -> None:
        """Write ``config.json`` and the weights as safetensors, for transformers and `from_pretrained`.

        A tied head is not written; set ``config.tie_word_embeddings = False`` to untie it. The weights keep their
        precision, and appear completely or not at all.

        Parameters
        ----------
        folder : str or Path
            The folder; it is created if it does not exist, and weights in it are replaced.
        max_shard_size : int or str
            The maximum size of a file, in bytes or as text such as ``"5GB"``. Larger models become several files and an
            index.
        **ignored
            Arguments of transformers that change nothing here, for example ``safe_serialization=True``.

        Raises
        ------
        ConfigError
            If ``config.hidden_activation`` is a function, which JSON cannot hold.
        CheckpointError
            If the disk has too little space.

        Examples
        --------
        >>> import tempfile
        >>> model = Gemma2ForCausalLM.from_pretrained("tiny", dtype="bfloat16")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = Gemma2ForCausalLM.from_pretrained(folder, dtype="auto")
        >>> again
        Gemma2ForCausalLM(2,922,426 parameters, bfloat16)
        """
        refuse_arguments(ignored, f"{type(self).__name__}.save_pretrained")
        config = self.config.changed(dtype=self.dtype, architectures=(type(self).__name__,))
        config.to_json_string()  # raises an error before anything is written
        tensors = self.named_tensors()
        if self.has_head and not config.tie_word_embeddings:
            tensors.setdefault(
                LM_HEAD, tensors[EMBED_TOKENS]
            )  # untied after loading, so the head is a copy of the embedding
        outputs = [OutputTensor(name, self.dtype, tuple(tensor.shape), tensor) for name, tensor in tensors.items()]
        write_checkpoint(folder, outputs, max_shard_size)
        config.save_pretrained(folder)


class Gemma2Model(Gemma2PreTrainedModel):
    """Gemma 2 without a head: returns the residual stream after the last layer and the final norm.

    Parameters
    ----------
    config, seed, dtype, weights
        As in `Gemma2PreTrainedModel`. The random weights of a model that does not fit into memory are drawn when used.

    Examples
    --------
    >>> model = Gemma2Model(Gemma2Config())
    >>> configuration = model.config
    >>> model
    Gemma2Model(8,537,852,928 parameters, float32)
    """

    prefix = "model."

    @property
    def embed_tokens(self) -> Module:
        """The embedding module."""
        return Module(self, "embed_tokens")

    @property
    def layers(self) -> Module:
        """The modules of the layers."""
        return Module(self, "layers")

    @property
    def norm(self) -> Module:
        """The module of the final norm."""
        return Module(self, "norm")

    def forward(
        self, input_ids: Given = None, attention_mask: Any = None, position_ids: Given = None,
        past_key_values: PastArgument = None, inputs_embeds: Given = None, use_cache: Flag = None,
        output_attentions: Flag = None, output_hidden_states: Flag = None, return_dict: Flag = None,
        cache_position: Given = None, cache: PastArgument = None, **ignored: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:  # fmt: skip
        """Run the layers. Calling the model is the same.

        Parameters
        ----------
        input_ids : int array (batch, seq)
            Token ids; with `past_key_values`, only the tokens after the cache.
        attention_mask : array, optional
            One of: ``(batch, tokens so far)`` with 1 for a token and 0 for padding, on either side. ``(batch, 1 or
            heads, seq, tokens so far)``, true where a query may see a key, or numbers to add to the scores; such a mask
            replaces the causal mask and the window. A mapping from ``"full_attention"`` and ``"sliding_attention"`` to
            two masks with four axes.
        position_ids : int array (batch, seq), optional
            The positions for the rotary angles. By default each token's place in its row, including padding. As in
            transformers, a call without a mask and with ``use_cache=False`` separates packed texts. A new text begins
            wherever the position does not increase by one. With a cache, each token sees all earlier tokens.
        past_key_values : Cache, DynamicCache, StaticCache or tuple of pairs (keys, values), optional
            The cache from an earlier call. A `DynamicCache` or `StaticCache` may be empty; it is filled in place and
            returned. For other formats, a new cache of the same format is returned.
        inputs_embeds : array (batch, seq, hidden), optional
            The inputs of the first block, instead of `input_ids`. As in transformers 5.x, they are not multiplied by
            ``sqrt(hidden)``.
        use_cache, output_attentions, output_hidden_states, return_dict : bool, optional
            Select the entries of the output; by default as in the configuration. With ``return_dict=False``, the output
            is a tuple of the entries that are not None.
        cache_position : int array (seq,), optional
            The places of these tokens, which are only compared with the cache. They are necessary only for a tuple of
            sliding layers, because it does not give the number of earlier tokens.
        cache : optional
            Another name of `past_key_values`, as in transformers 5.24.
        **ignored
            Arguments of transformers that have no effect here; any other argument raises an error.

        Returns
        -------
        BaseModelOutputWithPast
            The output. If no cache was given, its ``past_key_values`` is a `Cache`, which is also a tuple of pairs.

        Raises
        ------
        InputError
            If an argument is invalid; the message names it.

        Examples
        --------
        >>> model = Gemma2Model.from_pretrained("tiny")
        >>> first = model([[2, 300]])
        >>> second = model([[400]], past_key_values=first.past_key_values, output_attentions=True)
        >>> second.last_hidden_state.shape, second.attentions[1].shape
        ((1, 1, 234), (1, 6, 1, 3))
        """
        refuse_arguments(ignored, f"{type(self).__name__}.forward")
        config, weights, like = self.config, self.weights, self.weights.norm
        config.check()
        _warn_of_bools(attention_mask)
        given = name_once(past_key_values, cache)
        filled = given if isinstance(given, DynamicCache) else None
        keep_cache = _choose(use_cache, config.use_cache) or filled is not None
        if attention_mask is None and position_ids is not None and given is None and not keep_cache:
            attention_mask = packed_masks(position_ids, config)
        seq = _count_tokens(input_ids, inputs_embeds)
        past = read_cache(given, config, like, seq, attention_mask, cache_position)
        start = begin(
            input_ids, weights, config, attention_mask=attention_mask, position_ids=position_ids, cache=past,
            inputs_embeds=inputs_embeds,
        )  # fmt: skip
        keep_probs = _choose(output_attentions, config.output_attentions)
        keep_hidden = _choose(output_hidden_states, config.output_hidden_states)
        present: list[LayerCache] = []
        hidden, states, attentions = start.embedded, [start.embedded], []
        for record in blocks(start, weights, config):
            hidden = record.out
            if filled is not None and filled.keeps_all:
                present.append(record.attention.present)
            elif keep_cache:
                present.append(next_past(len(present), record, config))
            if keep_hidden:
                states.append(record.out)
            if keep_probs:
                attentions.append(record.attention.probs)
            del record
        norm = rms_norm(hidden, weights.norm, config.rms_norm_eps)
        if filled is not None:
            filled.fill(Cache(present))
        output = BaseModelOutputWithPast(
            last_hidden_state=norm,
            past_key_values=_format_cache(Cache(present), given) if keep_cache else None,
            hidden_states=(*states[:-1], norm) if keep_hidden else None,
            attentions=tuple(attentions) if keep_probs else None,
        )
        return output if _choose(return_dict, config.return_dict) else output.to_tuple()

    __call__ = forward


class _WithHead(Gemma2PreTrainedModel):
    """The base of the classes with a head."""

    @property
    def model(self) -> Gemma2Model:
        """The model without its head. It shares all attributes, so changing one model changes the other."""
        base = Gemma2Model.__new__(Gemma2Model)
        base.__dict__ = self.__dict__
        return base

    def _run_base(self, *arguments: Any) -> BaseModelOutputWithPast:
        """Run the model without its head on the arguments of `Gemma2Model.forward`."""
        output = self.model.forward(*arguments)
        assert isinstance(output, BaseModelOutputWithPast)  # because return_dict is true
        return output

    def _answer(
        self, kind: type[AnyOutput], base: BaseModelOutputWithPast, logits: Array, loss: float | None, return_dict: Flag
    ) -> AnyOutput | tuple[Any, ...]:
        """Return an output of type `kind`; the loss keeps its precision."""
        names = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # every output is a dataclass
        record: dict[str, Any] = {name: value for name, value in base.items() if name in names}
        record["loss"] = None if loss is None else wide(logits).dtype.type(loss)
        record["logits"] = logits
        output = kind(**record)
        return output if _choose(return_dict, self.config.return_dict) else output.to_tuple()


def _list_callables(given: Any, name: str) -> Sequence[Any]:
    """Return a list's functions; return an empty list for None."""
    if given is None:
        return ()
    if callable(given) and not isinstance(given, Sequence):
        raise InputError(f"{name} is a {type(given).__name__}; it must be a list; put the function into a list")
    return list(given)


class Gemma2ForCausalLM(_WithHead):
    """Gemma 2 with its language-modelling head; computes scores of the next token, and generates text.

    Parameters
    ----------
    config, seed, dtype, weights
        As in `Gemma2PreTrainedModel`.

    Examples
    --------
    The example on transformers' documentation page (the page uses Gemma 1's class and ``google/gemma-2-9b``):

    >>> from refgemma import AutoTokenizer, Gemma2ForCausalLM
    >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
    >>> tokenizer = AutoTokenizer.from_pretrained("tiny")
    >>> prompt = "What is your favorite condiment?"
    >>> inputs = tokenizer(prompt, return_tensors="np")
    >>> # Generate
    >>> generate_ids = model.generate(inputs.input_ids, max_length=30)
    >>> tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    'What is your favorite condiment? He is a man, and he has a man who has a man who has a'

    Compute a loss:

    >>> output = model(inputs.input_ids, labels=inputs.input_ids)
    >>> output.logits.shape, output.loss.shape, output.keys()
    ((1, 13, 2048), (), dict_keys(['loss', 'logits', 'past_key_values']))
    """

    has_head = True

    @property
    def lm_head(self) -> Module:
        """The head; calling it with hidden states returns logits before the final cap."""
        return Module(self, "lm_head")

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The default settings of `generate`, from the folder's ``generation_config.json`` if there is one."""
        file = self._folder and self._folder / GENERATION_CONFIG
        if file is not None and file.exists():
            return GenerationConfig.from_json_file(file)
        return GenerationConfig.from_model_config(self.config)

    def generate(
        self,
        inputs: npt.ArrayLike | Mapping[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Processor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Array], Any] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Streamer | None = None,
        negative_prompt_ids: npt.ArrayLike | None = None,
        negative_prompt_attention_mask: npt.ArrayLike | None = None,
        custom_generate: Any = None,
        *,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        input_ids: npt.ArrayLike | None = None,
        attention_mask: npt.ArrayLike | None = None,
        position_ids: npt.ArrayLike | None = None,
        inputs_embeds: npt.ArrayLike | None = None,
        past_key_values: Cache | DynamicCache | None = None,
        cache: Cache | DynamicCache | None = None,
        **settings: Any,
    ) -> Array | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
        """Continue prompts, and return the tokens.

        Parameters
        ----------
        inputs, input_ids : int array (batch, seq), optional
            The prompts, under either name, with left padding. Without prompts, one text begins with ``<bos>``. `inputs`
            may also be the whole output of a tokenizer, including the mask.
        generation_config : GenerationConfig, optional
            Settings of this call. Missing settings come from the model's `generation_config`, then from the defaults.
        logits_processor : sequence of callable, optional
            Functions that take token ids ``(rows, length)`` and scores ``(rows, vocab)``, and return new scores.
        stopping_criteria : sequence of callable, optional
            Functions that take ids, including the new token, and scores, and return true for each complete text.
        prefix_allowed_tokens_fn : callable, optional
            Function that takes a prompt's number and the text's ids ``(length,)``, and lists the tokens that may
            follow.
        synced_gpus, custom_generate : optional
            `synced_gpus` has no effect; `custom_generate`, which runs code from a repository, raises an error.
        assistant_model, assistant_tokenizer : optional
            A smaller model that guesses tokens, and its tokenizer. Ignored, because the texts do not depend on them.
        streamer : object with ``put`` and ``end``, optional
            Object that receives the prompts, then each new token; for example a `TextStreamer`.
        negative_prompt_ids, negative_prompt_attention_mask : int array (batch, seq), optional
            The prompt that ``guidance_scale`` moves the texts away from.
        tokenizer : Tokenizer, optional
            The tokenizer, needed for ``stop_strings``.
        attention_mask : int array (batch, seq), optional
            1 for tokens, 0 for padding. By default, pad tokens are padding, unless the pad token can also end a text.
        position_ids : int array (batch, seq), optional
            The positions of the tokens; by default counted from the first token that is not padding.
        inputs_embeds : array (batch, seq, hidden), optional
            The prompts as embeddings; only new tokens are returned.
        past_key_values, cache : Cache, DynamicCache or StaticCache, optional
            A cache of the beginning of the prompts, under either name; `input_ids` must include these tokens. A
            `DynamicCache` or `StaticCache` may be empty and is filled in place.
        **settings
            Settings of this call, which have priority over all others; see `GenerationConfig`.

        Returns
        -------
        array (rows, length), GenerateDecoderOnlyOutput or GenerateBeamDecoderOnlyOutput
            The prompts with the new tokens; each prompt has ``num_return_sequences`` rows. With
            ``return_dict_in_generate``, a record.

        Raises
        ------
        InputError
            If an argument or a setting is invalid; the message names it.

        Notes
        -----
        Draws continue from call to call, and `refgemma.generation.beams.set_seed` restarts them; ``seed`` makes one
        call reproducible. The same seed gives other draws in torch. If scores are equal, the first token wins, as in
        torch's argmax; torch's ``topk``, which its beam search uses, does not define the order.

        Examples
        --------
        >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
        >>> model.generate([[2, 300]], max_length=5).shape
        (1, 5)
        >>> found = model.generate([[2, 300]], num_beams=3, max_new_tokens=4, num_return_sequences=2,
        ...     return_dict_in_generate=True, output_scores=True)
        >>> found.sequences.shape, bool(found.sequences_scores[0] >= found.sequences_scores[1])
        ((2, 6), True)
        """
        if isinstance(inputs, Mapping):
            encoded = {"attention_mask": attention_mask, "position_ids": position_ids} | dict(inputs)
            return self.generate(
                None, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, synced_gpus,
                assistant_model, streamer, negative_prompt_ids, negative_prompt_attention_mask, custom_generate,
                tokenizer=tokenizer, inputs_embeds=inputs_embeds, past_key_values=past_key_values, cache=cache,
                **encoded, **settings,
            )  # fmt: skip
        if inputs is not None and input_ids is not None:
            raise InputError("inputs and input_ids are both given; give only one")
        ids = input_ids if inputs is None else inputs
        unused = {"synced_gpus": synced_gpus, "custom_generate": custom_generate}
        call = merge_settings(generation_config, self.generation_config, unused | settings)
        past = name_once(past_key_values, cache)
        value = past
        if isinstance(past, DynamicCache):
            value, call = past.value, call.changed(use_cache=True)
        prompts = Prompts(ids, attention_mask, position_ids, inputs_embeds, value or None)
        output = generate_batch(
            prompts, self.weights, self.config, call, _list_callables(logits_processor, "logits_processor"),
            _list_callables(stopping_criteria, "stopping_criteria"), streamer, allowed=prefix_allowed_tokens_fn,
            tokenizer=tokenizer, negative=(negative_prompt_ids, negative_prompt_attention_mask),
        )  # fmt: skip
        if isinstance(past, DynamicCache):
            assert isinstance(output.past_key_values, Cache)  # use_cache is true
            past.fill(output.past_key_values)
            output = replace(output, past_key_values=past)
        return output if call.return_dict_in_generate else output.sequences

    def compute_transition_scores(
        self, sequences: npt.ArrayLike, scores: Sequence[Array], beam_indices: npt.ArrayLike | None = None,
        normalize_logits: bool = False,
    ) -> Array:  # fmt: skip
        """Return the scores of the new tokens of `generate`, ``(rows, new)``; 0 after the end of a text.

        Parameters
        ----------
        sequences, scores, beam_indices
            Fields of the record of `generate` with ``output_scores=True``; `beam_indices` only after a beam search.
        normalize_logits : bool
            If true, turn the scores into log probabilities first.

        Examples
        --------
        >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
        >>> found = model.generate([[2, 300]], max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
        >>> model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True).shape
        (1, 3)
        """
        origins = None if beam_indices is None else as_array(beam_indices, "beam_indices")
        return compute_transition_scores(as_array(sequences, "sequences"), scores, origins, normalize_logits)

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "50GB", **ignored: Any) -> None:
        """Write the files of `Gemma2PreTrainedModel.save_pretrained`, and ``generation_config.json``."""
        settings = self.generation_config  # read this before anything is written
        super().save_pretrained(folder, max_shard_size, **ignored)
        settings.save_pretrained(folder)

    def forward(
        self, input_ids: Given = None, attention_mask: Any = None, position_ids: Given = None,
        past_key_values: PastArgument = None, inputs_embeds: Given = None, labels: Given = None, use_cache: Flag = None,
        output_attentions: Flag = None, output_hidden_states: Flag = None, return_dict: Flag = None,
        cache_position: Given = None, logits_to_keep: int | npt.NDArray[Any] = 0, cache: PastArgument = None,
        num_items_in_batch: float | None = None, ignore_index: int = IGNORED, shift_labels: Given = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:  # fmt: skip
        """Run the model and its head. Calling the model is the same.

        Parameters
        ----------
        input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
            As in `Gemma2Model.forward`.
        labels : int array (batch, seq), optional
            The tokens themselves; each label is predicted by the logits of the previous token. -100 is ignored.
        use_cache, output_attentions, output_hidden_states, return_dict, cache_position, cache
            As in `Gemma2Model.forward`.
        logits_to_keep : int or array
            The tokens whose logits are computed. A number n means the last n tokens, and 0 all. An int array
            ``(kept,)`` or ``(batch, kept)`` gives places. A bool array ``(batch, seq)`` is true for these tokens, and
            the logits then have the shape ``(tokens, vocab)``.
        num_items_in_batch, ignore_index, shift_labels : optional
            See `refgemma.heads.causal_lm_loss`; used only with `labels`.
        **ignored
            As in `Gemma2Model.forward`.

        Returns
        -------
        CausalLMOutputWithPast
            The output.

        Raises
        ------
        InputError
            If an argument is invalid; the message names it.

        Examples
        --------
        >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
        >>> (logits,) = model([[2, 300, 400]], logits_to_keep=1, use_cache=False, return_dict=False)
        >>> logits.shape
        (1, 1, 2048)
        """
        refuse_arguments(ignored, f"{type(self).__name__}.forward")
        base = self._run_base(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                              output_attentions, output_hidden_states, True, cache_position, cache)  # fmt: skip
        kept = select_tokens(base.last_hidden_state, logits_to_keep)
        flat = kept.ndim == 2  # a bool array selects tokens of all rows in one axis
        _, all_logits = head(kept[None] if flat else kept, self.weights, self.config)
        logits = all_logits[0] if flat else all_logits
        loss = None if labels is None else causal_lm_loss(
            logits, labels, num_items_in_batch, ignore_index, shift_labels
        )  # fmt: skip
        return self._answer(CausalLMOutputWithPast, base, logits, loss, return_dict)

    __call__ = forward


class Gemma2ForSequenceClassification(_WithHead):
    """Gemma 2 with a linear layer on top of the last token of each sequence.

    The last token is the rightmost token that is not ``config.pad_token_id``, with padding on either side. If no pad id
    is configured, or if `inputs_embeds` hides the padding, it is the last token of the row. Without a pad id only one
    row is possible.

    Parameters
    ----------
    config, seed, dtype, weights, score
        As in `Gemma2PreTrainedModel`. ``config.num_labels`` is the number of classes.

    Examples
    --------
    >>> config = Gemma2Config.from_pretrained("tiny", num_labels=3)
    >>> model = Gemma2ForSequenceClassification(config, seed=1)
    >>> output = model([[2, 300, 400], [2, 500, 0]], labels=[2, 0])
    >>> output.logits.shape, output.loss > 0
    ((2, 3), np.True_)
    """

    has_score = True

    def forward(
        self, input_ids: Given = None, attention_mask: Any = None, position_ids: Given = None,
        past_key_values: PastArgument = None, inputs_embeds: Given = None, labels: Given = None, use_cache: Flag = None,
        output_attentions: Flag = None, output_hidden_states: Flag = None, return_dict: Flag = None,
        cache_position: Given = None, cache: PastArgument = None, **ignored: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:  # fmt: skip
        """Run the model and its head. Calling the model is the same.

        Parameters
        ----------
        input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
            As in `Gemma2Model.forward`.
        labels : array, optional
            A class or numbers for each sequence, as in `refgemma.heads.sequence_classification_loss`. As in
            transformers, their problem type is stored in the configuration and used in later calls.
        use_cache, output_attentions, output_hidden_states, return_dict, cache_position, cache, **ignored
            As in `Gemma2Model.forward`.

        Returns
        -------
        SequenceClassifierOutputWithPast
            The output.

        Raises
        ------
        InputError
            If an argument is invalid, or if there are several rows but no pad id in the configuration.

        Examples
        --------
        >>> config = Gemma2Config.from_pretrained("tiny", num_labels=1)
        >>> model = Gemma2ForSequenceClassification(config)
        >>> model([[2, 300]], labels=[0.5]).logits.shape  # a regression
        (1, 1)
        """
        refuse_arguments(ignored, f"{type(self).__name__}.forward")
        base = self._run_base(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                              output_attentions, output_hidden_states, True, cache_position, cache)  # fmt: skip
        assert self.score is not None  # __init__ makes the head
        all_logits = linear(base.last_hidden_state, self.score.weight)
        logits = all_logits[np.arange(len(all_logits)), self._find_last(input_ids, len(all_logits))]
        loss = None
        if labels is not None:
            kind = self.config.problem_type or infer_problem_type(labels, logits.shape[1])
            loss = sequence_classification_loss(logits, labels, kind)
            self.config.problem_type = kind
        return self._answer(SequenceClassifierOutputWithPast, base, logits, loss, return_dict)

    def _find_last(self, input_ids: npt.ArrayLike | None, batch: int) -> Any:
        """Return the place of the token to classify in each row."""
        padding = self.config.pad_token_id
        if padding is None and batch > 1:
            raise InputError(
                f"there are {batch} sequences, but pad_token_id is None, so the ends of the sequences are unknown; "
                "give one sequence "
                "at a time, or set config.pad_token_id"
            )
        if padding is not None and input_ids is not None:
            return last_tokens(np.asarray(input_ids), padding)
        if input_ids is None:
            warnings.warn(
                "padding is not visible in inputs_embeds, so each row is classified at its last place", stacklevel=4
            )
        return -1

    __call__ = forward


class Gemma2ForTokenClassification(_WithHead):
    """Gemma 2 with a linear layer on top of every token, for example to find named entities.

    Parameters
    ----------
    config, seed, dtype, weights, score
        As in `Gemma2PreTrainedModel`. ``config.num_labels`` is the number of classes. Dropout before the head is never
        applied.

    Examples
    --------
    >>> config = Gemma2Config.from_pretrained("tiny", num_labels=3)
    >>> model = Gemma2ForTokenClassification(config, seed=1)
    >>> model([[2, 300, 400]], labels=[[-100, 0, 2]]).logits.shape
    (1, 3, 3)
    """

    has_score = True
    has_score_bias = True

    def forward(
        self, input_ids: Given = None, attention_mask: Any = None, position_ids: Given = None,
        past_key_values: PastArgument = None, inputs_embeds: Given = None, labels: Given = None, use_cache: Flag = None,
        output_attentions: Flag = None, output_hidden_states: Flag = None, return_dict: Flag = None,
        cache_position: Given = None, cache: PastArgument = None, **ignored: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:  # fmt: skip
        """Run the model and its head. Calling the model is the same.

        Parameters
        ----------
        input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
            As in `Gemma2Model.forward`.
        labels : int array (batch, seq), optional
            The class of each token; -100 is ignored.
        use_cache, output_attentions, output_hidden_states, return_dict, cache_position, cache, **ignored
            As in `Gemma2Model.forward`. No cache is returned.

        Returns
        -------
        TokenClassifierOutput
            The output.

        Raises
        ------
        InputError
            If an argument is invalid; the message names it.

        Examples
        --------
        >>> model = Gemma2ForTokenClassification(Gemma2Config.from_pretrained("tiny"))
        >>> model([[2, 300]]).keys()
        dict_keys(['logits'])
        """
        refuse_arguments(ignored, f"{type(self).__name__}.forward")
        base = self._run_base(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                              output_attentions, output_hidden_states, True, cache_position, cache)  # fmt: skip
        assert self.score is not None  # __init__ makes the head
        logits = linear(base.last_hidden_state, self.score.weight, self.score.bias)
        loss = None if labels is None else token_classification_loss(logits, labels)
        return self._answer(TokenClassifierOutput, base, logits, loss, return_dict)

    __call__ = forward
