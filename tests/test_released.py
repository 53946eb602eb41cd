"""Published outputs of the released checkpoints: consistent with one another, without weights; and beside what refgemma
computes, where ``REFGEMMA_CHECKPOINTS`` names a folder that holds ``gemma-2-9b`` and so on."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.generation.decode import Prompts, generate_batch
from refgemma.generation.generation_config import GenerationConfig
from refgemma.generation.perplexity import gemma_cpp_bits_per_byte, token_losses
from refgemma.goldens.released import read_released
from refgemma.heads import log_softmax
from refgemma.model import begin, blocks, head
from refgemma.modeling.pretrained import Pretrained, load
from refgemma.ops import linear, rms_norm

SIZES = {"9b": 42, "27b": 46}
# The recordings are float32, of another program (TransformerLens), whose logits are reported to differ from
# transformers' by 7e-5: an error of e in a logit changes a probability p by at most 2 e p, and an entropy in bits by
# about e times the spread of the logits. Twice to ten times that is allowed.
# Of a norm of the residual stream the rounding of all layers before it is left: 4e-6 in float32 of the synthetic 9B,
# and two hundred times that for the two programs' different order of sums, still far below any known mistake.
PROBABILITY, ENTROPY_BITS, NORM = 2e-4, 2e-3, 1e-3


# --- what is computed -------------------------------------------------------------------------------------------------


def distribution(ids: list[int], model: Pretrained) -> tuple[list[float], list[np.ndarray], np.ndarray]:
    """Norms of the residual stream at the last place, log probabilities through the next norm, and the model's own."""
    start = begin([ids], model.weights, model.config)
    stream = [start.embedded[0, -1]]
    norms = []
    for layer, record in enumerate(blocks(start, model.weights, model.config)):
        stream.append(record.out[0, -1])
        norms.append(np.asarray(model.weights.layers[layer].input_layernorm))
    norms.append(np.asarray(model.weights.norm))
    seen = np.stack([
        rms_norm(x, norm, model.config.rms_norm_eps) for x, norm in zip(stream, norms, strict=True)
    ])  # fmt: skip
    table = model.weights.head
    uncapped = [linear(seen, table[first : first + 16384]) for first in range(0, table.shape[0], 16384)]
    _, logits = head(seen[None, -1:], model.weights, model.config)
    sizes = [float(np.sqrt(np.sum(np.asarray(x, np.float64) ** 2))) for x in stream]
    return sizes, list(log_softmax(np.concatenate(uncapped, axis=-1))), log_softmax(logits[0, 0])


def entropy_bits(log_probabilities: np.ndarray) -> float:
    x = log_probabilities.astype(np.float64)
    return -float(np.sum(np.exp(x) * x)) / math.log(2)


def problems(log_probabilities: np.ndarray, expected: Mapping[str, Any], model: Pretrained) -> list[str]:
    """Where a distribution is not the published one."""
    found = []
    probabilities = np.exp(log_probabilities.astype(np.float64))
    best = np.sort(probabilities)[::-1]
    for place, (token, published) in enumerate(expected["top"]):
        if abs(best[place] - published) > PROBABILITY:
            found.append(f"place {place + 1} has {best[place]:.6f}, published {published:.6f} ({token!r})")
    tokens = [model.tokenizer.decode([int(n)]) for n in np.argsort(-probabilities)[:1]]
    if tokens[0].strip() != expected["top"][0][0].strip():
        found.append(f"the most likely is {tokens[0]!r}, published {expected['top'][0][0]!r}")
    if abs(entropy_bits(log_probabilities) - expected["entropy"]) > ENTROPY_BITS:
        found.append(f"entropy {entropy_bits(log_probabilities):.5f} bits, published {expected['entropy']:.5f}")
    return found


# --- against checkpoints ----------------------------------------------------------------------------------------------


def released(name: str, dtype: str = "float32") -> Pretrained:
    """A released checkpoint, or the reason why there is none."""
    folder = os.environ.get("REFGEMMA_CHECKPOINTS")
    if not folder or not (Path(folder) / name / "config.json").exists():
        pytest.skip(f"needs the weights of google/{name}: set REFGEMMA_CHECKPOINTS to a folder that holds {name}/")
    return load(Path(folder) / name, dtype)


