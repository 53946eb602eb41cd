"""Compare an engine's configuration of a released size with the release. The two presets have the names and numbers of
torchtune 0.6.1 and litgpt 0.5.13."""

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from refgemma.cli.main import main
from refgemma.config import Gemma2Config
from refgemma.oracle.config_check import (
    FIELD_NAMES,
    PresetError,
    check_preset,
    match_fields,
    numbers_for,
    read_layer_types,
)

CAPS_EXCHANGED = """
import torch_that_is_not_installed

def gemma2_9b(**more):
    return build(
        vocab_size=256_000, num_layers=42, num_heads=16, head_dim=256, num_kv_heads=8, embed_dim=3584,
        intermediate_dim=14336, max_seq_len=8192, norm_eps=1e-6, hidden_capping_value=30.0,
        final_capping_value=50.0, sliding_window_size=4096, dropout=more.get("dropout", 0.0),
    )
"""
WITH_DEFAULT_EPS = """
class Config:
    norm_eps = 1e-5
    rope_base = 10000

    def __init__(self, name):
        self.vocab_size, self.head_size, self.attention_scores_scalar = 256000, 256, 256
        self.n_embd, self.n_layer, self.n_head, self.n_query_groups = 3584, 42, 16, 8
        self.intermediate_size, self.sliding_window_size, self.gelu_approximate = 14336, 4096, "tanh"
        self.sliding_window_indices = [1 if i % 2 == 0 else 0 for i in range(42)]
        self.attention_logit_softcapping, self.final_logit_softcapping = 50.0, 30.0
"""
KERAS = {
    "vocabulary_size": 256000, "num_layers": 42, "num_query_heads": 16, "num_key_value_heads": 8, "hidden_dim": 3584,
    "intermediate_dim": 14336,
}  # fmt: skip
Kind = Enum("Kind", ["GLOBAL", "LOCAL_SLIDING"])
PENZAI = {  # of penzai 0.2.5
    "num_decoder_blocks": 42, "vocab_size": 256128, "num_kv_heads": 8, "query_head_multiplier": 2,
    "embedding_dim": 3584, "projection_dim": 256, "mlp_hidden_dim": 14336, "final_logit_softcap": 30.0,
    "attn_logits_soft_cap": 50.0,
}  # fmt: skip
FLAX = {"num_embed": 256128, "embed_dim": 3584, "hidden_dim": 14336, "num_kv_heads": 8}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "presets.py").write_text(CAPS_EXCHANGED)
    (folder / "config.py").write_text(WITH_DEFAULT_EPS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


CONFORMANCE = {
    "vocab_size": 97, "head_size": 10, "attention_scores_scalar": 13, "n_embd": 30, "n_layer": 4, "n_head": 6,
    "n_query_groups": 3, "intermediate_size": 44, "sliding_window_size": 8, "sliding_window_indices": [1, 0, 1, 0],
    "attention_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
}  # fmt: skip


def test_a_models_numbers_get_the_engines_names() -> None:
    namespace: dict[str, Any] = {}
    exec(WITH_DEFAULT_EPS, namespace)
    preset = vars(namespace["Config"]("gemma-2-9b"))
    assert numbers_for(preset) == CONFORMANCE  # litgpt's preset; its activation keeps litgpt's word


def test_penzais_names_are_known() -> None:
    conformance = [4, 97, 3, 30, 10, 44, 2.0, 3.0]
    names = [name for name in PENZAI if name != "query_head_multiplier"]  # the number of query heads of a key head
    assert numbers_for(PENZAI) == dict(zip(names, conformance, strict=True))


def test_the_words_for_layer_types_are_the_engines_own() -> None:
    @dataclass
    class Preset:
        attn_types: tuple[Kind, ...] = (Kind.LOCAL_SLIDING, Kind.GLOBAL) * 21
        hidden_dim: int = 14336
        embed_dim: int = 3584
        dropout: float = 0.0

    types = (Kind.LOCAL_SLIDING, Kind.GLOBAL) * 2
    assert numbers_for(Preset()) == {"embed_dim": 30, "hidden_dim": 44, "attn_types": types}


def test_the_parameters_of_a_function_get_the_numbers() -> None:
    def gemma2(num_layers: int, hidden_capping_value: float = 50.0, attn_types: Any = None, dropout: float = 0.0): ...

    assert numbers_for(gemma2) == {"num_layers": 4, "hidden_capping_value": 3.0}
    assert numbers_for(gemma2, "tiny") == {"num_layers": 6, "hidden_capping_value": 50.0}


def test_exchanged_caps_are_named_without_running_the_engine(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "engine/presets.py:gemma2_9b"]) == 1
    said = capsys.readouterr().out
    assert "differs: 11 numbers compared with google/gemma-2-9b" in said
    assert "attn_logit_softcapping (hidden_capping_value) is 30.0; the release has 50.0" in said
    assert "known bug softcaps-exchanged" in said
    assert "attn-softcap-final-cap" not in said
    assert "not given by the engine: query_pre_attn_scalar, rope_theta, layer_types, hidden_activation" in said


