"""Time one engine in a separate process; called by `run.py`, which compares engines.

    python benchmarks/engines.py prefill transformers 9b         prints {"prefill 128": seconds, ...} as JSON
    python benchmarks/engines.py prefill transformers 9b 128     prints only the prompt of 128 tokens

Two engines in one process would disturb each other's threads. Weights are synthetic.
"""

import functools
import json
import math
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from refgemma import fast, layers, ops
from refgemma.cache import LayerCache
from refgemma.config import Gemma2Config
from refgemma.weights.checkpoint import StoredRows, open_checkpoint
from refgemma.weights.parameters import EMBED_TOKENS, tensor_shapes
from refgemma.weights.synthetic import synthetic_weights, write_synthetic

Step = Callable[[], object]
PREFILL = {"2b": (128, 512, 2048), "9b": (128, 512, 2048, 4200), "27b": (128, 512, 2048)}
DECODE = (512, 4096)
DEFINITION_TOKENS = 2048  # the readable definition is timed up to here
REPETITIONS = {1: 9, 128: 5, 512: 2}  # a process, after one that is not counted; once for more tokens
FULL_DEPTH_TOKENS = 64


def cpuinfo() -> dict[str, str]:
    """Return what Linux says about the first processor; elsewhere nothing."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


AVX512 = "avx512f" in cpuinfo().get("flags", "").split()


def processor() -> str:
    """Return the processor's name, and whether it has AVX-512, which decides the kernels of BLAS."""
    known = cpuinfo()
    numbers = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
    name = known.get("model name", platform.processor() or platform.machine())
    return f"{name}{numbers}, {'with' if AVX512 else 'without'} AVX-512"


def config_of(size: str) -> Gemma2Config:
    """Two layers, a sliding and a full one, and hardly any words: one layer is timed at a time."""
    return Gemma2Config.preset(size).changed(num_hidden_layers=2, vocab_size=256)


def once(step: Step) -> float:
    """The time of a step."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def seconds(step: Step, repetitions: int) -> float:
    """The median time of a step, after one that is not counted: the first also waits for fresh pages of memory."""
    step()
    return statistics.median(once(step) for _ in range(repetitions))


# --- engines: each gives a step, the computation of one layer ---------------------------------------------------------


def inputs(config: Gemma2Config, tokens: int, past: int) -> tuple[Any, Any, Any, LayerCache]:
    """The residual stream, rotary tables, and a cache of `past` tokens."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, tokens, config.hidden_size), np.float32)
    cos, sin = ops.rotary_tables(np.arange(past, past + tokens)[None], config.head_dim, config.rope_theta, like=x)
    shape = (1, config.num_key_value_heads, past, config.head_dim)
    keys, values = (rng.standard_normal(shape, np.float32) for _ in "kv")
    return x, cos, sin, LayerCache(keys, values, 0)


def fast_step(config: Gemma2Config, weights: Any, tokens: int, past: int) -> Step:
    x, cos, sin, cache = inputs(config, tokens, past)
    visible = np.ones((1, past + tokens), bool)
    numbers = fast.Numbers(
        config.attention_scale, config.attn_logit_softcapping, None if past else config.sliding_window,
        config.activation, config.rms_norm_eps,
    )  # fmt: skip
    if past:  # where a text is: in the middle of a room
        room = fast.reserve(LayerCache(cache.keys[:, :, :-1], cache.values[:, :, :-1], 0), 1)
        room.keys[:, :, -1:], room.values[:, :, -1:] = cache.keys[:, :, -1:], cache.values[:, :, -1:]
        cache = room

    def step() -> object:
        if isinstance(cache, fast.BufferedLayer):
            cache.buffer.used = past  # the step before is forgotten
        return fast.fast_block(x, cache, cos, sin, visible, weights, numbers)

    return step


def definition_step(config: Gemma2Config, weights: Any, tokens: int, past: int) -> Step:
    x, cos, sin, cache = inputs(config, tokens, past)
    q_places, k_places = np.arange(past, past + tokens), np.arange(past + tokens)
    causal = ops.causal_mask(q_places, k_places)
    mask = (causal if past else ops.sliding_mask(q_places, k_places, config.sliding_window))[None, None]
    return lambda: layers.block(
        x, weights, past=cache, cos=cos, sin=sin, mask=mask, scale=config.attention_scale,
        cap=config.attn_logit_softcapping, activation=config.activation, eps=config.rms_norm_eps,
    ).out  # fmt: skip


