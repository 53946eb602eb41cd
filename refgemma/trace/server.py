"""Ask an OpenAI-compatible server for log probabilities, and return them as traces.

Checked on servers that the tests start, among them hostile ones, and on llama-cpp-python's server. An answer is
untrusted: its size and time are limited, a redirect is refused, and each number is checked.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property, partial
from typing import Any, NoReturn

import numpy as np

from refgemma.errors import RefgemmaError
from refgemma.files import parse_object, quote
from refgemma.precision import Array
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.trace.names import LOGPROBS
from refgemma.trace.reader import Entry, TraceFile

ANSWER_LIMIT = 2**26  # bytes
PATH = "/v1/completions"
SEEDS = 8  # attempts to generate a text that does not end early
FINE = 9  # decimals; numbers with more are not rounded decimals
# A log probability is at most 0; servers that round or add in float32 may exceed it by this.
ABOVE = 1e-3
SAME = 0.01  # log probabilities of one place in two answers; a temperature changes them more
LEFT_OUT = -9999.0  # vLLM writes this for minus infinity
Scores = dict[int, dict[int, float]]  # place of a token -> log probabilities of the next token, by id


class ServerError(RefgemmaError):
    """Raised if a server cannot be asked, or if its answer cannot be used."""


class Refusal(ServerError):
    """Raised if a server refuses a request; another form of the request may work."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: the prompt and the key are for the given host only."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, target: str) -> NoReturn:
        """Raise an error that names the target."""
        raise ServerError(f"redirects to {quote(target[:100])}; give that address, if you trust it")


OPENER = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class Server:
    """A server's address, and how to ask it.

    Parameters
    ----------
    url : str
        The address: ``http://HOST:PORT``, with or without ``/v1`` or ``/v1/completions``.
    served : str
        The server's name for the model; by default the first that it lists.
    key : str
        The API key; no message contains it.
    timeout : float
        Seconds for one request.
    """

    url: str
    served: str = ""
    key: str = field(default="", repr=False)
    timeout: float = 60.0

    @cached_property
    def base(self) -> str:
        """The address without the path of the API.

        Raises
        ------
        ServerError
            If the address is not HTTP, or contains a password.
        """
        try:
            parts = urllib.parse.urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host, parts = None, urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not host or parts.username or not self.url.isascii():
            raise ServerError(f"{quote(host or self.url[:100])}: must be an address like http://localhost:8000")
        path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        return f"{parts.scheme}://{parts.netloc}{path}"

    @cached_property
    def name(self) -> str:
        """The server's name for the model."""
        if self.served:
            return self.served
        try:
            models = self.ask("/v1/models")["data"]
            return str(models[0]["id"])
        except (ServerError, LookupError, TypeError):  # the next request shows what is wrong
            return "default"

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, and return the answer; without a `body` it is a GET.

        Raises
        ------
        Refusal
            If the server refuses the request.
        ServerError
            If there is no answer in time, or the answer is too large or not a JSON object.
        """
        said = ""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            if not self.key.isascii() or not self.key.isprintable():
                raise ServerError("the API key has characters that a header cannot have")
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        try:
            return parse_object(self._read(request))
        except urllib.error.HTTPError as error:
            with suppress(OSError, http.client.HTTPException):
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            kind = Refusal if error.code in (400, 422, 500, 501) else ServerError
            raise kind(f"{self.base}{path}: status {error.code}: {quote(self._without_key(said))}") from None
        except urllib.error.URLError as error:
            raise ServerError(f"{self.base}: cannot be reached: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.base}: the connection failed: {str(error) or type(error).__name__}") from None
        except RefgemmaError as error:
            raise ServerError(f"{self.base}{path}: the answer {self._without_key(str(error)[:300])}") from None

    def _read(self, request: urllib.request.Request) -> bytes:
        """Return the bytes of an answer; limit their number and the time."""
        end, parts, size = time.monotonic() + self.timeout, [], 0
        with OPENER.open(request, timeout=self.timeout) as answer:
            while part := answer.read1(2**16):
                parts.append(part)
                size += len(part)
                if size > ANSWER_LIMIT:
                    raise ServerError(f"has more than {ANSWER_LIMIT:,} bytes")
                if time.monotonic() > end:
                    raise ServerError(f"is not complete after {self.timeout:g} s; give more with --timeout")
        return b"".join(parts)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


# --- words and ids ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """The ids of the words in answers.

    A server names a word by its id (``token_id:7``, a number, or ``id`` beside it) or by its text, which needs the
    model's tokenizer. A text of several ids is left out.
    """

    size: int  # of the vocabulary
    tokenizer: Tokenizer | None = None

    @cached_property
    def texts(self) -> dict[str, int]:
        """The id of each text that only one word has."""
        if self.tokenizer is None:
            raise ServerError("the answer names words by their text, and the model's folder has no tokenizer")
        found: dict[str, set[int]] = {}
        for token in range(min(self.size, len(self.tokenizer))):
            for text in {self.tokenizer.decode([token]), self.tokenizer.convert_ids_to_tokens(token)}:
                found.setdefault(text, set()).add(token)
        return {text: ids.pop() for text, ids in found.items() if len(ids) == 1 and text}

    def find(self, word: Any, number: Any = None) -> int | None:
        """Return the id of a word, or None if it is unknown; `number` is its id, if the answer has it."""
        number = word if number is None else number  # mistral.rs writes the id in the place of the word
        if isinstance(number, int) and not isinstance(number, bool):
            token = number
        elif not isinstance(word, str):
            raise ServerError(f"the answer has the word {quote(word)}, which is not a text")
        elif word.startswith("token_id:") and word[9:].isdecimal():
            token = int(word[9:18])
        else:
            return self.texts.get(word)
        if not 0 <= token < self.size:
            raise ServerError(f"the answer has the token {token}; the model has {self.size} tokens")
        return token

    def find_equal(self, record: Mapping[str, Any], found: Mapping[int, float]) -> int | None:
        """Return the only one of the best words that has a record's text and log probability, or None.

        Several words may have one text: each byte of a longer character is written as U+FFFD.
        """
        text, number = record.get("token"), read_number(record["logprob"])
        same = [n for n, x in found.items() if x == number and self.tokenizer and self.tokenizer.decode([n]) == text]
        return same[0] if len(same) == 1 else None


def read_number(value: Any) -> float:
    """Return a log probability; minus infinity means that the server left the word out.

    Raises
    ------
    ServerError
        If the value is not a number, NaN, or above 0.

    Examples
    --------
    >>> read_number(-0.25)
    -0.25
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value <= ABOVE:
        raise ServerError(f"the answer has the log probability {quote(value)}; it must be a number of at most 0")
    return float(value) if value > LEFT_OUT else -math.inf


