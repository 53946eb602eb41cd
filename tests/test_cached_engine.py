"""Judge engines that have only a cached path, prefill and decode: right ones conform, and a mistake in either half is
found, also by the recordings of PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings

from refgemma.config import FULL, Gemma2Config
from refgemma.model import forward
from refgemma.testing import properties
from refgemma.testing.backends import BackendError, Capabilities, Loaded, NumpyBackend, backend_named
from refgemma.testing.cached import ThroughCache
from refgemma.testing.interface import Unsupported
from refgemma.testing.laws import PROFILES, LawBroken, NotApplicable, Refused, Search
from refgemma.testing.recordings import check_golden

pytestmark = pytest.mark.slow


class Engine:
    """An engine whose cache is a list that each step changes."""

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def load(self, folder: Path, dtype: str) -> Loaded:
        return NumpyBackend().load(folder, dtype)

    def prefill(self, model: Loaded, input_ids: Any) -> tuple[Any, Any]:
        run = forward(input_ids, model.weights, self.prefill_config(model.config))
        return run.logits, [run.cache]

    def decode(self, model: Loaded, input_ids: Any, cache: Any) -> tuple[Any, Any]:
        assert input_ids.shape[1] == 1
        at = np.broadcast_to(self.position(cache[0].get_seq_length()), input_ids.shape)
        run = forward(input_ids, model.weights, self.decode_config(model.config), cache=cache[0], position_ids=at)
        cache[0] = run.cache
        return run.logits, cache

    def prefill_config(self, config: Gemma2Config) -> Gemma2Config:
        return config

    def decode_config(self, config: Gemma2Config) -> Gemma2Config:
        return config

    def position(self, place: int) -> int:
        return place


class LastRow(Engine):
    """Return only the last token's logits, without an axis of tokens."""

    def prefill(self, model: Loaded, input_ids: Any) -> tuple[Any, Any]:
        logits, cache = super().prefill(model, input_ids)
        return logits[:, -1], cache

    def decode(self, model: Loaded, input_ids: Any, cache: Any) -> tuple[Any, Any]:
        logits, cache = super().decode(model, input_ids, cache)
        return logits[:, -1], cache


class PrefillWithoutWindow(LastRow):
    def prefill_config(self, config: Gemma2Config) -> Gemma2Config:
        return config.changed(layer_types=(FULL,) * config.num_hidden_layers)


class DecodeWithoutWindow(Engine):
    def decode_config(self, config: Gemma2Config) -> Gemma2Config:
        return config.changed(layer_types=(FULL,) * config.num_hidden_layers)


class DecodeWithoutCap(Engine):
    def decode_config(self, config: Gemma2Config) -> Gemma2Config:
        return config.changed(attn_logit_softcapping=None)


class DecodeOneTooLate(Engine):
    def position(self, place: int) -> int:
        return place + 1


class OneRow(Engine):
    """Refuse batches."""

    def prefill(self, model: Loaded, input_ids: Any) -> tuple[Any, Any]:
        if len(input_ids) > 1:
            raise Unsupported("batches of several texts")
        return super().prefill(model, input_ids)


class Misshapen(Engine):
    def prefill(self, model: Loaded, input_ids: Any) -> tuple[Any, Any]:
        logits, cache = super().prefill(model, input_ids)
        return logits[0, :, None, None], cache


@pytest.mark.parametrize("engine", [Engine, LastRow])
@pytest.mark.parametrize("law", [name for name, law in properties.LAWS.items() if set(law.needs) <= {"cache"}])
def test_a_right_engine_conforms(engine: type[Engine], law: str) -> None:
    properties.LAWS[law](engine(), "dev")


@pytest.mark.parametrize(
    ("engine", "law"),
    [
        (PrefillWithoutWindow, "window_locality"),
        (DecodeWithoutWindow, "window_locality"),
        (DecodeWithoutWindow, "chunks_change_nothing"),
        (DecodeWithoutCap, "a_vanishing_attention_cap_makes_all_keys_alike"),
        (DecodeOneTooLate, "chunks_change_nothing"),
    ],
)
def test_a_mistake_in_one_half_is_found(engine: type[Engine], law: str) -> None:
    search = Search(properties.LAWS[law], ThroughCache(engine()))
    with pytest.raises(LawBroken, match=law) as broken:
        search.run(settings(PROFILES["ci"], phases=[Phase.generate]))  # no simpler example is searched for
    assert f"backend_named('{__name__}:{engine.__name__}')" in broken.value.script


@pytest.mark.parametrize("case", ["bends-forward-f32", "bends-decode-f32"])
def test_recordings_are_read_through_the_cache(case: str) -> None:
    check_golden(Engine(), case)
    check_golden(LastRow(), case)
    with pytest.raises(LawBroken, match=f"{case}: .* differ"):
        check_golden(DecodeWithoutWindow(), case)


def test_the_methods_of_the_engine_are_found() -> None:
    backend = backend_named(f"{__name__}:LastRow")
    assert isinstance(backend, ThroughCache)
    assert backend.position(3) == 3
    assert not hasattr(backend, "tokenizer")


def test_what_an_engine_without_batches_refuses_is_counted() -> None:
    search = Search(properties.LAWS["causality"], ThroughCache(OneRow()))
    search.run(PROFILES["ci"])
    assert search.checked == PROFILES["ci"].max_examples
    assert search.refused["batches of several texts"] > 0
    with pytest.raises(Refused, match="batches of several texts"):
        properties.batch_rows_are_independent(OneRow())


def test_padding_is_not_applicable() -> None:
    with pytest.raises(NotApplicable, match="padding"):
        properties.left_padding_changes_nothing(Engine())


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises((BackendError, LawBroken), match=r"prefill of . tokens returned logits of shape"):
        properties.causality(Misshapen())
