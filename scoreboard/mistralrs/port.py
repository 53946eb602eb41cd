"""mistral.rs by its Python package: log probabilities after each prefix of a prompt.

The package takes only texts. So here each token is one character, by a tokenizer that this program writes.
"""

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from glue import NotRun, main
from serve import complete
from serve import load as start

FIRST = 0x4E00  # the character of token 0; the next ones follow


def load(folder, dtype, cache=""):
    if cache:
        os.environ["MISTRALRS_CPU_KV_F32"] = "1"
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    # Its grammars need a decoder of a known kind, although nothing is decoded here.
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": steps},
        "model": {"type": "WordLevel", "vocab": {chr(FIRST + n): n for n in range(words)}, "unk_token": chr(FIRST)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "tokenizer.json")
        path.write_text(json.dumps(tokenizer))
        kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
        return start(folder, kind, tokenizer_json=str(path)), words


def run(loaded, case):
    runner, words = loaded
    if case.padded:
        raise NotRun("no attention mask for padding")
    if len(case.calls) > 1:
        raise NotRun("it draws the tokens of later calls itself")
    rows = np.full((1, case.ids.shape[1], words), np.nan, np.float32)
    for end in range(1, case.ids.shape[1] + 1):
        answer = complete(runner, "".join(chr(FIRST + n) for n in case.ids[0, :end].tolist()), words)
        if answer.usage.prompt_tokens != end:
            raise RuntimeError(f"read {answer.usage.prompt_tokens} tokens instead of {end}")
        for one in answer.choices[0].logprobs.content[0].top_logprobs:
            rows[0, end - 1, one.token] = one.logprob
    return {"logprobs": rows}


if __name__ == "__main__":
    main(load, run, engine=f"mistralrs {version('mistralrs')}")
