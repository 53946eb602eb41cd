"""Check gradients in other people's traces: correct ones conform, bugs are named, and bad files give errors.

`gradients-conformance.npz` was recorded from transformers 5.23.0 with torch 2.13.0 (eager, float32). It has the
gradients of the conformance checkpoint's weights, on two rows of 14 tokens; the second row is padded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.backward import compute_all_gradients, compute_gradients
from refgemma.cli.main import main
from refgemma.errors import RefgemmaError
from refgemma.modeling.pretrained import Pretrained
from refgemma.oracle import check
from refgemma.oracle.backward_operations import backward_operations
from refgemma.oracle.diagnose import Report, diagnose
from refgemma.oracle.engine import Engine
from refgemma.oracle.optimizer_bugs import OPTIMIZER_BUGS
from refgemma.oracle.training_bugs import TRAINING_BUGS
from refgemma.oracle.verdicts import BLIND, CONFORMS, DIFFERS, EXACT, PASS
from refgemma.trace.candidate import candidate_of
from refgemma.trace.gradient_names import named_gradients
from refgemma.trace.names import LAYER_FIELDS, named_tensors, save_trace
from refgemma.weights.parameters import layer_tensors, named_weights

RECORDED = Path(__file__).parents[1] / "recorded" / "gradients-conformance.npz"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return refgemma.load("conformance")


@pytest.fixture
def tensors() -> Tensors:
    return dict(np.load(RECORDED))


@pytest.fixture(scope="module")
def whole(model: Pretrained) -> Tensors:
    """Return our own run and its gradients, with all names."""
    given = {name: x for name, x in np.load(RECORDED).items() if not name.startswith("grads.")}
    run = refgemma.forward(given["input_ids"], model.weights, model.config, attention_mask=given["attention_mask"])
    _, grads = compute_all_gradients(
        given["input_ids"], given["labels"], model.weights, model.config, attention_mask=given["attention_mask"]
    )
    return given | dict(named_tensors(run)) | dict(named_gradients(grads))


def report(tensors: Tensors, model: Pretrained) -> Report:
    return diagnose(candidate_of(tensors, model.config, "float32"), model.weights, model.config)


def first(found: Report) -> tuple[str, str]:
    assert found.first_divergence is not None
    return found.first_divergence.tensor, found.findings[0].named


def save(tensors: Tensors, path: Path, **about: str) -> str:
    save_trace(tensors.items(), path / "port.safetensors", {"dtype": "float32"} | about)
    return str(path / "port.safetensors")


# --- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recorded_gradients_conform(tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight's gradient is judged, although no tensor between the tokens and the gradients is recorded."""
    assert main(["check", save(tensors, tmp_path), "--model", "conformance"]) == 0
    assert "\n46 PASS\n" in capsys.readouterr().out


def test_every_gradient_has_an_operation(whole: Tensors, model: Pretrained) -> None:
    engine = Engine(candidate_of(whole, model.config, "float32"), model.weights, model.config)
    table = {op.name for op in backward_operations(engine.context)}
    assert table == {name for name in whole if name.startswith("grads.")}
    verdicts = {i.tensor: i.judged.verdict for i in engine.instances}
    assert table <= verdicts.keys()
    assert set(verdicts.values()) <= {EXACT, PASS}
    assert BLIND not in verdicts.values()


def test_number_of_items_divides_the_losses(tensors: Tensors, model: Pretrained, tmp_path: Path) -> None:
    """The sum of losses is divided by a larger batch's number of labels, as for gradient accumulation."""
    counted = np.sum(tensors["labels"][:, 1:] != -100)
    for name in tensors:
        if name.startswith("grads."):
            tensors[name] = tensors[name] * np.float32(0.5)
    found = check(save(tensors, tmp_path, num_items_in_batch=str(2 * counted)), "conformance")
    assert found.verdict == CONFORMS
    found = check(save(tensors, tmp_path), "conformance")
    assert (found.verdict, found.findings[0].named) == (DIFFERS, "loss-divided-twice")


def test_the_row_of_padding_may_be_trained(tensors: Tensors, model: Pretrained) -> None:
    """PyTorch's embedding does not train this row; others do."""
    tensors["grads.model.embed_tokens.weight"][model.config.pad_token_id] += 1
    assert report(tensors, model).verdict == CONFORMS


def test_gradients_without_logits_are_inconclusive_if_some_are_missing(tensors: Tensors, model: Pretrained) -> None:
    del tensors["grads.model.layers.2.mlp.up_proj.weight"]
    assert report(tensors, model).verdict == "inconclusive"


# --- wrong ------------------------------------------------------------------------------------------------------------


