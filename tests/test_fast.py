"""Compare the fast blocks with the definition: random sizes, windows, caches, padding, pieces and threads."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from threadpoolctl import threadpool_info, threadpool_limits

import refgemma
from refgemma import fast, model
from refgemma.cache import Cache
from refgemma.config import Gemma2Config
from refgemma.goldens.distance import run_distance
from refgemma.precision import Array
from refgemma.weights.checkpoint import CheckpointError, open_checkpoint
from refgemma.weights.initial import initial_weights
from refgemma.weights.parameters import OnDemand, Weights, named_weights, weights_of
from refgemma.weights.synthetic import synthetic_weights, write_synthetic

CONFIG = Gemma2Config(
    vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=7, sliding_window=6, eos_token_id=None,
)  # fmt: skip
NUDGES = 3


@st.composite
def configs(draw: st.DrawFn) -> Gemma2Config:
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return CONFIG.changed(
        hidden_size=draw(st.integers(2, 40)),
        intermediate_size=draw(st.integers(1, 60)),
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 9)),
        query_pre_attn_scalar=draw(st.integers(1, 30)),
        sliding_window=draw(st.integers(1, 40)),
        attn_logit_softcapping=draw(st.sampled_from([50.0, 3.0, 90.0, None])),
        hidden_activation=draw(st.sampled_from(["gelu_pytorch_tanh", "silu"])),
        attention_bias=draw(st.booleans()),
    )


def outs(layers: Any, weights: Weights, config: Gemma2Config, ids: Array, mask: Array, calls: list[int]) -> list[Array]:
    """Return each layer's output in each call, without rows of padding, which have no meaning."""
    found, cache, done = [], None, 0
    for length in calls:
        part = slice(done, done + length)
        start = model.begin(ids[:, part], weights, config, attention_mask=mask[:, : part.stop], cache=cache)
        steps = list(layers(start, weights, config))
        cache, done = Cache(past for _, past in steps), part.stop
        found += [out[mask[:, part] == 1] for out, _ in steps]
    return found


def nudged(weights: Weights, config: Gemma2Config, seed: int) -> Weights:
    """Return float64 weights, each moved by up to half a float32 ulp."""
    rng = np.random.default_rng(seed)
    tensors = {name: rows[:].astype(np.float64) for name, rows in named_weights(weights, config).items()}
    moved = {name: x * (1 + rng.uniform(-(2.0**-24), 2.0**-24, x.shape)) for name, x in tensors.items()}
    return weights_of(moved, config)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data(), configs())
