"""Show the parts of a model under torch's names, as in ``model.layers[0].mlp.up_proj.weight``, and replace weights.

Checked against the modules, the printed text and `resize_token_embeddings` of transformers 5.23 in the parity tests.
"""

import copy
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError, as_array, check_token_ids
from refgemma.model import embed, unembed
from refgemma.ops import linear, rms_norm
from refgemma.precision import Array, Rounded, as_dtype, dtype_name, narrow, precision_named, wide
from refgemma.weights.parameters import (
    EMBED_TOKENS,
    LM_HEAD,
    LayerRows,
    LayerWeights,
    OnDemand,
    Rows,
    Score,
    Weights,
    row_pieces,
)
from refgemma.weights.stored import CheckpointError

# --- views ------------------------------------------------------------------------------------------------------------


@dataclass(unsafe_hash=True)
class Module:
    """A part of a model, with tensors and smaller parts by name. It can be called if it is a single operation.

    A module is a view: each access looks up the model's current tensors.

    Examples
    --------
    >>> from refgemma import Gemma2ForCausalLM
    >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
    >>> model.model.layers[0].self_attn.q_proj.weight.shape, len(model.model.layers)
    ((192, 234), 6)
    >>> model.lm_head(model.model.norm(np.ones((1, 1, 234), np.float32))).shape
    (1, 1, 2048)
    """

    model: Any  # a Gemma2PreTrainedModel
    name: str

    def __setattr__(self, name: str, value: Any) -> None:
        """Write new numbers of the same shape into a tensor of this part."""
        if name in self.__dataclass_fields__:
            return object.__setattr__(self, name, value)
        tensor = self.tensors().get(name)
        if tensor is None:
            raise AttributeError(f"{self.name}.{name} {CANNOT_BE_SET}")
        if self.name.endswith(("embed_tokens", "lm_head")) and self.model.config.tie_word_embeddings:
            raise AttributeError(
                f"{self.name}.{name} is the table that embedding and head share; setting it would untie them: "
                f"write {name}[:] = ... to change both"
            )
        given = as_array(value, name)
        if given.shape != tensor.shape:
            raise InputError(f"the new {self.name}.{name} has shape {given.shape}; it must have shape {tensor.shape}")
        if not _is_kept(tensor):
            raise InputError(
                f"{self.name}.{name} is read from disk or made at each use, so it cannot be changed in place; "
                "replace it with load_state_dict"
            )
        tensor[:][...] = given
        return None

    def tensors(self) -> dict[str, Rows]:
        """Return the tensors of this part, by their names without this part's prefix. Weights on disk are not read."""
        named = self.model.named_tensors()
        if EMBED_TOKENS in named:
            named.setdefault(LM_HEAD, named[EMBED_TOKENS])  # the name of a tied head
        start = self.name + "."
        return {name.removeprefix(start): tensor for name, tensor in named.items() if name.startswith(start)}

    def parts(self) -> list[str]:
        """Return the names of the tensors and parts directly below this part."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.tensors()))

    def __repr__(self) -> str:
        """Return the full name, with the shape of the weight or the names of the parts."""
        tensors = self.tensors()
        inside = tensors["weight"].shape if "weight" in tensors else ", ".join(self.parts())
        return f"{type(self.model).__name__}.{self.name}({inside})"

    def __getattr__(self, name: str) -> Any:
        """Return the tensor or the part with this name."""
        tensors = {} if name.startswith("_") else self.tensors()
        if name in tensors:
            return _show_tensor(tensors[name])
        if name == "bias" and "weight" in tensors:
            return None
        if not any(tensor.startswith(f"{name}.") for tensor in tensors):
            parts = f"; it has {', '.join(self.parts())}" if tensors and name not in ADVICE else ""
            raise AttributeError(explain_absence(self.name, name) + parts)
        return Module(self.model, f"{self.name}.{name}")

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.parts())

    def __getitem__(self, index: Any) -> Any:
        """Return a layer, or a list of layers."""
        named = [Module(self.model, f"{self.name}.{part}") for part in self.parts()]
        return named[index]

    def __iter__(self) -> Iterator[Any]:
        """Yield one layer after the other."""
        return iter(self[:])

    def __call__(self, x: Any) -> Array:
        """Compute the embedding of token ids, a norm, or a linear layer.

        Raises
        ------
        InputError
            If this part is more than one operation.
        """
        tensors, config = self.tensors(), self.model.config
        if "weight" not in tensors:
            raise InputError(
                f"{self.name} cannot be called alone; use the functions of refgemma.layers, or run the model with "
                "output_hidden_states=True"
            )
        table = tensors["weight"]
        if self.name.endswith("embed_tokens"):
            return embed(check_token_ids(x, table.shape[0]), table)
        values = x if isinstance(x, Rounded) else narrow(as_array(x, "the input"), like=self.model.weights.norm)
        if self.name.endswith("norm"):
            return rms_norm(values, table[:], config.rms_norm_eps)
        return unembed(values, table) if self.name == "lm_head" else linear(values, table[:], self.bias)


def _is_kept(tensor: Rows) -> bool:
    return isinstance(tensor, np.ndarray) or (isinstance(tensor, LayerRows) and tensor.kept)


def _show_tensor(tensor: Rows) -> Array:
    """Return all rows; a copy is read-only, because changes to a copy would be lost silently."""
    array: Array = tensor[:]
    if not _is_kept(tensor):
        array.flags.writeable = False
    return array


def describe(model: Any) -> str:
    """Return the text that torch prints for this model.

    Examples
    --------
    >>> from refgemma import Gemma2Model
    >>> print(describe(Gemma2Model.from_pretrained("tiny"))[:86])
    Gemma2Model(
      (embed_tokens): Gemma2TextScaledWordEmbedding(2048, 234, padding_idx=0)
    """
    config, name = model.config, type(model).__name__
    hidden = config.hidden_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def line(part: str, inputs: int, outputs: int, bias: bool = False) -> str:
        return f"({part}): Linear(in_features={inputs}, out_features={outputs}, bias={bias})"

    def nest(head: str, inside: list[str]) -> str:
        return "\n".join([f"{head}(", *("  " + text.replace("\n", "\n  ") for text in inside), ")"])

    def norm(part: str) -> str:
        return f"({part}): Gemma2RMSNorm(({hidden},), eps={config.rms_norm_eps})"

    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
    }
    attention = [line(part, *size, config.attention_bias) for part, size in sizes.items()]
    wide_size = config.intermediate_size
    activation = "GELUTanh" if config.hidden_activation == "gelu_pytorch_tanh" else config.hidden_activation
    mlp = [line("gate_proj", hidden, wide_size), line("up_proj", hidden, wide_size)]
    mlp += [line("down_proj", wide_size, hidden), f"(act_fn): {activation}()"]
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    layer = [nest("(self_attn): Gemma2Attention", attention), nest("(mlp): Gemma2MLP", mlp), *map(norm, norms)]
    layers = config.num_hidden_layers
    numbers = "(0): Gemma2DecoderLayer" if layers == 1 else f"(0-{layers - 1}): {layers} x Gemma2DecoderLayer"
    padding = "" if config.pad_token_id is None else f", padding_idx={config.pad_token_id}"
    base = [
        f"(embed_tokens): Gemma2TextScaledWordEmbedding({config.vocab_size}, {hidden}{padding})",
        nest("(layers): ModuleList", [nest(numbers, layer)]), norm("norm"), "(rotary_emb): Gemma2RotaryEmbedding()",
    ]  # fmt: skip
    if model.has_head:
        return nest(name, [nest("(model): Gemma2Model", base), line("lm_head", hidden, config.vocab_size)])
    if model.has_score:
        dropout = ["(dropout): Dropout(p=0.1, inplace=False)"] if model.has_score_bias else []
        score = line("score", hidden, config.num_labels, model.has_score_bias)
        return nest(name, [nest("(model): Gemma2Model", base), *dropout, score])
    return nest(name, base)


# --- other weights ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CastMethods:
    """A tensor in another precision; rows are read or made when accessed."""

    tensor: Rows
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.tensor.shape

    def __getitem__(self, rows: Any, /) -> Array:
        """Return the rows of a slice or of an integer array."""
        return as_dtype(self.tensor[rows], self.dtype)


def convert_weights(weights: Weights, dtype: str) -> Weights:
    """Return the weights in another precision; weights on disk are converted when read.

    Examples
    --------
    >>> import refgemma
    >>> convert_weights(refgemma.load("tiny").weights, "float16").norm.dtype
    dtype('float32')
    """

    def convert(tensor: Any) -> Any:
        if tensor is None:
            return None
        return as_dtype(tensor, dtype) if isinstance(tensor, np.ndarray | Rounded) else CastMethods(tensor, dtype)

    layers = weights.layers
    if isinstance(layers, OnDemand):
        tensor = layers.tensor
        layers = replace(layers, tensor=lambda name: CastMethods(tensor(name), dtype))
    else:
        layers = [LayerWeights(**{name: convert(x) for name, x in vars(layer).items()}) for layer in layers]
    return Weights(convert(weights.embed_tokens), layers, convert(weights.norm), convert(weights.lm_head))


def resize_table(table: Rows, count: int, std: float | None, rng: np.random.Generator) -> Array:
    """Return a table with `count` rows: the first rows of `table`, and random new rows if needed.

    New rows are drawn from a normal distribution with the mean of the old rows and 1e-9 times their covariance. If the
    covariance is not positive definite, for example with fewer rows than columns, the new rows equal the mean. If `std`
    is given, new rows are drawn with mean 0 and this standard deviation. Source: transformers
    ``_init_added_embeddings_weights_with_mean``; Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models".

    Examples
    --------
    >>> resize_table(np.array([[1.0, 2.0], [3.0, 4.0]]), 3, None, np.random.default_rng(0))
    array([[1., 2.],
           [3., 4.],
           [2., 3.]])
    """
    old, hidden = table.shape
    kept: Array = table[: min(old, count)]
    added = count - old
    if added <= 0:
        return kept
    drawn = rng.standard_normal((added, hidden))
    if std is not None:
        rows = drawn * std
    else:
        mean, covariance = _mean_and_covariance(table)
        try:
            rows = mean + drawn @ np.linalg.cholesky(np.float32(1e-9) * covariance).T
        except np.linalg.LinAlgError:
            rows = np.broadcast_to(mean, drawn.shape)
    return np.concatenate([kept, as_dtype(np.asarray(rows), dtype_name(kept))])


def _mean_and_covariance(
    table: Rows,
) -> tuple[Float[np.ndarray, " hidden"], Float[np.ndarray, "hidden hidden"]]:
    """Return mean and covariance of the rows; the covariance is computed in float32, as in torch."""
    rows = table.shape[0]
    mean = sum(wide(piece).sum(axis=0, dtype=np.float64) for piece in row_pieces(table)) / rows
    centred = ((wide(piece) - mean).astype(np.float32) for piece in row_pieces(table))
    covariance = sum(piece.T @ piece for piece in centred) / np.float32(rows)
    return np.asarray(mean), np.asarray(covariance)


# --- the methods of a torch module ------------------------------------------------------------------------------------

DEVICE = re.compile(r"(auto|cpu|cuda|mps|xpu|npu|hpu|tpu|xla)(:\d+)?")


# Attribute of torch's modules that is missing here -> what to do instead.
_ABSENT = {
    "register_forward_hook register_forward_pre_hook register_full_backward_hook": (
        "use refgemma.forward, which returns every tensor by name, or output_hidden_states and output_attentions"
    ),
    "add_adapter load_adapter merge_and_unload set_adapter": (
        "use from_pretrained(folder of the adapter), which merges the adapter"
    ),
    "disable_input_require_grads enable_input_require_grads gradient_checkpointing_disable "
    "gradient_checkpointing_enable print_trainable_parameters zero_grad": (
        "train with refgemma.training or refgemma train"
    ),
    "set_input_embeddings set_output_embeddings": "write into get_input_embeddings().weight, or use load_state_dict",
    "generate generation_config": "only Gemma2ForCausalLM generates; load the folder with that class",
    "lm_head": "only Gemma2ForCausalLM has a head; load the folder with that class",
    "buffers named_buffers": "the rotary tables are not stored; see refgemma.ops.rotary_tables",
    "act_fn rotary_emb": "it has no weights; see refgemma.activations and refgemma.ops.rotary_tables",
    "vocab_size": "it is in the configuration: model.config.vocab_size",
    "named_children": "use named_modules, which lists the parts at any depth",
    "data": "use the parameter itself, which is an array",
    "grad": "train with refgemma.training or refgemma train",
    "add_module register_buffer register_module register_parameter": "a model has only the parts of Gemma 2",
    "compile set_attn_implementation": "leave it out; refgemma has only one implementation",
    "prepare_inputs_for_generation": "use generate; in your own loop, pass all tokens, or a cache and the next token",
    "save_pretrained_merged": "use save_pretrained; adapters are merged when loaded",
}
CANNOT_BE_SET = (
    "cannot be set: write into the weights (weight[:] = ...), use load_state_dict, or make the model with another "
    "configuration (from_pretrained(folder, num_hidden_layers=3) uses the first layers)"
)
ADVICE = {name: advice for names, advice in _ABSENT.items() for name in names.split()}


def explain_absence(owner: str, name: str) -> str:
    """Return the message for a missing attribute."""
    return f"{owner} has no {name!r}" + (f": {ADVICE[name]}" if name in ADVICE else "")


class LoadedKeys(NamedTuple):
    """The result of `load_state_dict`: the missing names and the unknown names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class ModuleMethods:
    """The methods that the documented classes share with torch's modules."""

    config: Gemma2Config
    weights: Weights
    score: Score | None
    has_head: ClassVar[bool]
    has_score: ClassVar[bool]
    device: ClassVar[str] = "cpu"
    training: ClassVar[bool] = False

    def named_tensors(self) -> dict[str, Rows]:  # noqa: D102  # documented where it is defined
        raise NotImplementedError

    def state_dict(self) -> dict[str, Array]:  # noqa: D102
        raise NotImplementedError

    if not TYPE_CHECKING:  # hidden from type checkers, for which every attribute would exist

        def __getattr__(self, name: str) -> Any:
            """Raise an error; for an attribute of torch's modules, the message gives the replacement."""
            raise AttributeError(explain_absence(type(self).__name__, name))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; raise an error with the replacement if it is a part of the model."""
        if isinstance(getattr(type(self), name, None), property):
            raise AttributeError(f"{type(self).__name__}.{name} {CANNOT_BE_SET}")
        object.__setattr__(self, name, value)

    @property
    def dtype(self) -> str:
        """The precision of the weights and of the computation, by name."""
        return dtype_name(self.weights.norm)

    def __str__(self) -> str:
        """Return the parts of the model, as torch prints them."""
        return describe(self)

    def to(self, *places: Any, dtype: Any = None, device: Any = None, **ignored: Any) -> Self:
        """Convert the weights to another precision, in place. A device is ignored, because refgemma uses only the CPU.

        As with ``from_pretrained(dtype=...)``, but unlike a cast in torch, the rotary frequencies stay in float32.

        Examples
        --------
        >>> from refgemma import Gemma2ForCausalLM
        >>> Gemma2ForCausalLM.from_pretrained("tiny").to("cuda").to("bfloat16")
        Gemma2ForCausalLM(2,922,426 parameters, bfloat16)
        """
        for given in (*places, dtype):
            text = str(given)
            if given is None or isinstance(given, int) or DEVICE.fullmatch(text):
                continue  # str() of a torch.device is its name
            precision = precision_named(given)
            self.weights = convert_weights(self.weights, precision)
            if self.score is not None:
                bias = None if self.score.bias is None else as_dtype(self.score.bias, precision)
                self.score = Score(as_dtype(self.score.weight, precision), bias)
        return self

    def cpu(self) -> Self:
        """Return this model unchanged."""
        return self

    def cuda(self, device: Any = None) -> Self:
        """Return this model unchanged, because refgemma uses only the CPU."""
        return self

    def half(self) -> Self:
        """Convert the weights to float16, in place."""
        return self.to("float16")

    def bfloat16(self) -> Self:
        """Convert the weights to bfloat16, in place."""
        return self.to("bfloat16")

    def float(self) -> Self:
        """Convert the weights to float32, in place."""
        return self.to("float32")

    def double(self) -> Self:
        """Convert the weights to float64, in place."""
        return self.to("float64")

    def eval(self) -> Self:
        """Return this model unchanged; it has no training mode, and dropout is never applied."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Return this model unchanged; warn if torch would apply dropout."""
        if mode and (self.config.attention_dropout or self.has_score):
            warnings.warn("refgemma never applies dropout, so train() changes nothing", stacklevel=2)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Return this model unchanged, because its arrays record no gradients."""
        return self

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield the model with the name "", then each part with weights, with its name, in torch's order.

        Examples
        --------
        >>> from refgemma import Gemma2Model
        >>> [name for name, _ in Gemma2Model.from_pretrained("tiny").named_modules()][:5]
        ['', 'embed_tokens', 'layers', 'layers.0', 'layers.0.self_attn']
        """
        yield "", self
        seen = set()
        tied_head = [LM_HEAD] if self.has_head else []
        for name in dict.fromkeys([*self.named_tensors(), *tied_head]):
            parts = name.split(".")[:-1]
            for end in range(1, len(parts) + 1):
                part = ".".join(parts[:end])
                if part not in seen:
                    seen.add(part)
                    yield part, self.get_submodule(part)

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return getattr(self, "model", self)

    def get_decoder(self) -> Any:
        """Return the model without its head."""
        return self.base_model

    def can_generate(self) -> bool:
        """Return True if the class has `generate`."""
        return self.has_head

    def modules(self) -> Iterator[Any]:
        """Yield the modules of `named_modules`, without the names."""
        return (module for _, module in self.named_modules())

    def get_submodule(self, target: str) -> Any:
        """Return the part with this name."""
        return functools.reduce(getattr, target.split("."), self) if target else self

    def get_parameter(self, target: str) -> Array:
        """Return the tensor with this name."""
        found: Array = self.get_submodule(target)
        return found

    def apply(self, fn: Callable[[Any], Any]) -> Self:
        """Call `fn` with each part, inner parts before outer parts, and with the model last."""
        for module in [*self.modules()][::-1]:
            fn(module)
        return self

    def named_parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield every tensor with its name; a tied head appears once. Changing an array in place changes the model.

        Arrays are read-only if each use reads the weights from disk.
        """
        return ((name, _show_tensor(tensor)) for name, tensor in self.named_tensors().items())

    def parameters(self) -> Iterator[Array]:
        """Yield every tensor; a tied head appears once."""
        return (tensor for _, tensor in self.named_parameters())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters; a tied head counts once. `exclude_embeddings` leaves out the embedding."""
        tensors = self.named_tensors()
        return sum(
            math.prod(tensor.shape) for name, tensor in tensors.items()
            if not (exclude_embeddings and name.endswith("embed_tokens.weight"))
        )  # fmt: skip

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the weights and of torch's buffers, as transformers counts."""
        size = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        # torch's buffers: the factor of the embedding, and the rotary frequencies twice.
        return self.num_parameters() * size + (size + 4 * self.config.head_dim if return_buffers else 0)

    def load_state_dict(
        self, state_dict: Mapping[str, npt.ArrayLike], strict: bool = True, assign: bool = False
    ) -> LoadedKeys:
        """Replace the model's tensors with copies of the given tensors.

        Parameters
        ----------
        state_dict : mapping of str to array
            Tensors under the names of this class.
        strict : bool
            If true, all names of the model (including a tied head's) and no others must be given, as in torch. If
            false, tensors that are not given stay unchanged.
        assign : bool
            Ignored.

        Returns
        -------
        LoadedKeys
            The missing names and the unknown names; both are empty if `strict`.

        Raises
        ------
        CheckpointError
            If a tensor is missing or unknown, or has the wrong shape.

        Examples
        --------
        >>> from refgemma import Gemma2Model
        >>> model = Gemma2Model.from_pretrained("tiny")
        >>> model.load_state_dict({"norm.weight": np.ones(234, np.float32)}, strict=False).unexpected_keys
        []
        >>> float(model.norm.weight[0])
        1.0
        """
        own = self.state_dict()
        stored = self.named_tensors().keys()
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        if strict and missing:
            raise CheckpointError(
                f"the state dict lacks {missing[0]!r}; add it, or use strict=False to keep the model's own tensor"
            )
        if strict and unexpected:
            name = type(self).__name__
            raise CheckpointError(f"the state dict has {unexpected[0]!r}, which {name} does not have; remove it")
        given = {name: state_dict.get(name, own[name]) for name in stored}
        if LM_HEAD in state_dict and LM_HEAD in own and LM_HEAD not in stored:
            given[EMBED_TOKENS] = state_dict[LM_HEAD]  # one table under two names; torch copies the head last
        new = copy.deepcopy(type(self).from_state_dict(self.config, given, self.dtype))  # type: ignore[attr-defined]
        self.weights = new.weights if self.has_head else replace(new.weights, lm_head=self.weights.lm_head)
        if self.has_score:
            self.score = new.score
        return LoadedKeys(missing, unexpected)

    def get_input_embeddings(self) -> Module:
        """Return the embedding module; calling it with token ids returns the inputs of the layers."""
        prefix = next(name for name in self.named_tensors() if name.endswith("embed_tokens.weight"))
        return Module(self, prefix.removesuffix(".weight"))

    def get_output_embeddings(self) -> Module | None:
        """Return the head of a language model, or None."""
        return Module(self, "lm_head") if self.has_head else None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True,
        seed: int = 0,
    ) -> Module:  # fmt: skip
        """Change the number of rows of the embedding and the head, and update the configuration.

        Parameters
        ----------
        new_num_tokens : int, optional
            The new number of rows; by default the present number.
        pad_to_multiple_of : int, optional
            Round the number of rows up to a multiple of this number.
        mean_resizing : bool
            If true, new rows are drawn around the mean of the old rows (see `resize_table`); if false, around zero with
            the standard deviation ``config.initializer_range``.
        seed : int
            The seed of the random rows.

        Returns
        -------
        Module
            The embedding module.

        Raises
        ------
        InputError
            If a number of rows is invalid.

        Examples
        --------
        >>> from refgemma import Gemma2ForCausalLM
        >>> model = Gemma2ForCausalLM.from_pretrained("tiny")
        >>> model.resize_token_embeddings(2050, pad_to_multiple_of=64).weight.shape, model.config.vocab_size
        ((2112, 234), 2112)
        """
        count = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        given: dict[str, Any] = {"new_num_tokens": count, "pad_to_multiple_of": pad_to_multiple_of}
        for name, value in given.items():
            if value is not None and not (isinstance(value, int | np.integer) and 0 < value < 2**31):
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        rows = -(-count // multiple) * multiple
        if rows != self.config.vocab_size:
            std = None if mean_resizing else self.config.initializer_range
            rng, weights = np.random.default_rng(seed), self.weights
            embed_tokens = resize_table(weights.embed_tokens, rows, std, rng)
            head = None if weights.lm_head is None else resize_table(weights.lm_head, rows, std, rng)
            self.weights = replace(weights, embed_tokens=embed_tokens, lm_head=head)
            self.config.vocab_size = rows
        return self.get_input_embeddings()

    def tie_weights(self) -> None:
        """Do nothing, because a tied head is always the embedding."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error: refgemma uploads nothing.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError("push_to_hub is not supported; use save_pretrained(folder), then: hf upload REPOSITORY FOLDER")
