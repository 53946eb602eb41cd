"""Find which law detects which bug, without recordings: check every law on refgemma with each known bug.

    python tests/law_power.py                  check every law on every bug; write law_power.json and the tables
                                               of docs/property-tests.md
    python tests/law_power.py --only NAME ...  do the same for some bugs
    python tests/law_power.py --laws LAW ...   do the same for some laws
    python tests/law_power.py --tables         write only the tables

Bugs come from three places: the oracle's catalogue (`refgemma.oracle.known_bugs`, computed operation by operation),
``test_mistakes.py`` (in refgemma's own code), and this file, for laws on behaviour that the others cannot change.
``test_law_power.py`` checks for each law that it still finds the first bug in its row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from test_mistakes import MISTAKES

import refgemma.layers
import refgemma.model
import refgemma.ops
from refgemma.cache import keep_last
from refgemma.goldens import verify as oracle
from refgemma.hub import find_model
from refgemma.oracle.known_bugs import KNOWN_BUGS, Change, cut_off, edit_model, softmax_over_all
from refgemma.oracle.operations import Context, operations
from refgemma.oracle.tolerance import Arithmetic
from refgemma.precision import as_dtype, bf16, narrow, wide
from refgemma.testing.backends import Capabilities, NumpyBackend, Output
from refgemma.testing.laws import LawBroken, NotApplicable, Search
from refgemma.testing.properties import LAWS
from refgemma.trace.candidate import Call
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Weights

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "tests" / "law_power.json"
PAGE = ROOT / "docs" / "property-tests.md"
# Always the same examples; the first that breaks the law is enough, however large.
QUICK = settings(max_examples=10, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                 suppress_health_check=list(HealthCheck))  # fmt: skip


# --- the catalogue ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """The inputs of a text's earlier calls: the cache of a backend that computes everything again."""

    ids: Any
    positions: Any
    calls: tuple[int, ...]


class Catalogued:
    """The oracle's table of operations, with one of the catalogue's edits."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def capabilities(self) -> Capabilities:
        return NumpyBackend().capabilities()

    def load(self, folder: Path, dtype: str) -> Any:
        return NumpyBackend().load(folder, dtype)

    def forward(
        self, model: Any, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
        tensors: Sequence[str] = ("logits",),
    ) -> Output:  # fmt: skip
        batch, seq = input_ids.shape
        before = cache or Read(input_ids[:, :0], np.zeros((batch, 0), np.int64), ())
        done = before.ids.shape[1]
        places = np.arange(done, done + seq)[None] if position_ids is None else position_ids
        ids = np.concatenate([before.ids, input_ids], axis=1)
        positions = np.concatenate([before.positions, np.broadcast_to(places, (batch, seq))], axis=1)
        visible = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask, bool)
        call = Call(ids, positions, visible, (*before.calls, seq))
        context = Context(model.config, model.weights, call, Arithmetic(model.dtype), exact=False)
        values: dict[str, Any] = {}
        for name, operation in operations(self.change(context)).items():
            values[name] = operation.compute(*(values[source] for source in operation.inputs))
        can = self.capabilities()  # log probabilities of a server are no part of a run
        wanted = [name for name in values if can.shows(name) and any(fnmatchcase(name, other) for other in tensors)]
        shown = {name: values[name][..., -seq:, :] for name in wanted}
        return Output(shown, Read(ids, positions, call.calls))

    def operations(self) -> Mapping[str, Callable[..., Any]]:
        checkpoint = open_checkpoint(find_model("conformance"))
        functions = edit_model(self.change, checkpoint.config, checkpoint.resident("float32"))[2]
        return {name: functions.get(name, op) for name, op in NumpyBackend().operations().items()}


# --- made in refgemma's own code --------------------------------------------------------------------------------------


class Patched(NumpyBackend):
    """refgemma with a bug of `test_mistakes`, which edits functions or the model that `verify` loads."""

    def load(self, folder: Path, dtype: str) -> Any:
        model = super().load(folder, dtype)
        config, weights = oracle.model_of(model)  # type: ignore[arg-type]
        return replace(model, config=config, weights=weights)


def as_loaded(model: Any) -> tuple[Any, Weights]:
    """Replace the function that loads a recording's model, because the model is loaded already."""
    return model.config, model.weights