def test_equal_to_the_definition(data: st.DataObject, config: Gemma2Config) -> None:
    """Within the error that rounding makes in the definition: its own, or that of weights moved by half an ulp.

    In float64 that error is smaller by 2**29, the ratio of the formats: so a wrong key, head or place cannot hide.
    """
    weights = initial_weights(config, data.draw(st.integers(0, 99)))
    tensors = {name: rows[:].astype(np.float64) for name, rows in named_weights(weights, config).items()}
    exact = weights_of(tensors, config)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    calls = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    ids = rng.integers(3, config.vocab_size, (data.draw(st.integers(1, 3)), sum(calls)))
    padding = [data.draw(st.integers(0, calls[0] - 1)) for _ in ids]
    mask = (np.arange(sum(calls)) >= np.array(padding)[:, None]).astype(int)
    sizes = {
        "QUERIES": st.integers(1, 60), "ROWS": st.integers(1, 60), "SQUARE": st.integers(1, 60),
        "CHUNK": st.integers(1, 3000), "THREADS": st.integers(1, 4), "WORK": st.integers(1, 3000),
        "CUT": st.sampled_from([1, 7, 48]), "FEW": st.integers(0, 8),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(fast, name, data.draw(size, label=name))
        ours = outs(fast.outputs, weights, config, ids, mask, calls)
        ours_exact = outs(fast.outputs, exact, config, ids, mask, calls)
    single, double = (outs(model.reference_outputs, each, config, ids, mask, calls) for each in (weights, exact))
    moved = [
        outs(model.reference_outputs, nudged(weights, config, seed), config, ids, mask, calls) for seed in range(NUDGES)
    ]
    for n, expected in enumerate(double):
        noise = max(float(np.abs(other[n] - expected).max()) for other in (single, *moved))
        assert run_distance(ours[n], expected, noise) <= 1
        assert float(np.abs(ours_exact[n] - expected).max()) <= 2.0**-29 * (
            8 * noise + 2.0**-22 * np.abs(expected).max()
        )


def test_the_caches_are_the_same() -> None:
    """Compare the caches, also of a sliding layer that has dropped keys, in one call and token by token.

    Keys and values are below 0.3 here, so 1e-6 is about thirty ulps; a key of another place differs by about 0.08.
    """
    weights = initial_weights(CONFIG)
    ids = np.arange(3, 40)[None]
    for calls in ([37], [4, 20, 13], [5] + [1] * 32):
        caches: list[Cache | None] = [None, None]
        done = 0
        for length in calls:
            for n, read in enumerate((model.next_token_logits, fast.next_token_logits)):
                _, caches[n] = read(ids[:, done : done + length], weights, CONFIG, cache=caches[n])
            done += length
            for ours, definition in zip(*caches, strict=True):
                assert (ours.start, ours.stop) == (definition.start, definition.stop)
                np.testing.assert_allclose(ours.keys, definition.keys, rtol=0, atol=1e-6)
                np.testing.assert_allclose(ours.values, definition.values, rtol=0, atol=1e-6)


def test_a_cache_is_a_value() -> None:
    """Two continuations of one cache share memory, but do not disturb each other, nor do the cache's own methods.

    Logits are below 0.3 here, so 1e-6 is about thirty ulps; another token in the cache changes them by over 1e-3.
    """
    weights = initial_weights(CONFIG)
    _, cache = fast.next_token_logits([[3, 4, 5]], weights, CONFIG)
    _, cache = fast.next_token_logits([[6]], weights, CONFIG, cache=cache)  # in a room with free places now
    before = [layer.keys.copy() for layer in cache]
    first, after_first = fast.next_token_logits([[7]], weights, CONFIG, cache=cache)
    second, _ = fast.next_token_logits([[8]], weights, CONFIG, cache=cache)
    third, _ = fast.next_token_logits([[9]], weights, CONFIG, cache=cache.reorder([0]))
    alone = fast.next_token_logits([[3, 4, 5, 6, 8]], weights, CONFIG)[0]
    np.testing.assert_allclose(second, alone, rtol=0, atol=1e-6)
    assert np.abs(first - second).max() > 1e-3 < np.abs(second - third).max()
    for layer, expected in zip(cache, before, strict=True):
        np.testing.assert_array_equal(layer.keys, expected)
    np.testing.assert_array_equal(fast.next_token_logits([[7]], weights, CONFIG, cache=cache)[0], first)
    np.testing.assert_array_equal(after_first[0].keys[:, :, :-1][:, :, -4:], before[0][:, :, -4:])


def test_decoding_moves_keys_rarely() -> None:
    """A step appends its key in place; only rarely is there no space left."""
    weights, cache = initial_weights(CONFIG), None
    rooms = set()
    for token in range(3, 40):
        _, cache = fast.next_token_logits([[token]], weights, CONFIG, cache=cache)
        rooms.add(cache[1].keys.base.__array_interface__["data"][0])
    assert len(rooms) < 12


SIZES = CONFIG.changed(vocab_size=9000, hidden_size=512, intermediate_size=1536, head_dim=64)
LOGITS = """
import sys
import numpy as np
from refgemma import fast
from refgemma.weights.checkpoint import open_checkpoint
fast.THREADS, checkpoint = int(sys.argv[1]), open_checkpoint(sys.argv[2])
found = []
for weights in (checkpoint.resident(), checkpoint.streamed()):
    cache = None
    for ids in (np.arange(3, 140)[None], [[7]], [[8, 9]], [[5]]):
        with fast.own_threads():  # else BLAS's threads would multiply single tokens
            logits, cache = fast.next_token_logits(ids, weights, checkpoint.config, cache=cache)
        found.append(logits[0, -1])
np.save(sys.argv[3], found)
"""


@pytest.mark.slow
def test_the_same_numbers_with_any_number_of_threads(tmp_path: Path) -> None:
    """The numbers are equal bit for bit, for our threads and BLAS's."""
    write_synthetic(SIZES, tmp_path)
    found = []
    for blas, ours in ((1, 1), (1, 2), (2, 3), (2, 2)):
        arguments = [sys.executable, "-c", LOGITS, str(ours), str(tmp_path), str(tmp_path / "logits.npy")]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": str(blas)}
        subprocess.run(arguments, env=environment, check=True)
        found.append(np.load(tmp_path / "logits.npy"))
    assert found[0].shape == (8, SIZES.vocab_size)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_the_threads_of_blas_multiply_single_tokens_in_memory(tmp_path: Path) -> None:
    """Nothing is limited for these; prompts, and weights that are widened, have the threads of `refgemma.fast`."""
    write_synthetic(SIZES, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    seen: list[set[int]] = []
    multiply = fast.multiply

    def watch(weight: Any, x: Array) -> Array:
        seen.append(set(blas_threads()))
        return multiply(weight, x)

    with threadpool_limits(2, user_api="blas"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "multiply", watch)
        for weights, ids, expected in (
            (checkpoint.resident(), [[5]], 2), (checkpoint.resident(), [[5, 6]], 1), (checkpoint.streamed(), [[5]], 1),
        ):  # fmt: skip
            seen.clear()
            fast.next_token_logits(ids, weights, SIZES)
            assert seen[:-1] == [{expected}] * (7 * SIZES.num_hidden_layers)
            head = 1 if isinstance(weights.layers, OnDemand) else 2
            assert seen[-1] == {head}  # of a prompt, too, only the last token has logits


def test_as_many_threads_as_blas_would_use() -> None:
    """`OPENBLAS_NUM_THREADS` is obeyed, and the process's setting is restored after a block."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", "from refgemma import fast; assert fast.THREADS == 1"], env=environment, check=True
    )


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_the_number_of_blas_threads_is_put_back() -> None:
    """This also holds if two threads of the caller compute: the second must not restore the first's setting."""
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with fast.own_threads():
            entered.set()
            leave.wait(60)

    with threadpool_limits(2, user_api="blas"):
        other = threading.Thread(target=second)
        with fast.own_threads():
            assert set(blas_threads()) == {1}
            other.start()
            assert not entered.wait(0.5)
        assert entered.wait(60)
        leave.set()
        other.join()
        assert set(blas_threads()) == {2}


FORK = """
import os
import numpy as np
from refgemma import fast
found = np.zeros(2)
def fill(start, stop):
    found[start:stop] += 1
fast.in_threads(fill, 2)
child = os.fork()
fast.in_threads(fill, 2)
if child:
    assert os.waitpid(child, 0)[1] == 0
assert found.tolist() == [2, 2]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """A forked process must not wait for its parent's threads, which it does not have."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=60, check=True)


def test_weights_on_disk_and_weights_yet_to_be_made(tmp_path: Path) -> None:
    """Computing tile by tile gives the same, and no whole layer is made. 5e-6 is the limit for logits."""
    write_synthetic(SIZES, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    stored, made = checkpoint.streamed(), synthetic_weights(SIZES)
    for ids in ([[3, 4, 5, 6, 7, 8, 9]], [[3, 4]]):
        expected = model.next_token_logits(ids, checkpoint.resident(), SIZES)[0]
        for weights in (stored, made):
            assert isinstance(weights.layers, OnDemand)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(OnDemand, "__getitem__", None)
                found = fast.next_token_logits(ids, weights, SIZES)[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * float(np.abs(expected).max()))


def test_maps_are_kept_for_tokens_and_not_for_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt uses each tensor once, so that no map should stay; tokens use all tensors again."""
    write_synthetic(SIZES, tmp_path)
    weights = open_checkpoint(tmp_path).streamed()
    made: list[object] = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args: made.append(args) or memmap(*args))

    def maps_of(ids: list[int]) -> int:
        made.clear()
        fast.next_token_logits([ids], weights, SIZES)
        return len(made)

    prompt, again = maps_of([3] * 9), maps_of([3] * 9)
    assert prompt - again == 1  # the head, which is for the last token only
    assert again - maps_of([3]) == 0
    assert again - maps_of([4]) == 7 * SIZES.num_hidden_layers  # gains and embeddings are read each time


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    """Numbers are not checked before use; the result is checked."""
    weights = initial_weights(CONFIG)
    tensors = {name: rows[:] for name, rows in named_weights(weights, CONFIG).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][5, 3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    CONFIG.save_pretrained(tmp_path)
    damaged = open_checkpoint(tmp_path).streamed()
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.up_proj.weight', index \[5, 3\]: nan is not a finite number"
    ):
        fast.next_token_logits([[3, 4]], damaged, CONFIG)


def test_half_precision_and_masks_of_ones_own_are_the_definition() -> None:
    """Half precision is equal bit for bit; in float32 the head's product has another order and differs by some ulps."""
    weights = initial_weights(CONFIG, dtype="bfloat16")
    np.testing.assert_array_equal(
        fast.next_token_logits([[3, 4]], weights, CONFIG)[0], model.next_token_logits([[3, 4]], weights, CONFIG)[0]
    )
    own = np.tril(np.ones((1, 1, 3, 3), bool))
    own[..., 2, 0] = False
    single = initial_weights(CONFIG)
    found, expected = (
        read([[3, 4, 5]], single, CONFIG, attention_mask=own)[0]
        for read in (fast.next_token_logits, model.next_token_logits)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_missing_head_is_refused() -> None:
    untied = CONFIG.changed(tie_word_embeddings=False)
    headless = initial_weights(CONFIG)
    with pytest.raises(refgemma.inputs.InputError, match=r"lm_head\.weight is missing from the weights"):
        fast.next_token_logits([[3]], headless, untied)


FORK_WHILE_COMPUTING = """
import os, threading
import numpy as np
import refgemma
from refgemma.fast import next_token_logits

tiny, ids = refgemma.load("tiny"), IDS
expected = next_token_logits(ids, tiny.weights, tiny.config)[0]
stop = threading.Event()

def work():
    while not stop.is_set():
        next_token_logits(ids, tiny.weights, tiny.config)

busy = threading.Thread(target=work)
busy.start()
children = []
for _ in range(20):
    child = os.fork()
    if not child:
        same = np.array_equal(next_token_logits(ids, tiny.weights, tiny.config)[0], expected)
        os._exit(0 if same else 9)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
stop.set()
busy.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("ids", ["[[2, 300, 400]]", "[[2]]"])
def test_a_process_that_is_forked_while_a_thread_computes_does_not_wait_for_ever(ids: str) -> None:
    """Neither does the thread: a fork takes BLAS's threads away from a product that they share."""
    script = FORK_WHILE_COMPUTING.replace("IDS", ids)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True, text=True, check=True, timeout=60, env=environment,
    )  # fmt: skip
    assert run.stdout.strip() == str([0] * 20)
