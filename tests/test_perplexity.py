"""Compare perplexity with definitions written out here, in pieces and all at once, and test the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import refgemma
import refgemma.generation.perplexity
from refgemma.cli.main import main
from refgemma.cli.output import MISUSE, OK
from refgemma.generation.perplexity import gemma_cpp_bits_per_byte, split_windows, strided_perplexity, token_losses
from refgemma.goldens.released import PUBLISHED, published_figures, published_text
from refgemma.heads import causal_lm_loss
from refgemma.inputs import InputError

TINY = refgemma.load("tiny")
IDS = TINY.tokenizer.encode("Once upon a time there was a king who had three sons, and the youngest was called Hans.")


def all_at_once(ids: list[int]) -> list[float]:
    """Return the losses from the logits of the whole text, one after another."""
    logits = refgemma.forward([ids], TINY.weights, TINY.config).logits[0].astype(np.float64)
    return [math.log(np.exp(row).sum()) - row[token] for row, token in zip(logits[:-1], ids[1:], strict=True)]


@pytest.mark.parametrize("piece", [1, 3, 7, 512])
def test_pieces_and_parts_of_the_vocabulary_make_no_difference(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refgemma.generation.perplexity, "CHUNK_TOKENS", piece)
    monkeypatch.setattr(refgemma.weights.parameters, "HEAD_ROWS", 300)
    # 5e-6 of the largest logit, as asserted of logits everywhere; none is beyond 4 here.
    np.testing.assert_allclose(token_losses(IDS, TINY.weights, TINY.config), all_at_once(IDS), rtol=0, atol=2e-5)


def test_one_window_is_the_exponential_of_the_loss() -> None:
    found = strided_perplexity(IDS, TINY.weights, TINY.config, max_length=512, stride=512)
    run = refgemma.forward([IDS], TINY.weights, TINY.config)
    # The loss is a float32 mean of float32 logarithms there.
    assert math.isclose(found.nats_per_token, causal_lm_loss(run.logits, np.array([IDS])), rel_tol=1e-6)
    assert (found.tokens, found.windows) == (len(IDS) - 1, 1)
    assert math.isclose(found.perplexity, math.exp(found.nats_per_token), rel_tol=1e-12)


def test_every_token_is_judged_once() -> None:
    for tokens, length, stride in ((10, 4, 4), (10, 4, 1), (11, 5, 3), (3, 8, 2), (5, 4, 4)):
        parts = list(split_windows(tokens, length, stride))
        judged = [n for part in parts for n in range(part.stop - part.targets, part.stop)]
        assert judged == list(range(tokens))
        assert all(part.stop - part.start <= length for part in parts)


def test_gemma_cpp_formula() -> None:
    text = published_text("jingle-bells")
    ids = TINY.tokenizer.encode(text)
    assert ids[0] == 2
    bits = math.log2(TINY.config.vocab_size) + sum(min(loss, 64.0) for loss in all_at_once(ids)) / math.log(2)
    found = gemma_cpp_bits_per_byte(ids, len(text.encode()), TINY.weights, TINY.config)
    assert math.isclose(found, bits / len(text.encode()), rel_tol=1e-5)  # float32 logits summed in another order


def test_no_token_counts_for_more_than_64_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refgemma.generation.perplexity, "token_losses", lambda *_: np.array([1.0, 1e9]))
    expected = (math.log(2048) + 1 + 64) / math.log(2) / 10
    assert math.isclose(gemma_cpp_bits_per_byte([2, 3, 4], 10, TINY.weights, TINY.config), expected, rel_tol=1e-12)


def test_numbers_that_cannot_be() -> None:
    for length, stride in ((1, 1), (8, 0), (8, 9)):
        with pytest.raises(InputError, match="max_length"):
            strided_perplexity(IDS, TINY.weights, TINY.config, length, stride)
    with pytest.raises(InputError, match="give a longer text"):
        strided_perplexity([2], TINY.weights, TINY.config, 8, 8)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a king.", encoding="utf-8")
    assert main(["perplexity", str(file), "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["published_gemma_cpp_bits_per_byte"] == {}
    assert found["transformers"]["perplexity"] < 100 < 1e6
    for name in PUBLISHED:
        assert main(["perplexity", "--published", name]) == OK
        printed = capsys.readouterr().out
        assert all(f"{figure:.2f} published" in printed for figure in published_figures(published_text(name)).values())


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    for arguments, reason in (
        ([str(junk)], "is not UTF-8 text (byte 0)"),
        ([str(tmp_path / "empty")], "give a longer text"),
        ([str(tmp_path / "none")], "No such file"),
        ([str(tmp_path)], "Is a directory"),
        ([], "either a FILE or --published"),
        (["--published", "hungary", "--stride", "0"], "max_length"),
    ):
        assert main(["perplexity", *arguments]) == MISUSE
        captured = capsys.readouterr()
        assert reason in captured.err
        assert captured.err.count("\n") == 1
