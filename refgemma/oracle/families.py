"""Try families of known bugs if no bug of the catalogue explains a finding.

One family exchanges weights, the other computes a part in half precision, each in every place. Checked by introducing
some members of each into transformers (``golden/mistakes.py``).

Each member needs its own computation, so a check of a correct trace does not test for families.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any

from refgemma.oracle.known_bugs import MIXED, NORMS, Change, KnownBug, Table, in_float32, rewire, round_operands
from refgemma.oracle.operations import Context, Operation
from refgemma.precision import Array, as_dtype, as_float64
from refgemma.trace.names import LAYER_FIELDS, field_of, layer_of
from refgemma.weights.parameters import LayerWeights, layer_tensors

HALVES = {"bf16": "bfloat16", "f16": "float16"}

# --- a part in half precision -----------------------------------------------------------------------------------------

FEED_FORWARD = tuple(field for field in LAYER_FIELDS if field.startswith("feed_forward"))
PROJECTIONS = ("attention.q", "attention.k", "attention.v")
ATTENTION = (*MIXED, "attention.capped", "attention.probs")
WITH_WEIGHTS = (*PROJECTIONS, *NORMS, "attention.out", "embedded", "raw_logits", *(
    f"feed_forward.{name}" for name in ("gate", "up", "out")))  # fmt: skip
# The largest part comes first; the first part that explains all tensors it affects is reported.
PARTS: Mapping[str, tuple[str, ...]] = {
    "layers": LAYER_FIELDS, "feed-forward": FEED_FORWARD, "attention": ATTENTION, "norms": NORMS,
    "projections": PROJECTIONS, "softmax": ("attention.probs",),
} | {field: (field,) for field in ("embedded", *LAYER_FIELDS, "norm", "raw_logits")}  # fmt: skip

# Tensors that show a cache in half precision, which are stored keys and values, or a kernel of attention that takes and
# returns half precision.
ROUND_TO: Mapping[str, tuple[str, ...]] = {
    "keys-and-values-kept": ("attention.k_rot", "attention.v"), "keys-kept": ("attention.k_rot",),
    "values-kept": ("attention.v",),
    "inputs-and-result-of-attention": ("attention.q_rot", "attention.k_rot", "attention.v", "attention.mixed"),
}  # fmt: skip

SEEN_IN_HALF = {
    "attention": "transformers #26451", "softmax": "optimum-habana #396",
    "inputs-and-result-of-attention": "mistral.rs 0.9.5 on CPUs (float16)",
}  # fmt: skip


def _compute_in(op: Operation, storage: str, *inputs: Array) -> Array:
    """Compute an operation as an engine in half precision would; a product with weights is rounded once."""
    halves = [as_dtype(x, storage) for x in inputs]
    if field_of(op.name) in WITH_WEIGHTS:
        return as_float64(as_dtype(op.compute(*map(as_float64, halves)), storage))
    return as_float64(op.compute(*halves))


def compute_in(storage: str, fields: Sequence[str], layers: Sequence[int] = ()) -> Change:
    """Return an edit that computes some fields in half precision, in the given layers or in all."""

    def edit(table: Table, context: Context) -> Iterator[Operation]:
        for name, op in table.items():
            if field_of(name) in fields and (not layers or layer_of(name) in layers):
                yield replace(op, compute=partial(_compute_in, op, storage))

    return in_float32(rewire(edit))


def store_in(storage: str, fields: Sequence[str], layers: Sequence[int] = ()) -> Change:
    """Return an edit that rounds the results of some fields to half precision, in the given layers or in all."""

    def edit(table: Table, context: Context) -> Iterator[Operation]:
        for name, op in table.items():
            if field_of(name) in fields and (not layers or layer_of(name) in layers):
                yield replace(op, compute=lambda *x, op=op: as_float64(as_dtype(op.compute(*x), storage)))

    return in_float32(rewire(edit))


def parts_in_half(layers: Sequence[int] = ()) -> Iterator[KnownBug]:
    """Yield a bug for each part and each half precision, in the given layers or in all."""
    where = f" of layers {', '.join(map(str, layers))}" if layers else ""
    for short, storage in HALVES.items():
        for part, fields in PARTS.items():
            says = f"{part}{where}: computed in {storage}; all else is float32"
            yield KnownBug(
                f"{part}-in-{short}{where}", says, fields, compute_in(storage, fields, layers),
                SEEN_IN_HALF.get(part, "unverified"), "float32", f"dtype of {part}", "rounding",
            )  # fmt: skip
        for stored, kept in ROUND_TO.items():
            says = f"{stored.replace('-', ' ')} in {storage}{where}; all else is float32"
            yield KnownBug(
                f"{stored}-in-{short}{where}", says, kept, store_in(storage, kept, layers),
                SEEN_IN_HALF.get(stored, "llama.cpp's default (float16)"), "float32", "dtype of the cache", "rounding",
            )  # fmt: skip
        for operand, word in (("keys", "scores"), ("values", "mixed")):
            yield KnownBug(
                f"{operand}-in-{short}", f"{operand} are rounded to {storage}", (f"attention.{word}",),
                round_operands(storage, **{word: 1}), "gemma.cpp 343482c", "float32", "dtype of the cache", "rounding",
            )  # fmt: skip


# --- a weight in another's place --------------------------------------------------------------------------------------

Place = tuple[int | None, str]  # a layer and a field of `LayerWeights`; no layer for the last norm
FIELD_OF_WEIGHT = {
    "q_proj": "attention.q", "k_proj": "attention.k", "v_proj": "attention.v", "o_proj": "attention.out",
    "gate_proj": "feed_forward.gate", "up_proj": "feed_forward.up", "down_proj": "feed_forward.out", "norm": "norm",
} | {name: name for name in layer_tensors(0) if name.endswith("norm")}  # fmt: skip
WEIGHT_OF_FIELD = {field: name for name, field in FIELD_OF_WEIGHT.items()}
SEEN = "NeMo #11951, Megatron-Bridge #4200 (norms)"


def read_weight(context: Context, place: Place) -> Array:
    """Return the weight at a place."""
    layer, name = place
    found: Array = context.weights.norm if layer is None else getattr(context.weights.layers[layer], name)
    return found


class Exchanged(Sequence[LayerWeights]):
    """Layers with exchanged weights."""

    def __init__(self, context: Context, sources: Mapping[Place, Place]) -> None:
        self.context, self.sources = context, sources

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.context.weights.layers)

    def __getitem__(self, layer: Any) -> Any:
        """Return block `layer`."""
        own = self.context.weights.layers[layer]
        others = {to[1]: read_weight(self.context, at) for to, at in self.sources.items() if to[0] == layer}
        return replace(own, **others)


def name_place(place: Place) -> str:
    """Return a weight's name in a checkpoint, without the common prefix and suffix.

    Examples
    --------
    >>> name_place((3, "q_proj")), name_place((None, "norm"))
    ('layers.3.self_attn.q_proj', 'norm')
    """
    layer, name = place
    whole = "model.norm.weight" if layer is None else layer_tensors(layer)[name]
    return whole.removeprefix("model.").removesuffix(".weight")


@dataclass(frozen=True)
class Misplaced(KnownBug):
    """A known bug that uses weights at wrong places."""

    sources: Mapping[Place, Place] = field(default_factory=dict)  # place -> place from which its weight comes


def _describe_part(sources: Mapping[Place, Place]) -> str:
    names = {(to[1], at[1]) for to, at in sources.items()}
    if len(sources) > 1 and len(names) == 1 and all(to[0] == at[0] for to, at in sources.items()):
        [(name, other)] = names
        return f"{other} instead of {name} in layers {', '.join(str(layer) for layer, _ in sources)}"
    return ", ".join(f"{name_place(at)} instead of {name_place(to)}" for to, at in sources.items())


def weights_of_another(sources: Mapping[Place, Place], says: str = "") -> Misplaced:
    """Return a bug with weights at wrong places; `sources` gives the origin of each place's weight."""
    says = says or _describe_part(sources)

    def change(context: Context) -> Context:
        norm = read_weight(context, sources.get((None, "norm"), (None, "norm")))
        return replace(context, weights=replace(context.weights, layers=Exchanged(context, sources), norm=norm))

    fields = tuple(dict.fromkeys(FIELD_OF_WEIGHT[name] for _, name in sources))
    name = f"weights-of-another: {says}"
    return Misplaced(name, says, fields, change, SEEN, knob="names of weights", sources=sources)