@pytest.mark.parametrize("size", SIZES)
def test_released_distributions(size: str) -> None:
    model, recording = released(f"gemma-2-{size}"), read_released(f"logos-in-layers-{size}")
    cases = [*recording["prompts"], {"prompt": recording["main_prompt"], **recording["final"]}]
    for case in cases:
        _, _, own = distribution(model.tokenizer.encode(case["prompt"]), model)
        assert not problems(own, case, model), case["prompt"]


@pytest.mark.parametrize("size", SIZES)
def test_released_residual_norms(size: str) -> None:
    model, recording = released(f"gemma-2-{size}"), read_released(f"logos-in-layers-{size}")
    sizes, _, _ = distribution(model.tokenizer.encode(recording["main_prompt"]), model)
    np.testing.assert_allclose(sizes, recording["residual_norms"], rtol=NORM)


@pytest.mark.parametrize("size", SIZES)
def test_released_layers(size: str) -> None:
    model, recording = released(f"gemma-2-{size}"), read_released(f"logos-in-layers-{size}-layers")
    for case in recording["prompts"]:
        _, by_layer, _ = distribution(model.tokenizer.encode(case["prompt"]), model)
        for found, expected in zip(by_layer, case["layers"], strict=True):
            assert not problems(found, expected, model), (case["prompt"], expected["layer"])


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_released_9b_it_log_probabilities(part: str) -> None:
    model, recording = released("gemma-2-9b-it", "bfloat16"), read_released("text-generation-inference-9b-it")
    prefill, decode = ([token for token, _ in recording[name]] for name in ("prefill", "decode"))
    assert model.tokenizer.encode(recording["prompt"]) == prefill
    ours = -token_losses(prefill + decode, model.weights, model.config)
    ours = ours[: len(prefill) - 1] if part == "prefill" else ours[len(prefill) - 1 :]
    theirs = np.array([value for _, value in recording[part] if value is not None])
    allowed = recording["tolerance"]
    np.testing.assert_allclose(ours, theirs, rtol=allowed["relative"], atol=allowed["absolute"])


def test_released_9b_logits() -> None:
    model, recording = released("gemma-2-9b", "bfloat16"), read_released("kithara-9b")
    logits = np.asarray(refgemma.forward([recording["ids"]], model.weights, model.config).logits)[0]
    # Of bfloat16 runs of 42 layers; the synthetic 9B's own bfloat16 noise is 7 % of a logit's spread.
    np.testing.assert_allclose(logits[:, [0, 1, 2, -3, -2, -1]], recording["logits"], rtol=0.07, atol=1.0)


@pytest.mark.parametrize("text", range(3))
@pytest.mark.parametrize("size", ["2b-it", "9b-it", "27b-it"])
def test_released_gemma_cpp(size: str, text: int) -> None:
    model, recording = released(f"gemma-2-{size}"), read_released("gemma-cpp")
    words, figure = (recording["texts"][text][key] for key in ("text", "bits_per_byte"))
    ids = model.tokenizer.encode(words)
    found = gemma_cpp_bits_per_byte(ids, len(words.encode()), model.weights, model.config)
    assert abs(found - figure[size]) <= recording["tolerance"] + 0.005  # two decimals are published


@pytest.mark.parametrize("case", range(3))
def test_released_texts(case: int) -> None:
    expected = read_released("transformers")["texts"][case]
    model = released(expected["checkpoint"].split("/")[1], expected["dtype"].split()[0].strip(";"))
    rows = [model.tokenizer.encode(prompt) for prompt in expected["prompts"]]
    call = GenerationConfig(max_new_tokens=expected["compared"], do_sample=False)
    for row, words in zip(rows, expected["continuations"], strict=True):
        made = generate_batch(Prompts([row]), model.weights, model.config, call).sequences[0, len(row) :]
        assert words.startswith(model.tokenizer.decode(made.tolist()))