# --- of this file -----------------------------------------------------------------------------------------------------


class Forgetful(NumpyBackend):
    """refgemma with a `forward` whose inputs and outputs can be changed."""

    def before(self, model: Any, given: dict[str, Any]) -> None: ...

    def after(self, output: Output, given: dict[str, Any]) -> Output:
        return output

    def forward(
        self, model: Any, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, cache: Any = None,
        tensors: Sequence[str] = ("logits",),
    ) -> Output:  # fmt: skip
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "cache": cache,
                 "tensors": tensors}  # fmt: skip
        self.before(model, given)
        return self.after(super().forward(model, **given), given)


class ChangesItsCache(Forgetful):
    """Keys are overwritten in place, so that a cache can be continued only once."""

    def after(self, output: Output, given: dict[str, Any]) -> Output:
        for layer in given["cache"] or ():
            layer.keys[...] = 0
        return output


class Noisy(Forgetful):
    """Sums have another order in each call, so that the last bit of a logit is random."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def after(self, output: Output, given: dict[str, Any]) -> Output:
        logits = output.logits
        step = np.spacing(np.abs(np.asarray(logits))) * self.rng.integers(0, 2, logits.shape)
        return replace(output, tensors=dict(output.tensors) | {"logits": logits + as_dtype(step, "float64")})


class Single(NumpyBackend):
    """Computes in float32, whatever precision is requested."""

    def load(self, folder: Path, dtype: str) -> Any:
        return super().load(folder, "float32")


class MasksTurned(Forgetful):
    """The padding mask is reversed."""

    def before(self, model: Any, given: dict[str, Any]) -> None:
        if given["attention_mask"] is not None:
            given["attention_mask"] = np.where(
                given["attention_mask"][:, ::-1].all(axis=0), 1, given["attention_mask"][:, ::-1]
            )


class FirstRowOnly(Forgetful):
    """Every row of a batch also gets the first row's last token, by a stride of 0."""

    def after(self, output: Output, given: dict[str, Any]) -> Output:
        logits = output.logits + 0
        logits[1:] = (logits[1:] + logits[:1]) / 2
        return replace(output, tensors=dict(output.tensors) | {"logits": logits})


class PadHasNoEmbedding(NumpyBackend):
    """``padding_idx=0``: the embedding of token 0 is 0."""

    def load(self, folder: Path, dtype: str) -> Any:
        model = super().load(folder, dtype)
        table = model.weights.embed_tokens[:] + 0
        table[0] = 0
        return replace(model, weights=replace(model.weights, embed_tokens=table))


class CapsByClipping(Forgetful):
    """Logits are clipped at their cap plus 1, not capped smoothly."""

    def load(self, folder: Path, dtype: str) -> Any:
        model = super().load(folder, dtype)
        return replace(
            model, config=model.config.changed(final_logit_softcapping=None)
        ), model.config.final_logit_softcapping

    def forward(self, model: Any, *given: Any, **named: Any) -> Output:
        output = super().forward(model[0], *given, **named)
        cap = model[1]
        logits = output.logits if cap is None else np.clip(output.logits, -cap - 1, cap + 1)
        return replace(output, tensors=dict(output.tensors) | {"logits": logits})


class Draws(NumpyBackend):
    """Draws at temperature 1.3."""

    def sample(self, model: Any, input_ids: Any, count: int, seed: int) -> Any:
        logits = np.asarray(self.forward(model, input_ids).logits, np.float64)[0, -1] / 1.3
        odds = np.exp(logits - logits.max())
        return np.random.default_rng(seed).choice(len(odds), count, p=odds / odds.sum())


class GreedySearch(NumpyBackend):
    """Searches with one beam, however many are requested."""

    def search(self, model: Any, input_ids: Any, num_beams: int, new_tokens: int) -> Any:
        text, score = list(input_ids[0]), 0.0
        for _ in range(new_tokens):
            logits = np.asarray(self.forward(model, np.array([text])).logits, np.float64)[0, -1]
            told = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            text.append(int(told.argmax()))
            score += float(told.max())
        return np.array(text), score