def list_places(context: Context) -> dict[Place, tuple[int, ...]]:
    """Return the shape of each weight that can be at a wrong place, by place."""
    places: dict[Place, tuple[int, ...]] = {(None, "norm"): context.weights.norm.shape}
    for layer, weights in enumerate(context.weights.layers):
        places |= {(layer, name): getattr(weights, name).shape for name in layer_tensors(layer)}
    return places


def exchanges_in_all(context: Context) -> Iterator[Misplaced]:
    """Yield bugs of a wrong table of names in all layers: a wrong weight, two exchanged, or layers shifted."""
    shapes, layers = list_places(context), range(len(context.weights.layers))
    names = list(layer_tensors(0))

    def everywhere(sources: Mapping[str, str], step: int = 0) -> dict[Place, Place]:
        return {(n, to): ((n + step) % len(layers), at) for n in layers for to, at in sources.items()}

    for a, b in permutations(names, 2):
        if shapes[0, a] == shapes[0, b]:
            yield weights_of_another(everywhere({a: b}))
            if a < b:
                yield weights_of_another(everywhere({a: b, b: a}), f"{a} and {b} exchanged")
    for step, word in ((1, "after"), (-1, "before")):
        moved = everywhere({name: name for name in names}, step)
        yield weights_of_another(moved, f"each layer has the weights of the layer {word} it")


def exchanges_at(context: Context, place: Place) -> Iterator[Misplaced]:
    """Yield a bug for each other weight of the same shape at a place."""
    shapes = list_places(context)
    for other, shape in shapes.items():
        if other != place and shape == shapes[place]:
            yield weights_of_another({place: other})


def list_families(context: Context) -> Iterator[KnownBug]:
    """Yield every member of the families, except single layers in half precision."""
    yield from parts_in_half()
    yield from exchanges_in_all(context)
    for place in list_places(context):
        yield from exchanges_at(context, place)