# --- without weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_cap_of_30_and_no_other_carries_the_uncapped_into_the_published_distribution(size: str) -> None:
    """``final = cap * tanh(uncapped / cap)``: of the tokens in both tables, up to the sum that softmax divides out."""
    recording = read_released(f"logos-in-layers-{size}")
    [case] = [
        c for c in read_released(f"logos-in-layers-{size}-layers")["prompts"] if c["prompt"] == recording["main_prompt"]
    ]
    uncapped, capped = dict(case["layers"][-1]["top"]), dict(recording["final"]["top"])
    both = [token for token in uncapped if token in capped]
    raw, final = (np.log([table[token] for token in both]) for table in (uncapped, capped))
    assert len(both) >= 4

    def misfit(cap: float) -> float:
        """Least over the unknown height of the uncapped logits, of which a softmax tells only differences."""
        heights = np.arange(5.0, 120.0, 0.02)
        curves = cap * np.tanh((raw[None, :] - raw[0] + heights[:, None]) / cap)
        apart = (curves - curves[:, :1]) - (final - final[0])
        return float(np.sqrt(np.mean(apart**2, axis=1)).min())

    misfits = {cap: misfit(cap) for cap in (20, 25, 27, 30, 33, 35, 50)}
    assert min(misfits, key=lambda cap: misfits[cap]) == 30, misfits
    assert misfits[30] < min(misfit for cap, misfit in misfits.items() if cap != 30) / 3


@pytest.mark.parametrize("size", SIZES)
def test_temperature_divides_capped_logits(size: str) -> None:
    recording = read_released(f"logos-in-layers-{size}")
    plain = dict(recording["final"]["top"])
    for case in recording["temperature"]:
        tokens = [token for token, p in case["top"] if token in plain and p > 1e-30]
        hot, cold = (
            np.log([dict(table)[token] for token in tokens]) for table in (case["top"], recording["final"]["top"])
        )
        # float32 probabilities: a logarithm of one has an error of 1e-7 and what rounding did before, over T.
        np.testing.assert_allclose(hot - hot[0], (cold - cold[0]) / case["temperature"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_tables_are_whole(size: str) -> None:
    recording, layers = read_released(f"logos-in-layers-{size}"), read_released(f"logos-in-layers-{size}-layers")
    assert len(recording["residual_norms"]) == SIZES[size] + 1
    assert len(recording["prompts"]) == 14
    assert len(layers["prompts"]) == 10
    for case in [*recording["prompts"], recording["final"], *(e for c in layers["prompts"] for e in c["layers"])]:
        p = np.array([value for _, value in case["top"]])
        assert (np.diff(p) <= 0).all()
        rest = max(0.0, 1 - p.sum())
        least = -np.sum(p[p > 0] * np.log2(p[p > 0])) - (rest * math.log2(rest) if rest > 1e-6 else 0.0)
        most = least + rest * math.log2(256000)
        assert least - 1e-3 <= case["entropy"] <= most + 1e-3  # float32 sums over 256000 words
    for case in layers["prompts"]:
        assert [entry["layer"] for entry in case["layers"]] == list(range(SIZES[size] + 1))


def test_log_probabilities_that_are_said_to_be_bfloat16_are() -> None:
    recording = read_released("text-generation-inference-9b-it")
    values = np.array([value for part in ("prefill", "decode") for _, value in recording[part] if value is not None])
    rounded = np.asarray(refgemma.precision.bf16(values))
    np.testing.assert_allclose(rounded, values, rtol=1e-6)  # printed with eight digits


def test_every_recording_says_where_it_is_from() -> None:
    folder = refgemma.hub.golden_folder() / "released"
    names = sorted(path.stem for path in folder.glob("*.json"))
    assert len(names) == 9
    for name in names:
        recording = read_released(name)
        for field in ("checkpoint", "source", "commit", "licence", "precision", "caveats"):
            assert recording[field], (name, field)
        assert f"`{name}.json`" in (folder / "README.md").read_text(encoding="utf-8")