GRADIENTS = [
    "grads.logits", "grads.raw_logits", "grads.norm", "grads.embedded", "grads.model.norm.weight",
    "grads.model.embed_tokens.weight",
    *(f"grads.layers.1.{field}" for field in LAYER_FIELDS),
    *(f"grads.{name}" for name in layer_tensors(1).values()),
]  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_small_error_in_a_gradient_is_found_there(name: str, whole: Tensors, model: Pretrained) -> None:
    """One tensor is wrong by a thousandth; the tensors before it are right."""
    candidate = candidate_of(whole | {name: whole[name] * np.float32(1.001)}, model.config, "float32")
    instances = Engine(candidate, model.weights, model.config).instances
    assert next(i.tensor for i in instances if i.judged.verdict not in (EXACT, PASS)) == name


def test_a_mean_of_means_is_named(tensors: Tensors, model: Pretrained) -> None:
    """The gradients of two micro-batches with 10 and 11 labels are computed row by row, then averaged."""
    rows = []
    for row in range(2):
        given = {name: tensors[name][row : row + 1] for name in ("input_ids", "labels", "attention_mask")}
        _, grads = compute_gradients(
            given["input_ids"], given["labels"], model.weights, model.config, attention_mask=given["attention_mask"]
        )
        rows.append(grads)
    wrong = {f"grads.{name}": (rows[0][name] + rows[1][name]) / 2 for name in rows[0]}
    assert first(report(tensors | wrong, model)) == ("grads.model.norm.weight", "loss-mean-of-means")


def test_unknown_mistakes_are_unknown(tensors: Tensors, model: Pretrained) -> None:
    name = "grads.model.layers.2.mlp.up_proj.weight"
    assert first(report(tensors | {name: np.roll(tensors[name], 1)}, model)) == (name, "UNKNOWN")


def test_a_source_of_an_optimizers_mistake_is_a_link_or_says_that_there_is_none() -> None:
    for bug in OPTIMIZER_BUGS:
        assert bug.seen.startswith(("https://", "no public report")), bug.name


def test_known_bugs_describes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(TRAINING_BUGS) >= 20
    for bug in TRAINING_BUGS:
        assert bug.seen.startswith(("https://", "no public report")), bug.name
        assert main(["known-bugs", bug.name]) == 0
        assert bug.says in capsys.readouterr().out
    assert sum(bug.seen.startswith("https://") for bug in TRAINING_BUGS) >= 19


# --- bad files --------------------------------------------------------------------------------------------------------


def changed(name: str, x: Any) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: y for n, y in (tensors | {name: x}).items() if y is not None}


def first_label(tensors: Tensors) -> Tensors:
    """Set a label that only padding precedes."""
    for name in ("input_ids", "labels", "attention_mask"):
        tensors[name] = np.roll(tensors[name], 3, axis=1)
    tensors["labels"][0] = -100
    return tensors