def test_a_default_of_a_class_is_found(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", 'engine.config:Config("gemma-2-9b")', "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["known_bugs"] == ["norm-eps-1e-5"]
    assert report["missing"] == []
    assert report["exit_code"] == 1
    (wrong,) = (number for number in report["numbers"] if number["differs"])
    assert (wrong["field"], wrong["name"], wrong["value"]) == ("rms_norm_eps", "norm_eps", 1e-5)


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_released_files_conform(size: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    Gemma2Config.preset(size).to_json_file(path)
    found = check_preset(str(path))
    assert (found.size, found.verdict, found.bugs) == (size, "conforms", ())
    assert len(found.numbers) == len(FIELD_NAMES)


@pytest.mark.parametrize(
    ("change", "bug"),
    [
        ({"query_pre_attn_scalar": 128}, "scale-head-dim"),
        ({"sliding_window": 4097}, "swa-window-plus-one"),
        ({"layer_types": ["sliding_attention", "full_attention"] * 23}, None),
        ({"layer_types": ["full_attention", "sliding_attention"] * 23}, "swa-layer-parity-swapped"),
        ({"final_logit_softcapping": None}, "final-softcap-missing"),
    ],
)
def test_a_wrong_number_of_the_27b_has_its_name(change: dict[str, object], bug: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(Gemma2Config.preset("27b").to_dict() | change))
    found = check_preset(str(path), "27b")
    assert found.verdict == ("differs" if bug else "conforms")
    assert bug is None or bug in found.bugs


def test_a_model_of_another_size_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong number that changes no shape is a mistake in a released size; a wrong width is another size."""
    path = tmp_path / "config.json"

    def report(*changes: dict[str, object], size: tuple[str, ...] = ()) -> tuple[str, dict[str, object]]:
        values = Gemma2Config.preset("9b").to_dict()
        for change in changes:
            values |= change
        path.write_text(json.dumps(values))
        assert main(["check-config", str(path), *size]) == main(["check-config", str(path), *size, "--json"]) == 1
        said, _, found = capsys.readouterr().out.partition("\n{")
        return said, json.loads("{" + found)

    for change in ({"hidden_size": 3000}, {"num_key_value_heads": 4}):
        said, found = report(change)
        assert "compared with google/gemma-2-9b\n  not a released size; closest is google/gemma-2-9b\n" in said
        assert (found["is_released_size"], found["closest"]) == (False, "9b")
    for more in ({"sliding_window": 4097}, {"vocab_size": 256128, "rms_norm_eps": 1e-5}):
        said, found = report(more)
        assert "not a released size" not in said
        assert (found["is_released_size"], found["closest"]) == (True, "9b")
    said, found = report(size=("--size", "2b"))  # the 9B, compared with the 2B
    assert "not a released size" not in said
    assert (found["size"], found["closest"], found["is_released_size"]) == ("2b", "9b", True)
    said, found = report({"hidden_size": 3000}, size=("--size", "2b"))
    assert "compared with google/gemma-2-2b\n  not a released size; closest is google/gemma-2-9b\n" in said


def test_one_name_means_what_the_engine_means_by_it() -> None:
    keras, flax = match_fields(KERAS), match_fields(FLAX)
    assert keras["hidden_size"] == ("hidden_dim", 3584)
    assert keras["intermediate_size"] == ("intermediate_dim", 14336)
    assert flax["hidden_size"] == ("embed_dim", 3584)
    assert flax["intermediate_size"] == ("hidden_dim", 14336)


def test_the_padded_vocabulary_of_the_original_files_conforms(tmp_path: Path) -> None:
    path = tmp_path / "flax.json"
    path.write_text(json.dumps(FLAX))
    assert check_preset(str(path)).verdict == "inconclusive"
    path.write_text(json.dumps(FLAX | {"num_embed": 256001}))
    assert check_preset(str(path)).verdict == "differs"


@pytest.mark.parametrize("value", [[1, 0, 1], ["local_sliding", "GLOBAL", "local"], (True, False, True)])
def test_layer_types_in_other_words(value: object) -> None:
    assert read_layer_types(value) == ("sliding_attention", "full_attention", "sliding_attention")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:config", "No module named"),
        ("engine.config:missing", "not defined"),
        ("engine.config:1 +", "SyntaxError"),
        ("engine/presets.py:other", "no function 'other'"),
        ("json:loads", "no number of a Gemma 2"),
        ("json:dumps(", "SyntaxError"),
        ("missing.json", "No such file"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    source: str, message: str, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-config", source]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_an_unknown_size_is_refused(engine: Path) -> None:
    assert main(["check-config", "engine/presets.py:gemma2_9b", "--size", "7b"]) == 2
    with pytest.raises(PresetError):
        check_preset("engine.none:gemma2_9b")