def read_choice(answer: Mapping[str, Any], words: Words) -> list[tuple[int | None, dict[int, float]]]:
    """Return the tokens of an answer, each with the log probabilities of the words at its place.

    Two forms are known: OpenAI's older one (``tokens``, ``token_logprobs``, ``top_logprobs``), and a list ``content``
    with a record for each token. An unknown token is None.

    Raises
    ------
    ServerError
        If the answer has another form, or no log probabilities.
    """
    try:
        logprobs = answer["choices"][0]["logprobs"]
    except (LookupError, TypeError):
        raise ServerError("the answer has no choices[0].logprobs; start the server with log probabilities") from None
    if not isinstance(logprobs, dict):
        raise ServerError(f"choices[0].logprobs is {quote(logprobs)}; start the server with log probabilities")
    content = logprobs.get("content")
    return [*(_read_records(content, words) if isinstance(content, list) else _read_lists(logprobs, words))]


def _read_records(content: list[Any], words: Words) -> Iterator[tuple[int | None, dict[int, float]]]:
    for record in content:
        if not isinstance(record, dict) or not isinstance(record.get("top_logprobs", []), list):
            raise ServerError(f"logprobs.content has {quote(record)}; it must have a token with top_logprobs")
        found = {}
        for one in (*record.get("top_logprobs", []), record):
            if not isinstance(one, dict) or "logprob" not in one:
                raise ServerError(f"logprobs.content has {quote(one)}; it must have a token and a logprob")
            if (token := words.find(one.get("token"), one.get("id"))) is not None:
                found[token] = read_number(one["logprob"])
        own = words.find(record.get("token"), record.get("id"))
        yield words.find_equal(record, found) if own is None else own, found