def transformers_step(config: Gemma2Config, weights: Any, tokens: int, past: int, dtype: str = "float32") -> Step:
    import torch
    import transformers
    from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

    torch.set_grad_enabled(False)
    kind = getattr(torch, dtype)
    for function in (torch.cos, torch.sin, torch.tanh, torch.exp):
        function(torch.ones(1))  # the very first call of each is occasionally wrong
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window")  # fmt: skip
    theirs = transformers.Gemma2Config(**{name: getattr(config, name) for name in names})
    theirs._attn_implementation = "eager"
    number = 1 if past else 0
    with torch.device("meta"):
        layer = Gemma2DecoderLayer(theirs, number).eval()
    fields = {name.rpartition(".")[0].rpartition(".")[2]: name for name in layer.state_dict()}
    state = {name: torch.from_numpy(getattr(weights, field)).to(kind) for field, name in fields.items()}
    layer.load_state_dict(state, assign=True)
    x, cos, sin, cache = inputs(config, tokens, past)
    hidden, *tables = (torch.from_numpy(array).to(kind) for array in (x, cos[:, 0], sin[:, 0]))
    keys, values = (torch.from_numpy(array).to(kind) for array in cache)
    places = torch.arange(past, past + tokens)[:, None]
    seen = (torch.arange(past + tokens) <= places) & (torch.arange(past + tokens) > places - config.sliding_window)
    mask = torch.where(seen, 0.0, torch.finfo(kind).min).to(kind)[None, None]

    def step() -> object:
        before = transformers.DynamicCache()
        if past:
            before.update(keys, values, number)
            if number:  # an entry for the layer below
                before.layers[0].keys = None
        return layer(hidden, position_embeddings=tuple(tables), attention_mask=mask, past_key_values=before)

    return step


STEPS: dict[str, Callable[..., Step]] = {
    "fast": fast_step,
    "definition": definition_step,
    "transformers": transformers_step,
}


def layer_of(engine: str, size: str, past: int) -> tuple[Gemma2Config, Any]:
    """The configuration and the float32 weights of a layer, as the engine takes them."""
    config = config_of(size)
    weights = synthetic_weights(config).layers[1 if past else 0]
    return config, vars(weights) if engine == "fast" else weights


# --- what a process measures ------------------------------------------------------------------------------------------


def sgemm() -> float:
    """GF/s of NumPy's product of two square matrices."""
    a, b = np.ones((2, 2048, 2048), np.float32)  # two: of a matrix and itself, NumPy computes one half only
    return 2 * 2048**3 / once(lambda: a @ b.T) / 1e9


@functools.cache
def half_a_gigabyte() -> Any:
    return np.ones((2**14, 2**13), np.float32)


def read_bandwidth() -> float:
    """GB/s that NumPy reads, the better of two ways: a matrix times a vector, and maxima in two threads."""
    a, x = half_a_gigabyte(), np.ones(2**13, np.float32)
    with ThreadPoolExecutor(2) as pool:
        halves = once(lambda: list(pool.map(np.max, np.split(a, 2))))
    return a.nbytes / min(halves, once(lambda: a @ x)) / 1e9


def matrix_weights(config: Gemma2Config) -> int:
    """Numbers in the matrices of all layers, each of which a token is multiplied with once."""
    shapes = tensor_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name != EMBED_TOKENS)


def scores_of(config: Gemma2Config, tokens: int) -> int:
    """Scores of a prompt in a sliding layer: of each token's heads with all that they can see."""
    return config.num_attention_heads * sum(min(place + 1, config.sliding_window) for place in range(tokens))


def layer_flops(config: Gemma2Config, tokens: int) -> int:
    """Of a prompt in a sliding layer: two a weight and token, and those of scores and mixed values in the window."""
    matrices = matrix_weights(config) // config.num_hidden_layers
    return 2 * matrices * tokens + 4 * scores_of(config, tokens) * config.head_dim


