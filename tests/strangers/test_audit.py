"""Audit servers: right ones, others with known bugs, quantised weights, and hostile answers.

The servers run in the tests and compute with refgemma itself; so they show that an audit finds what was planted. What
real servers answer is in docs/how-to/audit-a-server.md.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refgemma
from refgemma.cli.main import main
from refgemma.config import FULL, Gemma2Config
from refgemma.model import forward
from refgemma.oracle.known_bugs import KNOWN_BUGS
from refgemma.precision import as_float64
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.conformance import proportions, write_conformance
from refgemma.weights.parameters import LayerWeights, Weights

FEW = ("swa-all-global", "decode-without-window", "prefill-without-window", "gelu-exact", "gelu-f16-table")
KEY = "sk-secret-7"
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def log_softmax(logits: Any) -> Any:
    z = as_float64(logits) - as_float64(logits).max(-1, keepdims=True)
    return np.float32(z - np.log(np.exp(z).sum(-1, keepdims=True)))


class Model:
    """A server's model: it computes a prompt at once, and new tokens with a cache."""

    def __init__(self, config: Gemma2Config, weights: Weights, steps: Gemma2Config | None = None) -> None:
        self.config, self.weights, self.steps = config, weights, steps or config

    def run(self, ids: Sequence[int], new: int, seed: int) -> tuple[list[int], Any]:
        """Return the tokens with new ones, and the log probabilities at each place."""
        rng, tokens = np.random.default_rng(seed), [*ids]
        found = forward([tokens], self.weights, self.config)
        rows = [*log_softmax(found.logits)[0]]
        for _ in range(new):
            tokens.append(
                int(rng.choice(len(rows[-1]), p=np.exp(np.float64(rows[-1])) / np.exp(np.float64(rows[-1])).sum()))
            )
            found = forward([tokens[-1:]], self.weights, self.steps, cache=found.cache)
            rows.append(log_softmax(found.logits)[0, 0])
        return tokens, rows


def best(row: Any, top: int, name: Callable[[int], str]) -> dict[str, float]:
    return {name(int(n)): float(row[n]) for n in np.argsort(-row)[:top]}


def vllm(model: Model) -> Answer:
    """Answer as vLLM: token ids, a repeated prompt, ids in place of words."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        ids, new = body["prompt"], body["max_tokens"]
        tokens, rows = model.run(ids, new, body["seed"])
        first = 0 if body.get("echo") else len(ids)
        name = "token_id:{}".format
        lists = {
            "tokens": [name(n) for n in tokens[first:]],
            "token_logprobs": [float(rows[p - 1][tokens[p]]) if p else None for p in range(first, len(tokens))],
            "top_logprobs": [
                best(rows[p - 1], body["logprobs"], name) if p else None for p in range(first, len(tokens))
            ],
        }
        return {"choices": [{"logprobs": lists}], "usage": {"prompt_tokens": len(ids)}}

    return answer


def llama_server(model: Model) -> Answer:
    """Answer as llama.cpp's server: no repeated prompt, records with ids."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if body.get("echo"):
            return {"status": 400, "error": "Only no echo is supported"}
        ids = body["prompt"]
        tokens, rows = model.run(ids, body["max_tokens"], body["seed"])
        content = [
            {"id": tokens[p], "token": "?", "logprob": float(rows[p - 1][tokens[p]]),
             "top_logprobs": [{"id": int(n), "token": "?", "logprob": float(rows[p - 1][n])}
                              for n in np.argsort(-rows[p - 1])[: body["logprobs"]]]}
            for p in range(len(ids), len(tokens))
        ]  # fmt: skip
        return {"choices": [{"logprobs": {"content": content}}]}

    return answer