class LossOfTheSameToken(NumpyBackend):
    """The loss compares logits with the token at the same place, not the next."""

    def loss(self, model: Any, input_ids: Any, labels: Any) -> float:
        moved = np.concatenate([np.full_like(labels[:, :1], -100), labels[:, :-1]], axis=1)
        return super().loss(model, input_ids, moved)


class LossCountsAll(NumpyBackend):
    """The sum of losses is divided by the number of all tokens, including ignored ones."""

    def loss(self, model: Any, input_ids: Any, labels: Any) -> float:
        taken = (np.asarray(labels)[:, 1:] != -100).mean()
        return super().loss(model, input_ids, labels) * float(taken)


class LearnsBy(NumpyBackend):
    """Gradients are computed in another way; `change` gets the backend's own function and its arguments."""

    def __init__(self, change: Callable[..., Any]) -> None:
        self.change = change

    def gradients(self, *given: Any) -> Any:
        return self.change(super().gradients, *given)


def learns_mean_of_rows(learn: Any, model: Any, ids: Any, labels: Any, mask: Any, items: float) -> Any:
    counts = np.maximum((labels[:, 1:] != -100).sum(1), 1)
    shares = [len(ids) * count * items / counts.sum() for count in counts]
    rows = [learn(model, ids[[r]], labels[[r]], mask if mask is None else mask[[r]], shares[r])
            for r in range(len(ids))]  # fmt: skip
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def learns_without_items(learn: Any, model: Any, ids: Any, labels: Any, mask: Any, items: float) -> Any:
    return learn(model, ids, labels, mask, float((labels[:, 1:] != -100).sum()))


def learns_later_labels(learn: Any, model: Any, ids: Any, labels: Any, mask: Any, items: float) -> Any:
    """The token after the last label is a label, too."""
    labels = labels.copy()
    for row in labels:
        last = int(np.flatnonzero(row != -100)[-1]) if (row != -100).any() else len(row) - 1
        if last + 1 < len(row):
            row[last + 1] = 1
    return learn(model, ids, labels, mask, items)


def learns_as_head_only(learn: Any, model: Any, ids: Any, labels: Any, mask: Any, items: float) -> Any:
    found, tied = dict(learn(model, ids, labels, mask, items)), model.weights.lm_head is None
    table = "model.embed_tokens.weight"
    untied = replace(model, weights=replace(model.weights, lm_head=model.weights.embed_tokens),
                     config=model.config.changed(tie_word_embeddings=False))  # fmt: skip
    return found | ({table: learn(untied, ids, labels, mask, items)["lm_head.weight"]} if tied else {})


def learns_from_padding(learn: Any, model: Any, ids: Any, labels: Any, mask: Any, items: float) -> Any:
    """Padding tokens are labels."""
    return learn(model, ids, labels if mask is None else np.where(mask == 0, ids, labels), mask, items)


def learns_halved_norms(learn: Any, *given: Any) -> Any:
    return {name: x / 2 if name.endswith("norm.weight") else x for name, x in learn(*given).items()}


class SavesInHalf(NumpyBackend):
    """Weights are saved in bfloat16, whatever their precision."""

    def load(self, folder: Path, dtype: str) -> Any:
        model = super().load(folder, dtype)
        if not (Path(folder) / "saved").exists():
            return model
        half = [as_dtype(np.asarray(model.weights.norm) * (1 + 2.0**-6), dtype)]
        return replace(model, weights=replace(model.weights, norm=half[0]))

    def save(self, model: Any, folder: Path) -> None:
        super().save(model, folder)
        (Path(folder) / "saved").touch()


def with_tokenizer(changed: Callable[[str, Any], Any]) -> Callable[[], Any]:
    """Return refgemma with a tokenizer whose results are changed; `changed` takes a method's name and its result."""

    class Retokenized(NumpyBackend):
        def tokenizer(self, folder: Path) -> Any:
            usual = super().tokenizer(folder)

            class Changed:
                all_special_ids = usual.all_special_ids

                def __len__(self) -> int:
                    return len(usual)

                def encode(self, text: str, **named: Any) -> Any:
                    ids = usual.encode(text, **named)
                    return ids if named.get("add_special_tokens") is False else changed("encode", ids)

                def decode(self, ids: Any) -> str:
                    return str(usual.decode(ids))

                def apply_chat_template(self, messages: Any, **named: Any) -> Any:
                    told = usual.apply_chat_template(messages, **named)
                    return changed("chat" if isinstance(told, str) else "ids", told)

            return Changed()

    return Retokenized


