"""Test streamers: their input, and the text that this package's streamer prints."""

import io
import queue
import sys
from typing import Any

import numpy as np
import pytest
from small_model import NO_END, SMALL, refused

import refgemma
from refgemma.generation.stream import TextIteratorStreamer, TextStreamer
from refgemma.inputs import InputError

TINY = refgemma.load("tiny")
PROMPT = TINY.tokenizer.encode("Once upon a time")
MODEL = refgemma.Gemma2ForCausalLM.from_pretrained("tiny")


def test_a_streamer_prints_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    ids = MODEL.generate([PROMPT], max_new_tokens=9, streamer=TextStreamer(TINY.tokenizer))
    assert capsys.readouterr().out == TINY.tokenizer.decode(ids[0]) + "\n"
    streamer = TextStreamer(TINY.tokenizer, skip_special_tokens=True)
    MODEL.generate([PROMPT], max_new_tokens=9, streamer=streamer)
    assert capsys.readouterr().out == TINY.tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    with pytest.raises(InputError, match="TextStreamer got 2 texts, but prints only one; generate one text at a time"):
        MODEL.generate([PROMPT, PROMPT], max_new_tokens=9, streamer=TextStreamer(TINY.tokenizer))


class Screen(io.StringIO):
    """A stream that counts how often it is flushed."""

    shown = 0

    def flush(self) -> None:
        self.shown += 1


def test_a_text_streamer_prints_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = refgemma.AutoTokenizer.from_pretrained("tiny")
    ids = np.array(tokenizer.encode("The king, the queen"))

    def printed(streamer: TextStreamer, *calls: Any) -> Screen:
        screen = Screen()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            for call in calls:
                streamer.end() if call is None else streamer.put(call)
        return screen

    words = "<bos>The king, the queen"
    screen = printed(TextStreamer(tokenizer), ids[None, :3], ids[3:4], *ids[4:, None], None)
    assert screen.getvalue() == words + "\n"
    assert screen.shown == 3 + len(ids) - 4  # after each call
    assert printed(TextStreamer(tokenizer, skip_special_tokens=True), ids, None).getvalue() == words[5:] + "\n"
    # The prompt is skipped, of each text anew.
    skipping = TextStreamer(tokenizer, skip_prompt=True)
    twice = printed(skipping, ids[:3], ids[3:], None, ids[:3], ids[3:], None).getvalue()
    assert twice == 2 * ", the queen\n"
    refused(
        lambda: TextStreamer(tokenizer).put(ids[None].repeat(2, 0)),
        "TextStreamer got 2 texts, but prints only one; generate one text at a time",
    )
    assert printed(TextStreamer(tokenizer), ids[None, :1], ids[1:], None).getvalue() == words + "\n"
    # Bytes are kept back until their run is over: at a piece, a special token, or the end. What is no character then is
    # a replacement character for each byte, as transformers' byte fallback has it.
    face = np.array(tokenizer.encode("\U0001f642", add_special_tokens=False))
    end = np.array([tokenizer.convert_tokens_to_ids("<end_of_turn>")])
    assert printed(TextStreamer(tokenizer), face[:2]).getvalue() == ""
    assert printed(TextStreamer(tokenizer), face[:2], face[2:], None).getvalue() == "\U0001f642\n"
    assert printed(TextStreamer(tokenizer), face[:2], None).getvalue() == "\ufffd\ufffd\n"
    assert printed(TextStreamer(tokenizer), face[:2], end).getvalue() == "\ufffd\ufffd<end_of_turn>"


class Listener:
    """A streamer that records its input."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Any) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_a_streamer_is_given_the_prompt_then_each_token_then_the_end() -> None:
    listener = Listener()
    found = SMALL.generate([[3, 4], [6, 7]], streamer=listener, max_new_tokens=2, **NO_END)
    assert listener.heard == [[[3, 4], [6, 7]], found[:, 2].tolist(), found[:, 3].tolist(), "end"]
    refused(
        lambda: SMALL.generate([[3, 4]], streamer=listener, num_beams=2),
        "a streamer cannot show a beam search, because its tokens may change until the end; set num_beams=1",
    )


def test_a_subclass_does_something_else_with_the_text() -> None:
    class Kept(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            kept.append((text, stream_end))

    kept: list[tuple[str, bool]] = []
    streamer = Kept(TINY.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    MODEL.generate([PROMPT], max_new_tokens=2, streamer=streamer)
    assert [end for _, end in kept] == [False, False, True]
    assert "".join(text for text, _ in kept) == TINY.tokenizer.decode(MODEL.generate([PROMPT], max_new_tokens=2)[0, 7:])
    refused(
        lambda: TextIteratorStreamer(TINY.tokenizer, skip_specials=True),
        "TextIteratorStreamer has no argument 'skip_specials'; use skip_special_tokens",
    )


def test_text_is_waited_for_no_longer_than_the_timeout() -> None:
    streamer = TextIteratorStreamer(TINY.tokenizer, timeout=0.01)
    with pytest.raises(queue.Empty):
        next(streamer)
    streamer.put(np.array([[300]]))
    streamer.end()
    assert list(streamer) == [TINY.tokenizer.decode([300]), ""]