def texts_only(model: Model, tokenizer: Tokenizer, digits: int) -> Answer:
    """Answer as a server that takes texts, names words by their text, and writes few decimals."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(body["prompt"], str) or body["logprobs"] > 5 or "return_tokens_as_token_ids" in body:
            return {"status": 422, "error": "unknown"}
        ids = tokenizer.encode(body["prompt"])
        tokens, rows = model.run(ids, body["max_tokens"], body["seed"])
        first = 0 if body.get("echo") else len(ids)
        words = [tokenizer.decode([n]) for n in tokens]
        top = [best(rows[p - 1], 5, lambda n: tokenizer.decode([n])) if p else None for p in range(first, len(tokens))]
        own = [float(rows[p - 1][tokens[p]]) if p else None for p in range(first, len(tokens))]
        short = [None if x is None else round(x, digits) for x in own]
        few = [None if row is None else {w: round(x, digits) for w, x in row.items()} for row in top]
        lists = {"tokens": words[first:], "token_logprobs": short, "top_logprobs": few}
        return {"choices": [{"logprobs": lists}], "usage": {"prompt_tokens": len(ids)}}

    return answer


def mistral_rs(model: Model, tokenizer: Tokenizer, greedy: float = 1.0) -> Answer:
    """Answer as scoreboard/mistralrs/serve.py: texts, a number for each of the best words, a text for the drawn one.

    `greedy` is a factor on log probabilities at temperature 0, by which some servers may change them.
    """

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(body["prompt"], str) or body.get("echo"):
            return {"status": 400, "error": "takes one text"}
        ids, new = tokenizer.encode(body["prompt"]), body["max_tokens"]
        tokens, content = [*ids], []
        for step in range(new):
            _, rows = model.run(tokens, 0, 0)
            row = rows[-1] if body["temperature"] else rows[-1] * np.float32(greedy)
            drawn = int(np.argsort(-row)[0 if body["temperature"] == 0 else 40 + step])
            top = [{"token": int(n), "logprob": float(row[n])} for n in np.argsort(-row)[: body["logprobs"]]]
            text = tokenizer.decode([drawn])
            content.append({"token": text, "logprob": float(row[drawn]), "top_logprobs": top})
            tokens.append(drawn)
        return {"choices": [{"logprobs": {"content": content}}], "usage": {"prompt_tokens": len(ids)}}

    return answer


@contextmanager
def serve(
    answer: Answer | bytes, status: int = 200, headers: dict[str, str] | None = None
) -> Iterator[tuple[str, list[Any]]]:
    """Start a server on the loopback device; yield its address and the requests that it got."""
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            got.append((self.path, dict(self.headers), None))
            self.send({"data": [{"id": "small"}]} if self.path == "/v1/models" else {}, 200)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, dict(self.headers), body))
            found = answer if isinstance(answer, bytes) else answer(body)
            code = found.pop("status", status) if isinstance(found, dict) else status
            self.send(found, code)

        def send(self, found: Any, code: int) -> None:
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def model(dtype: str = "float32", steps: dict[str, Any] | None = None, **changes: Any) -> Model:
    loaded = refgemma.load("conformance", dtype)
    config = loaded.config.changed(**changes)
    return Model(config, loaded.weights, config.changed(**steps) if steps else None)


def rounded(bits: int) -> Weights:
    """Return weights that are rounded to a number of bits, with a scale for each row."""

    def few(x: Any) -> Any:
        if not hasattr(x, "ndim") or x.ndim != 2:
            return x
        scale = np.abs(x).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
        return np.float32(np.round(x / scale) * scale)

    weights = refgemma.load("conformance").weights
    layers = [LayerWeights(**{name: few(x) for name, x in vars(layer).items()}) for layer in weights.layers]
    return replace(weights, embed_tokens=few(weights.embed_tokens), layers=layers)


@pytest.fixture(autouse=True)
def few_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test for few known bugs, to save time; tests/test_mistakes.py tests the catalogue."""
    few = [bug for bug in KNOWN_BUGS if bug.name.endswith("softcap-missing") or bug.name in FEW]
    assert len(few) == len(FEW) + 2
    for module in ("audit", "diagnose"):
        monkeypatch.setattr(f"refgemma.oracle.{module}.KNOWN_BUGS", tuple(few))
    monkeypatch.setattr("refgemma.oracle.diagnose.MULTIPLICATIONS", 0)