def no_bos(method: str, told: Any) -> Any:
    return told[1:] if method == "encode" else told


def two_bos(method: str, told: Any) -> Any:
    return told[:1] + told if method in ("encode", "ids") else told


def assistant(method: str, told: Any) -> Any:
    return told.replace("<start_of_turn>model", "<start_of_turn>assistant") if method == "chat" else told


def with_weights(changed: Callable[[Weights], Weights]) -> Callable[[], Any]:
    """Return refgemma that changes the weights after reading them."""

    class Misread(NumpyBackend):
        def load(self, folder: Path, dtype: str) -> Any:
            model = super().load(folder, dtype)
            return replace(model, weights=changed(model.weights))

    return Misread


MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def each_layer(*names: str, as_: Callable[[Any], Any]) -> Callable[[Weights], Weights]:
    def changed(weights: Weights) -> Weights:
        layers = [replace(x, **{name: as_(getattr(x, name)) for name in names}) for x in weights.layers]
        return replace(weights, layers=layers)

    return changed


def norms_off_by(offset: int) -> Callable[[Weights], Weights]:
    def changed(weights: Weights) -> Weights:
        return replace(each_layer(*NORMS, as_=lambda x: x + offset)(weights), norm=weights.norm + offset)

    return changed


def norms_exchanged(weights: Weights) -> Weights:
    return replace(weights, layers=[
        replace(x, post_attention_layernorm=x.pre_feedforward_layernorm,
                pre_feedforward_layernorm=x.post_attention_layernorm) for x in weights.layers
    ])  # fmt: skip


def another_head(weights: Weights) -> Weights:
    return replace(weights, lm_head=weights.head[:][::-1])


class PaddedVocabulary(Forgetful):
    """Logits have three more columns than the vocabulary."""

    def after(self, output: Output, given: dict[str, Any]) -> Output:
        wider = np.concatenate([output.logits, 0 * output.logits[..., :3]], axis=-1)
        return replace(output, tensors=dict(output.tensors) | {"logits": wider})


class PaddingIsNaN(Forgetful):
    """Rows of padding are NaN, and so is a text with padding on its left."""

    def after(self, output: Output, given: dict[str, Any]) -> Output:
        if given["attention_mask"] is None:
            return output
        padded = (given["attention_mask"][:, 0] == 0)[:, None, None]
        logits = output.logits + as_dtype(np.where(padded, np.nan, 0.0), "float32")
        return replace(output, tensors=dict(output.tensors) | {"logits": logits})


# Mistakes of the catalogue that lie before the operations or after them. Not here: `weights-transposed`, since a matrix
# with its axes exchanged fits no model of the strategies, and `fp16-overflow`, which float16 does in PyTorch too.
STAGES: dict[str, Callable[[], Any]] = {
    "missing-bos": with_tokenizer(no_bos),
    "double-bos": with_tokenizer(two_bos),
    "template-mismatch": with_tokenizer(assistant),
    "weights-reshaped": with_weights(each_layer(*MATRICES, as_=lambda x: x.reshape(x.shape[::-1]).T)),
    "weights-one-plus": with_weights(norms_off_by(1)),
    "weights-minus-one": with_weights(norms_off_by(-1)),
    "weights-rounded": with_weights(each_layer(*MATRICES, *NORMS, as_=lambda x: narrow(bf16(wide(x)), like=x))),
    "weights-of-another": with_weights(norms_exchanged),
    "head-untied": with_weights(another_head),
    "vocab-padded": PaddedVocabulary,
    "left-pad-nan": PaddingIsNaN,
}


class Strips(NumpyBackend):
    """A tokenizer that strips spaces from texts and ignores roles."""

    def tokenizer(self, folder: Path) -> Any:
        usual = super().tokenizer(folder)

        class Stripping:
            all_special_ids = usual.all_special_ids

            def __len__(self) -> int:
                return len(usual)

            def encode(self, text: str, **named: Any) -> Any:
                return usual.encode(text.strip(), **named)

            def decode(self, ids: Any) -> str:
                return str(usual.decode(ids))

            def apply_chat_template(self, messages: Any, **named: Any) -> str:
                return str(usual.apply_chat_template(messages, **named))

        return Stripping()