def _read_lists(logprobs: Mapping[str, Any], words: Words) -> Iterator[tuple[int | None, dict[int, float]]]:
    lists = [logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs")]
    tokens, own, best = lists
    if not (isinstance(tokens, list) and isinstance(own, list) and isinstance(best, list)):
        raise ServerError("choices[0].logprobs lacks tokens, token_logprobs or top_logprobs")
    if not len(tokens) == len(own) == len(best):
        raise ServerError(f"choices[0].logprobs has {len(tokens)}, {len(own)} and {len(best)} tokens; they must agree")
    for word, number, others in zip(tokens, own, best, strict=True):
        if not isinstance(others, dict | None):
            raise ServerError(f"top_logprobs has {quote(others)}; it must have a log probability for each word")
        given = (others or {}) | ({} if number is None else {word: number})
        pairs = [(words.find(name), read_number(value)) for name, value in given.items()]
        yield words.find(word), {token: value for token, value in pairs if token is not None}


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A form of request that a server may accept or refuse."""

    text: bool = False  # the prompt as a text, not as ids
    echo: bool = False  # with the log probabilities of the prompt
    top: int = 20  # words for each place
    ids: bool = True  # ask for ids instead of words (vLLM)
    bos: bool = False  # a text that begins with <bos>, because the server does not add it


FORMS = [Form(text, echo, top, ids) for echo in (True, False) for top in (20, 5) for text in (False, True)
         for ids in (True, False)]  # fmt: skip


@dataclass(frozen=True)
class Asking:
    """Ask a server for rows of log probabilities, in the first form that it accepts."""

    server: Server
    words: Words
    form: Form
    remarks: tuple[str, ...] = ()

    def complete(
        self, ids: Sequence[int], new: int, seed: int = 0, temperature: float = 1.0
    ) -> list[tuple[int | None, dict[int, float]]]:
        """Return the tokens of an answer to a prompt, each with its log probabilities.

        Raises
        ------
        Refusal
            If the server refuses the request, or reads other tokens.
        """
        form = self.form
        body = {"model": self.server.name, "prompt": self._prompt(ids), "max_tokens": new, "temperature": temperature,
                "top_p": 1.0, "seed": seed, "logprobs": form.top} | ({"echo": True} if form.echo else {}) | (
                {"return_tokens_as_token_ids": True} if form.ids else {})  # fmt: skip
        answer = self.server.ask(PATH, body)
        usage = answer.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(count, int) and count != len(ids):
            raise Refusal(f"{self.server.base}: read {count} tokens instead of {len(ids)}; is the tokenizer another?")
        try:
            return read_choice(answer, self.words)
        except ServerError as error:
            raise ServerError(f"{self.server.base}{PATH}: {error}") from None

    def _prompt(self, ids: Sequence[int]) -> str | list[int]:
        if not self.form.text:
            return [int(n) for n in ids]
        tokenizer = self.words.tokenizer
        text = None if tokenizer is None else to_text(ids, tokenizer)
        if text is None:
            raise Refusal(f"{self.server.base}: does not take token ids, and these tokens cannot be written as a text")
        return f"<bos>{text}" if self.form.bos else text

    def echo(self, ids: Sequence[int]) -> Scores:
        """Return the rows of a prompt from one answer, which repeats the prompt.

        Raises
        ------
        Refusal
            If the answer does not repeat the prompt.
        """
        found = self.complete(ids, 1)
        for skipped in (0, 1):  # llama-cpp-python leaves <bos> out
            rest = ids[skipped:]
            if len(found) >= len(rest) > 0 and all(
                token in (None, int(own)) for (token, _), own in zip(found, rest, strict=False)
            ):
                return {place + skipped - 1: row for place, (_, row) in enumerate(found)
                        if 0 < place + skipped <= len(ids) and row}  # fmt: skip
        raise Refusal(f"{self.server.base}: the answer does not repeat the prompt's {len(ids)} tokens")

    def ask_steps(self, ids: Sequence[int], requests: int) -> Scores:
        """Return rows of a prompt from requests of its first tokens, each for one new token."""
        rows: Scores = {}
        ends = np.unique(np.linspace(1, len(ids), min(requests, len(ids))).astype(int))
        for end in ends.tolist():
            tokenizer = self.words.tokenizer
            if self.form.text and (tokenizer is None or to_text(ids[:end], tokenizer) is None):
                continue
            if found := self.complete(ids[:end], 1):
                rows[end - 1] = found[0][1]
        return rows

    def ask_first(self, ids: Sequence[int]) -> Scores:
        """Return the row of the first token alone, which some servers leave out when they repeat a prompt."""
        try:
            return replace(self, form=replace(self.form, echo=False)).ask_steps(ids[:1], 1)
        except ServerError:
            return {}

    def generate(self, ids: Sequence[int], new: int) -> tuple[list[int], Scores]:
        """Return a prompt with new tokens, and the row from which each new token was drawn.

        The text may end early, or have a word without an id. So several seeds are tried, and the longest text is
        returned. The last try is without chance: then each word is one of the best, which have ids. It counts only if
        the server does not change its log probabilities for it.
        """
        best: tuple[list[int], Scores] = ([*ids], {})
        plain = replace(self, form=replace(self.form, echo=False))
        for seed in range(SEEDS):
            text, rows = plain._continue(ids, new, seed)
            if len(rows) > len(best[1]):
                best = text, rows
            if len(rows) == new:
                return best
        with suppress(ServerError):
            text, rows = plain._continue(ids, new, 0, temperature=0.0)
            if len(rows) > len(best[1]) and _is_same(rows, best[1], len(ids) - 1):
                return text, rows
        return best

    def _continue(self, ids: Sequence[int], new: int, seed: int, temperature: float = 1.0) -> tuple[list[int], Scores]:
        """Return a prompt with new tokens up to one without an id, and the row from which each was drawn."""
        text, rows = [*ids], {}
        for token, row in self.complete(ids, new, seed, temperature)[:new]:  # llama-cpp-python may add more
            rows[len(text) - 1] = row
            if token is None:
                break
            text.append(token)
        return text[: max(rows, default=len(ids)) + 1], rows


def _is_same(one: Scores, other: Scores, place: int) -> bool:
    """Return True if the words that both rows of a place have differ by less than `SAME`."""
    a, b = one.get(place, {}), other.get(place, {})
    both = a.keys() & b.keys()
    return bool(both) and all(abs(a[n] - b[n]) < SAME for n in both)


def to_text(ids: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """Return a text that the tokenizer encodes as `ids`, without <bos>; None if there is none."""
    text = tokenizer.decode([int(n) for n in ids[1:]])
    return text if tokenizer.encode(text) == [int(n) for n in ids] else None


def writable(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return tokens that can be written as a text: leave out words without their own text, and encode the rest again.

    Tokens may merge; so the text is decoded and encoded until it does not change.
    """
    kept = [int(n) for n in ids[1:] if tokenizer.encode(tokenizer.decode([int(n)]))[1:] == [int(n)]]
    found = [int(ids[0]), *kept]
    for _ in range(5):
        again = tokenizer.encode(tokenizer.decode(found[1:]))
        if again == found:
            break
        found = again
    return found


def find_form(
    server: Server, words: Words, ids: Sequence[int], written: Sequence[int] | None = None
) -> tuple[Asking, Scores]:
    """Return the first form of request that a server accepts, and the rows of the prompt if the server repeats it.

    `written` is another prompt for servers that take text only; None means that there is no tokenizer.

    Raises
    ------
    ServerError
        If the server accepts no form; the message is that of the first.
    """
    first: ServerError | None = None
    for form in FORMS:
        prompt = written if form.text else ids
        for bos in (False, True) if form.text else (False,):
            said = "tokens: the server does not put <bos> before a text (missing-bos)"
            asking = Asking(server, words, replace(form, bos=bos), (said,) if bos else ())
            try:
                if prompt is None:
                    raise Refusal(f"{server.base}: takes text only, and the model's folder has no tokenizer")
                if form.echo:
                    return asking, asking.echo(prompt)
                asking.complete(prompt, 1)
                return asking, {}
            except Refusal as error:
                first = first or error
    raise first or ServerError(f"{server.base}: accepts no form of request")


# --- traces -----------------------------------------------------------------------------------------------------------


def make_trace(source: str, ids: Sequence[int], rows: Scores, calls: Sequence[int] = ()) -> TraceFile:
    """Return rows of log probabilities as a trace; a place without a row is not recorded.

    Examples
    --------
    >>> trace = make_trace("server", [2, 3], {1: {5: -0.5, 7: -1.25}})
    >>> trace.entries["logprobs"].shape, trace.entries["logprobs"].coarse
    ((1, 2, 2), 0.01)
    """
    width = max((len(row) for row in rows.values()), default=1)
    tokens = np.full((1, len(ids), width), -1, np.int64)
    numbers = np.full((1, len(ids), width), np.nan, np.float64)
    for place, row in rows.items():
        tokens[0, place, : len(row)] = [*row]
        numbers[0, place, : len(row)] = [*row.values()]
    digits = max((decimals(x) for row in rows.values() for x in row.values()), default=0)
    given = np.array([ids], np.int64)
    entries = {
        "input_ids": Entry("I64", given.shape, partial(_keep, given)),
        "logprob_ids": Entry("I64", tokens.shape, partial(_keep, tokens)),
        LOGPROBS: Entry("F64", numbers.shape, partial(_keep, numbers), None, 10.0**-digits if digits < FINE else 0.0),
    }  # fmt: skip
    return TraceFile(source, {"calls": json.dumps([int(n) for n in calls])} if len(calls) else {}, entries)


def decimals(x: float) -> int:
    """Return the number of decimals of a number.

    Examples
    --------
    >>> decimals(-0.125), decimals(-2.0), decimals(-1e-05)
    (3, 0, 5)
    """
    exponent = Decimal(repr(x)).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _keep(x: Array) -> Array:
    return x