def audit(url: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["audit", url, "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


# --- what the server computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [vllm, llama_server])
def test_a_right_server(kind: Callable[[Model], Answer], capsys: pytest.CaptureFixture[str]) -> None:
    with serve(kind(model())) as (url, got):
        code, found = audit(url, capsys)
    assert (code, found["verdict"]) == (0, "conforms")
    assert [r["dtype"] for r in found["assumptions"]] == ["float32"]
    assert [*found["assumptions"][0]["runs"]] == ["prompt", "generated"]
    assert found["best_word_agrees"] == found["places"] > 35
    assert found["served"] == "small"
    assert {body["model"] for _, _, body in got if body} == {"small"}
    assert {"swa-all-global", "attn-softcap-missing", "final-softcap-missing"} <= set(found["excluded"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"attn_logit_softcapping": None}, "attn-softcap-missing"),
     ({"final_logit_softcapping": None}, "final-softcap-missing"),
     ({"layer_types": (FULL,) * 4}, "swa-all-global"),
     ({"steps": {"layer_types": (FULL,) * 4}}, "decode-without-window")],
)  # fmt: skip
def test_a_known_bug(changes: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(vllm(model(**changes))) as (url, _):
        code, found = audit(url, capsys)
    assert (code, found["verdict"]) == (1, "differs")
    assert any(named in name for name in found["assumptions"][0]["named"])
    assert "UNKNOWN" not in found["assumptions"][0]["named"]


def test_half_precision_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(vllm(model("bfloat16"))) as (url, _):
        code, found = audit(url, capsys)
    assert (code, found["assumptions"][0]["dtype"]) == (0, "bfloat16")
    assert "computes in bfloat16" in found["says"]


def test_rounded_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(vllm(Model(model().config, rounded(8)))) as (url, _):
        _, found = audit(url, capsys)
    quantised = [r for r in found["assumptions"] if r["quantised"]]
    assert [r["verdict"] for r in quantised] == ["noisy"]
    assert 0.0035 < quantised[0]["weights_off"] < 0.014  # 8 bits


@pytest.mark.parametrize(
    ("dtype", "changes", "named"),
    [("float32", {"rope_theta": 20000.0, "rope_parameters": None}, "rope_theta = 20000"),
     ("float16", {"query_pre_attn_scalar": 12}, "query_pre_attn_scalar = 12"),
     ("float32", {"sliding_window": 5}, "sliding_window = 5")],
)  # fmt: skip
def test_another_number_is_named(
    dtype: str, changes: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(vllm(model(dtype, **changes))) as (url, _):
        code, found = audit(url, capsys)
    first = found["assumptions"][0]
    assert (code, found["verdict"], first["quantised"]) == (1, "differs", False)
    assert (first["dtype"], first["named"]) == (dtype, [named])
    assert named in found["says"]


def test_a_small_mistake_in_a_fine_precision_is_not_rounding_in_a_coarse_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serve(vllm(model("float16", query_pre_attn_scalar=13.52))) as (url, _):  # instead of 13
        code, found = audit(url, capsys)
    assert [(r["dtype"], r["verdict"]) for r in found["assumptions"][:2]] == [
        ("float16", "differs"), ("bfloat16", "conforms")
    ]  # fmt: skip
    [name] = found["assumptions"][0]["named"]
    assert name.startswith("query_pre_attn_scalar = 13.5")
    assert code == 1


@pytest.mark.slow
def test_other_weights(capsys: pytest.CaptureFixture[str]) -> None:
    weights = model().weights
    other = replace(weights, layers=weights.layers[::-1])
    with serve(vllm(Model(model().config, other))) as (url, _):
        code, found = audit(url, capsys, "--tokens", "8")
    assert (code, found["assumptions"][0]["named"]) == (1, ["UNKNOWN"])
    assert "other weights" in found["says"]


def test_a_server_that_takes_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = proportions(8)
    write_conformance(tmp_path / "small", config)
    small = refgemma.load(tmp_path / "small")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "small")
    for changes, digits, expected in (({}, 4, 0), ({"attn_logit_softcapping": None}, 6, 1)):
        with serve(texts_only(Model(config.changed(**changes), small.weights), tokenizer, digits)) as (url, _):
            code, found = audit(url, capsys, "--model", str(tmp_path / "small"), "--tokens", "12")
        assert (code, found["form"]) == (expected, "text, repeated prompt"), found["says"]
        assert expected == 0 or found["assumptions"][0]["named"] == ["attn-softcap-missing"]


@pytest.mark.parametrize("greedy", [1.0, 0.5])
def test_a_server_that_names_words_by_numbers(
    greedy: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = proportions(8)
    write_conformance(tmp_path / "small", config)
    small = refgemma.load(tmp_path / "small")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "small")
    with serve(mistral_rs(Model(config, small.weights), tokenizer, greedy)) as (url, _):
        code, found = audit(url, capsys, "--model", str(tmp_path / "small"), "--tokens", "16")
    assert (code, found["form"]) == (0, "text, one token at a time"), found["says"]
    # Only without chance is each word among those with an id; numbers that this changes are not used.
    assert ("generated" in found["assumptions"][0]["runs"]) == (greedy == 1.0)


def test_the_report_is_short_and_names_the_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(vllm(model(final_logit_softcapping=None))) as (url, _):
        assert main(["audit", url]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS: it has final-softcap-missing" in out
    assert len(out.splitlines()) < 20


# --- what a hostile server answers ------------------------------------------------------------------------------------


def logprobs(**lists: Any) -> Answer:
    return lambda body: {"choices": [{"logprobs": lists}]}


def record(**fields: Any) -> Answer:
    return lambda body: {"choices": [{"logprobs": {"content": [fields]}}]}


HOSTILE: dict[str, tuple[Any, str]] = {
    "not JSON": (b"<html>", "is not JSON"),
    "a list": (b"[1]", "must be a JSON object"),
    "deep": (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
    "no choices": (lambda body: {}, "no choices[0].logprobs"),
    "no logprobs": (lambda body: {"choices": [{"logprobs": None}]}, "logprobs is None"),
    "choices is a number": (lambda body: {"choices": 3}, "no choices[0].logprobs"),
    "lists of other lengths": (logprobs(tokens=["a"], token_logprobs=[], top_logprobs=[]), "1, 0 and 0 tokens"),
    "lists lack": (logprobs(tokens=["a"]), "lacks tokens"),
    "NaN": (record(id=5, token="a", logprob=float("nan")), "probability nan"),
    "above 0": (record(id=5, token="a", logprob=0.5), "probability 0.5"),
    "infinite": (record(id=5, token="a", logprob=float("inf")), "probability inf"),
    "a text for a number": (record(id=5, token="a", logprob="-1"), "probability '-1'"),
    "a truth for a number": (record(id=5, token="a", logprob=False), "probability False"),
    "a huge whole number": (record(id=5, token="a", logprob=10**400), "log probability 1000"),
    "no number": (record(id=5, token="a"), "must have a token and a logprob"),
    "an id beyond the vocabulary": (record(id=97, token="a", logprob=-1), "the model has 97 tokens"),
    "a negative id": (record(id=-1, token="a", logprob=-1), "the token -1"),
    "a list for a word": (record(token=[5], logprob=-1), "the word [5]"),
    "a truth for a word": (record(token=True, logprob=-1), "the word True"),
    "words without a tokenizer": (record(token="a", logprob=-1), "no tokenizer"),
    "top_logprobs is a number": (logprobs(tokens=["a"], token_logprobs=[-1], top_logprobs=[7]), "top_logprobs has 7"),
    "other tokens are read": (lambda body: {"usage": {"prompt_tokens": 3}}, "read 3 tokens instead of 28"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, said = HOSTILE[name]
    with serve(answer) as (url, _):
        assert main(["audit", url]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert (error.count("\n"), error.startswith("refgemma audit: ")) == (1, True)


def test_a_huge_answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgemma.trace.server.ANSWER_LIMIT", 10**5)
    with serve(b" " * 2 * 10**5) as (url, _):
        assert main(["audit", url]) == 2
    assert "more than 100,000 bytes" in capsys.readouterr().err


def test_a_slow_answer(capsys: pytest.CaptureFixture[str]) -> None:
    wait = threading.Event()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        wait.wait(5)
        return {}

    with serve(answer) as (url, _):
        assert main(["audit", url, "--timeout", "0.2"]) == 2
        wait.set()
    assert "timed out" in capsys.readouterr().err


def test_a_redirect_is_refused_and_the_key_stays_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    with serve(vllm(model())) as (other, seen):
        with serve(b"", 307, {"Location": f"{other}/v1/completions"}) as (url, got):
            assert main(["audit", url, "--api-key-env", "KEY_OF_TEST"]) == 2
        assert "redirects to" in capsys.readouterr().err
        assert seen == []
    assert {headers["Authorization"] for _, headers, _ in got} == {f"Bearer {KEY}"}


def test_a_key_in_an_answer_is_not_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    with serve(f"wrong key: {KEY}".encode(), 401) as (url, _):
        assert main(["audit", url, "--api-key-env", "KEY_OF_TEST"]) == 2
    error = capsys.readouterr().err
    assert "status 401" in error
    assert KEY not in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["ftp://127.0.0.1"], "must be an address"), (["http://user:word@127.0.0.1:1"], "must be an address"),
     (["http://[1"], "must be an address"), (["http://127.0.0.1:1"], "cannot be reached"),
     (["http://127.0.0.1:1", "--tokens", "1"], "at least 4"), (["http://127.0.0.1:1", "--timeout", "0"], "--timeout"),
     (["http://127.0.0.1:1", "--api-key-env", "NOT_SET"], "--api-key-env")],
)  # fmt: skip
def test_misuse(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert ("word" in error, error.count("\n")) == (False, 1)