def with_operation(name: str, wrong: Callable[..., Any]) -> Callable[[], Any]:
    """Return refgemma with one of its single operations replaced."""

    class Exchanged(NumpyBackend):
        def operations(self) -> Mapping[str, Callable[..., Any]]:
            return dict(super().operations()) | {name: wrong}

    return Exchanged


def without_bias(x: Any, weight: Any, bias: Any = None) -> Any:
    return refgemma.ops.linear(x, weight)


def window_of_one_more(q: Any, k: Any, window: int) -> Any:
    return refgemma.ops.sliding_mask(q, k, window + 1)


def gelu_that_saturates(x: Any) -> Any:
    return np.minimum(refgemma.ops.gelu_tanh(x), 8)


def cut_off_beyond(x: Any, cap: float | None) -> Any:
    return cut_off(x, None if cap is None else 2 * cap)


def unscaled_scores(q: Any, k: Any, scale: float) -> Any:
    return refgemma.ops.attention_scores(q, k, 1.0)


def keeps_the_window_only(layer: int, record: Any, config: Any) -> Any:
    return keep_last(record.attention.present, config.sliding_window - 1)


OWN: dict[str, Callable[[], Any]] = {
    "a call changes the cache that it continues": ChangesItsCache,
    "the last bit of a logit is random": Noisy,
    "always float32": Single,
    "the padding mask is inverted": MasksTurned,
    "rows of a batch are mixed": FirstRowOnly,
    "token 0 has no embedding": PadHasNoEmbedding,
    "logits are clipped, beyond their cap": CapsByClipping,
    "draws at temperature 1.3": Draws,
    "search with one beam": GreedySearch,
    "loss of the token that was read": LossOfTheSameToken,
    "loss divided by all tokens": LossCountsAll,
    "gradients: each row is averaged": lambda: LearnsBy(learns_mean_of_rows),
    "gradients: the number of items is ignored": lambda: LearnsBy(learns_without_items),
    "gradients: one more label": lambda: LearnsBy(learns_later_labels),
    "gradients: a tied table learns as head only": lambda: LearnsBy(learns_as_head_only),
    "gradients: padding is a label": lambda: LearnsBy(learns_from_padding),
    "gradients: those of norms are halved": lambda: LearnsBy(learns_halved_norms),
    "saved weights are rounded": SavesInHalf,
    "texts are stripped": Strips,
    "operation: linear without its bias": with_operation("linear", without_bias),
    "operation: window one too wide": with_operation("sliding_mask", window_of_one_more),
    "operation: softmax without its mask": with_operation("softmax", softmax_over_all),
    "operation: gelu saturates at 8": with_operation("gelu_tanh", gelu_that_saturates),
    "operation: cap clips at twice the cap": with_operation("soft_cap", cut_off_beyond),
    "operation: scores are not scaled": with_operation("attention_scores", unscaled_scores),
}


# --- asking -----------------------------------------------------------------------------------------------------------