PACKED = np.arange(14)[None].repeat(2, 0) % 7
BAD = {
    "no labels": (changed("labels", None), "labels are missing"),
    "labels are numbers": (changed("labels", np.zeros((2, 14), np.float32)), "must be integers of shape (2, 14)"),
    "labels of another shape": (changed("labels", np.zeros((2, 3), np.int64)), "must be integers of shape (2, 14)"),
    "a label beyond the vocabulary": (changed("labels", np.full((2, 14), 97)), "labels[0, 0] is 97; it must be -100"),
    "a label after padding": (first_label, "is predicted from padding"),
    "packed": (
        lambda tensors: changed("attention_mask", None)(changed("position_ids", PACKED)(tensors)), "are packed texts"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_labels_that_do_not_fit(
    name: str, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = BAD[name]
    assert main(["check", save(change(tensors), tmp_path), "--model", "conformance"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("number", ["0", "-1", "nan", "many"])
def test_a_number_of_items_that_is_none(number: str, tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(RefgemmaError, match="num_items_in_batch in the metadata is"):
        check(save(tensors, tmp_path, num_items_in_batch=number), "conformance")


def test_a_gradient_of_another_shape_is_invalid(tensors: Tensors, model: Pretrained) -> None:
    name = "grads.model.layers.0.self_attn.q_proj.weight"
    found = report(changed(name, tensors[name].T)(tensors), model)
    assert found.first_divergence is not None
    assert found.first_divergence.tensor == name
    assert "must be" in found.first_divergence.judged.note


def test_a_gradient_that_is_nan_is_invalid(tensors: Tensors, model: Pretrained) -> None:
    name = "grads.model.norm.weight"
    tensors[name][3] = np.nan
    found = report(tensors, model)
    assert found.first_divergence is not None
    assert (found.first_divergence.tensor, found.first_divergence.judged.verdict) == (name, "INVALID")


@pytest.mark.slow
def test_every_format_of_the_report(tensors: Tensors, tmp_path: Path) -> None:
    """Test a wrong gradient, with a repro file."""
    name = "grads.model.layers.2.mlp.up_proj.weight"
    path = save(tensors | {name: 2 * tensors[name]}, tmp_path)
    files = [f"--{kind}={tmp_path / kind}" for kind in ("html", "markdown", "junit", "repro")]
    assert main(["check", path, "--model", "conformance", *files]) == 1
    for kind in ("html", "markdown", "junit"):
        assert name in (tmp_path / kind).read_text("utf-8")
    assert (tmp_path / "repro").stat().st_size < 1e6


def test_a_trace_without_gradients_is_judged_as_before(whole: Tensors, model: Pretrained) -> None:
    """Labels alone change nothing, and no bug of trainers is excluded or tested for."""
    forward = {name: x for name, x in whole.items() if not name.startswith("grads.")}
    found = report(forward, model)
    assert found.verdict == CONFORMS
    assert not {bug.name for bug in TRAINING_BUGS} & {bug.name for bug in (*found.excluded, *found.undetectable)}
    assert found.candidate.call.labels is None


# --- weights after a step ---------------------------------------------------------------------------------------------


STEP = {"optimizer": "sgd", "learning_rate": "0.5"}


@pytest.fixture
def stepped(tensors: Tensors, model: Pretrained) -> Tensors:
    """One step of SGD, by its formula: the rate is a power of 2, so one rounding is left."""
    weights = named_weights(model.weights, model.config)
    return tensors | {
        f"weights.after.{name}": rows[:] - np.float32(0.5) * tensors[f"grads.{name}"] for name, rows in weights.items()
    }


@pytest.mark.slow
def test_a_step_is_judged(stepped: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", save(stepped, tmp_path, **STEP), "--model", "conformance"]) == 0
    assert "\n92 PASS\n" in capsys.readouterr().out.replace("46 EXACT, 46 PASS", "92 PASS")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_small_error_in_a_weight_is_found_there(name: str, stepped: Tensors, tmp_path: Path) -> None:
    off = np.float32(1e-3) * stepped[f"grads.{name}"]
    found = check(save(stepped | {f"weights.after.{name}": stepped[f"weights.after.{name}"] + off}, tmp_path, **STEP),
                  "conformance")  # fmt: skip
    assert first(found) == (f"weights.after.{name}", "UNKNOWN")


@pytest.mark.slow
def test_weights_that_did_not_move_differ(stepped: Tensors, model: Pretrained, tmp_path: Path) -> None:
    still = {f"weights.after.{n}": rows[:] for n, rows in named_weights(model.weights, model.config).items()}
    assert check(save(stepped | still, tmp_path, **STEP), "conformance").verdict == DIFFERS


def test_a_weight_without_its_gradient_is_refused(stepped: Tensors, tmp_path: Path) -> None:
    del stepped["grads.model.norm.weight"]
    found = check(save(stepped, tmp_path, **STEP), "conformance")
    assert found.first_divergence is not None
    assert found.first_divergence.tensor == "weights.after.model.norm.weight"
    assert "cannot be judged without grads.model.norm.weight" in found.first_divergence.judged.note


NO_STEP = {
    "none": ({}, "optimizer in the metadata is ''; it must be adamw or sgd"),
    "another": ({"optimizer": "lion"}, "optimizer in the metadata is 'lion'; it must be adamw or sgd"),
    "no rate": ({"optimizer": "sgd"}, "no learning_rate in the metadata"),
    "a rate that is a word": (STEP | {"learning_rate": "fast"}, "learning_rate in the metadata is 'fast'"),
    "a negative rate": (STEP | {"learning_rate": "-1"}, "it must be a number of at least 0"),
    "step 0": (STEP | {"step": "0"}, "step in the metadata is '0'; it must be a whole number of at least 1"),
    "half a step": (STEP | {"step": "1.5"}, "must be a whole number"),
    "a beta of 1": (STEP | {"adam_beta1": "1"}, "it must be a number of at least 0 and below 1"),
    "nan": (STEP | {"weight_decay": "nan"}, "weight_decay in the metadata is 'nan'"),
    "momentum": (STEP | {"momentum": "0.9"}, "refgemma judges steps without it"),
}


@pytest.mark.parametrize("name", NO_STEP)
def test_numbers_of_a_step_that_do_not_fit(
    name: str, stepped: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, said = NO_STEP[name]
    assert main(["check", save(stepped, tmp_path, **about), "--model", "conformance"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1
