"""Compare conformance checkpoints of other sizes with transformers: tokenizer, logits and greedy text."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import refgemma
from refgemma.generation.greedy import greedy
from refgemma.model import forward
from refgemma.weights.conformance import proportions, write_conformance

TEXTS = ("Once upon a time", "na\u00efve \N{SLIGHTLY SMILING FACE}\n  end", "<start_of_turn>user\nHi<end_of_turn>")


@pytest.mark.parametrize("head_dim", [16, 64])
def test_transformers_loads_the_folder(head_dim: int, tmp_path: Path) -> None:
    write_conformance(tmp_path, proportions(head_dim))
    ours, tokenizer = refgemma.load(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ours.tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == ours.tokenizer.decode(ids)
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits.numpy()
        # The logits are at most 2, the cap; 5e-6 of that is the tolerance of a whole run (docs/reference/verdicts.md).
        np.testing.assert_allclose(forward([ids], ours.weights, ours.config).logits, logits, atol=1e-5, rtol=0)
        new = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        stop = (ours.config.eos_token_id,)
        assert list(greedy(ids, ours.weights, ours.config, max_new_tokens=24, stop_ids=stop)) == new
        assert len(set(new)) > 2  # text that shows something