@contextmanager
def mistaken(name: str) -> Iterator[Any]:
    """Yield a backend with a bug, which is removed at the end of the context."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("test_mistakes.CORRECT_MODEL_OF", as_loaded)
        monkeypatch.setattr(oracle, "model_of", as_loaded)
        if name in STAGES | OWN:
            yield (STAGES | OWN)[name]()
        elif name in CATALOGUE or name == NONE:
            yield Catalogued(CATALOGUE.get(name, lambda context: context))
        else:
            HERE[name](monkeypatch)
            yield Patched()


def _positions_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = refgemma.model.rotary_tables
    monkeypatch.setattr(refgemma.model, "rotary_tables", lambda p, *rest, **named: correct(p - p.min(), *rest, **named))


# Of `test_mistakes`, those that the catalogue does not have under another name.
NOT_IN_CATALOGUE = (
    "another final cap", "frequencies by a float32 exponential", "angles in float64", "scores lose digits",
    "norm loses digits", "no bias of q", "no bias of k", "no bias of v", "no bias of o",
    "an untied head taken for tied", "head without the table's order",
)  # fmt: skip
CATALOGUE: dict[str, Change] = {v.name: v.change for v in KNOWN_BUGS if v.change is not None}
HERE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{f"here: {mistake.name}": mistake.make for mistake in MISTAKES if mistake.name in NOT_IN_CATALOGUE},
    "here: a full layer keeps the window only": lambda m: m.setattr(refgemma.model, "next_past", keeps_the_window_only),
    "here: positions begin again in each call": _positions_restart,
}
ALL = [*CATALOGUE, *STAGES, *HERE, *OWN]
NONE = "no mistake"  # the catalogue's way of computing, unedited: what the others are compared with

# What no law can find, and why.
WHY_NOT = {
    "rope-positions-skip-pads": "a shift of all positions changes no logit; only a recording can tell",
    **dict.fromkeys(
        ("here: frequencies by a float32 exponential", "here: angles in float64"),
        "PyTorch chose between two neighbouring float32 angles; only a recording can tell",
    ),
}


def finds(law: str, backend: Any) -> bool:
    """Return True if a backend breaks a law in the examples of `QUICK`."""
    try:
        with np.errstate(all="ignore"):
            Search(LAWS[law], backend).run(QUICK)
    except NotApplicable:
        return False
    except LawBroken:
        return True
    return False


def laws_for(backend: Any) -> list[str]:
    """Return the laws that apply to a backend."""
    from refgemma.testing.laws import find_missing

    return [name for name, law in LAWS.items() if not find_missing(backend, law.needs)]


def asked(name: str, laws: Collection[str] = LAWS) -> list[str]:
    """Return the laws that find a bug."""
    with mistaken(name) as backend:
        return [law for law in laws_for(backend) if law in laws and finds(law, backend)]


# --- tables -----------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- python tests/law_power.py -->", "<!-- end of law_power -->"
LISTED = 4


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(f"`{name}`" for name in names[:LISTED]) + more


def read_found() -> dict[str, list[str]]:
    """Return the recorded result: the laws that find each bug."""
    found: dict[str, list[str]] = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    return found


def problems(found: Mapping[str, Sequence[str]]) -> list[str]:
    """List problems of the tables: a bug that no law finds without an explanation, or an unneeded explanation."""
    silent = [f"{n}: no law finds it, and no reason is given" for n in found if not found[n] and n not in WHY_NOT]
    stale = [f"{name}: a reason is given, and {found[name][0]} finds it" for name in WHY_NOT if found.get(name)]
    return silent + stale


def still_open(found: Mapping[str, Sequence[str]]) -> str:
    """Return a sentence on what was not checked."""
    blind = [law for law in LAWS if not any(law in laws for laws in found.values())]
    return (
        f"Results for {len(found)} of {len(ALL)} mistakes. Laws that find none: "
        f"{', '.join(f'`{law}`' for law in blind) or 'none'}."
    )


def tables(found: Mapping[str, Sequence[str]]) -> str:
    """Return both tables as Markdown."""
    by_law = {law: [name for name in found if law in found[name]] for law in LAWS}
    lines = [still_open(found), "", "| law | mistakes it finds | such as |", "| --- | --- | --- |"]
    lines += [f"| `{law}` | {len(names)} | {_some(names)} |" for law, names in by_law.items()]
    lines += ["", "| mistake | laws that find it | which |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {len(laws)} | {_some(laws) if laws else f'none: {WHY_NOT.get(name)}'} |"
        for name, laws in found.items()
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some mistakes; the answers to others stay")
    parser.add_argument("--laws", nargs="+", metavar="LAW", help="some laws; the answers of others stay")
    parser.add_argument("--tables", action="store_true", help="ask nothing, write the tables")
    args = parser.parse_args()
    for name in [] if args.tables else args.only or ALL:
        laws = asked(name, args.laws or LAWS)
        print(f"{name}: {', '.join(laws) or '-'}", flush=True)
        kept = read_found()
        others = [law for law in kept.get(name, []) if args.laws and law not in args.laws]
        kept[name] = [law for law in LAWS if law in (*laws, *others)]
        FOUND.write_text(json.dumps({n: kept[n] for n in ALL if n in kept}, indent=1) + "\n", "utf-8")
    found = read_found()
    page = PAGE.read_text("utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{rest.split(END)[1]}", "utf-8")
    print("\n".join(problems(found)))
    return bool(problems(found))


if __name__ == "__main__":
    sys.exit(main())