def layer_bytes(config: Gemma2Config, past: int) -> int:
    """To decode a token after `past` others in a full layer: its matrices, and all keys and values, in float32."""
    keys = 2 * past * config.num_key_value_heads * config.head_dim
    return 4 * (matrix_weights(config) // config.num_hidden_layers + keys)


def share(work: float, step: Step, rate: Callable[[], float], repetitions: int, together: int = 1) -> float:
    """What part of the machine's own rate a step that does `work` reaches: medians of both, measured in turn.

    A machine that is slow for a while is so for both; and what is typical of one is not held against the other's best.
    After a product the threads of BLAS spin for some 20 ms, which a step beside no rate would not meet: so it waits.
    `together` steps follow each other, where that is how they are: the first after something else takes longer.
    """
    took, rates = [], []
    for _ in range(repetitions):
        took += [once(step) for _ in range(together)]
        rates += [rate() for _ in range(5)]
        time.sleep(0.1)
    return work / statistics.median(took) / 1e9 / statistics.median(rates)


def functions(config: Gemma2Config, tokens: int) -> None:
    """As many `tanh` and `exp` as a prompt needs in a sliding layer, in threads, on numbers that stay cached."""
    scores = scores_of(config, tokens)
    for function, count in (np.tanh, scores + config.intermediate_size * tokens), (np.exp, scores):

        def fill(start: int, stop: int, function: Any = function) -> None:
            numbers = np.linspace(-1, 1, fast.CHUNK, dtype=np.float32)
            out = np.empty_like(numbers)
            for first in range(start, stop, fast.CHUNK):
                last = min(fast.CHUNK, stop - first)
                function(numbers[:last], out=out[:last])

        fast.in_threads(fill, count)


def measured_prefill(engine: str, size: str, *counts: str) -> dict[str, float]:
    """Return the seconds of prompts in a layer, by length; for `fast` also its share of the product's rate."""
    config, weights = layer_of(engine, size, 0)
    found: dict[str, float] = {}
    for tokens in map(int, counts or PREFILL[size]):
        if engine == "definition" and tokens > DEFINITION_TOKENS:
            continue
        step = STEPS[engine](config, weights, tokens, 0)
        repetitions = REPETITIONS.get(tokens, 1)
        found[f"prefill {tokens}"] = seconds(step, repetitions)
        if engine == "fast" and tokens >= 512 and not counts:
            found[f"sgemm share {tokens}"] = share(layer_flops(config, tokens), step, sgemm, repetitions)
        if engine == "fast" and not counts:
            found[f"functions {tokens}"] = seconds(functools.partial(functions, config, tokens), repetitions)
    return found


def measured_decode(engine: str, size: str, *counts: str) -> dict[str, float]:
    """Return the seconds of one token in a layer, by the tokens before it; for `fast` also its share of reading."""
    found: dict[str, float] = {}
    for past in map(int, counts or DECODE):
        config, weights = layer_of(engine, size, past)
        step = STEPS[engine](config, weights, 1, past)
        found[f"decode {past}"] = seconds(step, REPETITIONS[1])
        if engine == "fast" and not counts:
            found[f"read share {past}"] = share(layer_bytes(config, past), step, read_bandwidth, REPETITIONS[1], 5)
    return found


def widen(rows: Iterable[Any]) -> None:
    """Read the matrices among `rows` and make float32 of them, as `fast` does, without a single product."""
    for matrix in rows:
        if isinstance(matrix, StoredRows) and len(matrix.shape) == 2:
            source, height = matrix.tensor.map(keep=True), fast.TILE // matrix.shape[1]

            def fill(start: int, stop: int, source: Any = source, height: int = height) -> None:
                tile = np.empty((height, source.shape[1]), np.float32)
                for first in range(start, stop, height):
                    last = min(first + height, stop)
                    tile[: last - first] = source[first:last]

            fast.in_threads(fill, len(source))


def measured_bf16(engine: str) -> dict[str, float]:
    """A 9B layer from bfloat16 weights, decoding after 512 tokens: from the file, or in bfloat16 throughout."""
    config = config_of("9b")
    with tempfile.TemporaryDirectory() as folder:
        if engine == "transformers":
            _, weights = layer_of(engine, "9b", 512)
            return {"decode bf16": seconds(transformers_step(config, weights, 1, 512, "bfloat16"), 15)}
        write_synthetic(config, folder)
        rows = fast.layer_rows(open_checkpoint(Path(folder)).streamed().layers, 1)
        return {
            "decode bf16": seconds(fast_step(config, rows, 1, 512), 15),
            "widen bf16": seconds(lambda: widen(rows.values()), 15),
        }


def measured_memory(engine: str) -> dict[str, float]:
    """GiB that a 9B layer of 4200 tokens needs beside its weights and inputs."""
    config, weights = layer_of(engine, "9b", 0)
    step = STEPS[engine](config, weights, PREFILL["9b"][-1], 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return {"memory 4200": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20}


def measured_depth(engine: str) -> dict[str, float]:
    """64 tokens through all of the 9B, weights made and head included; of transformers, its layers alone."""
    ids = np.arange(4, 4 + FULL_DEPTH_TOKENS)[None]
    whole = Gemma2Config.preset("9b")
    if engine == "transformers":
        config, weights = layer_of(engine, "9b", 0)
        step = transformers_step(config, weights, FULL_DEPTH_TOKENS, 0)
        step()
        return {"full depth": sum(once(step) for _ in range(whole.num_hidden_layers))}
    weights = synthetic_weights(whole)
    began = time.perf_counter()
    fast.next_token_logits(ids, weights, whole)
    return {"full depth": time.perf_counter() - began}


def measured_machine(_: str) -> dict[str, float]:
    """GF/s of a matrix product and GB/s of reading, the best of a few."""
    return {"sgemm": max(sgemm() for _ in range(4)), "read": max(read_bandwidth() for _ in range(4))}


def main() -> None:
    what, engine, *size = sys.argv[1:]
    measure: dict[str, Callable[..., dict[str, float]]] = {
        "prefill": measured_prefill, "decode": measured_decode, "bf16": measured_bf16, "memory": measured_memory,
        "depth": measured_depth, "machine": measured_machine,
    }  # fmt: skip
    print(json.dumps(measure[what](engine, *size)))


if __name__ == "__main__":
    main()
