"""Write one HTML page that runs the tiny model: a port of Gemma 2 in JavaScript, with the weights.

The page works offline in any browser; ``gemma2.js`` computes and ``live.html`` displays. It can write a trace.
``tests/browser/test_live_page.py`` judges traces with ``refgemma check``: the page conforms, and each bug that it can
switch on is named.
"""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from refgemma.hub import find_model
from refgemma.oracle.known_bugs import KNOWN_BUGS

HERE = Path(__file__).parent
FIRST_TEXT = "There was once a little princess who lived in a great castle by the sea."  # shown when the page opens

# The owners of the projects in which the page's bugs were seen, by the names in the table of known bugs.
OWNERS = {
    "Liger-Kernel": "linkedin", "ferrox": "antonellof", "levanter": "marin-community", "llama.cpp": "ggml-org",
    "ml-cross-entropy": "apple", "onnx": "onnx", "transformers": "huggingface", "vllm": "vllm-project",
}  # fmt: skip


def link_source(source: str) -> tuple[str, str]:
    """Return where a bug was seen, with the address of the issue, or an empty text if the owner is not listed.

    Examples
    --------
    >>> link_source("vllm #5908")
    ('vllm #5908', 'https://github.com/vllm-project/vllm/issues/5908')
    >>> link_source("TransformerLens")
    ('TransformerLens', '')
    """
    found = re.fullmatch(r"(\S+)( before)? #(\d+).*", source)
    owner = OWNERS.get(found[1]) if found else None
    return source, f"https://github.com/{owner}/{found[1]}/issues/{found[3]}" if found and owner else ""


def describe_bugs(port: str) -> dict[str, dict[str, Any]]:
    """Return the description, the inputs and the sources of each known bug that `port` makes.

    Examples
    --------
    >>> describe_bugs('"embed-scale-missing": [')["embed-scale-missing"]["says"]
    'embeddings are not scaled'
    """
    made = [bug for bug in KNOWN_BUGS if f'"{bug.name}": [' in port]
    sources = {bug.name: [] if bug.seen.startswith("unverified") else bug.seen.split(", ") for bug in made}
    return {b.name: {"says": b.says, "shows": b.shows, "seen": [*map(link_source, sources[b.name])]} for b in made}


def token_scores() -> tuple[list[str], list[float | None]]:
    """Return every token of the tiny model with its score, or None for a token that is not merged from characters.

    Examples
    --------
    >>> pieces, scores = token_scores()
    >>> pieces[2], scores[2], pieces[276], scores[276] is None
    ('<bos>', None, '▁a', False)
    """
    inside = SentencePieceProcessor(str(find_model("tiny") / "tokenizer.model"))
    ids = range(inside.get_piece_size())
    pieces = [str(inside.id_to_piece(n)) for n in ids]
    special = [inside.is_control(n) or inside.is_byte(n) or pieces[n] in ("<unk>", "<mask>") for n in ids]
    return pieces, [None if special[n] else float(inside.get_score(n)) for n in ids]


def render_live(text: str = FIRST_TEXT) -> str:
    """Return the page, which opens with `text`.

    Examples
    --------
    >>> page = render_live("A <b>king</b>")
    >>> "A &lt;b&gt;king&lt;/b&gt;</textarea>" in page, "@PORT@" in page
    (True, False)
    """
    folder = find_model("tiny")
    pieces, scores = token_scores()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    port = (HERE / "gemma2.js").read_text("utf-8")
    about = json.dumps({"config": config, "pieces": pieces, "scores": scores, "bugs": describe_bugs(port)})
    weights = base64.b64encode((folder / "model.safetensors").read_bytes()).decode()
    page = (HERE / "live.html").read_text("utf-8").replace("@TEXT@", html.escape(text), 1)
    parts = {"@PORT@": port, "@MODEL@": about.replace("<", "\\u003c"), "@WEIGHTS@": weights}
    for place, content in parts.items():
        page = page.replace(place, content, 1)
    return page
