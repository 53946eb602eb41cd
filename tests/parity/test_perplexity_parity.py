"""Compare perplexity with transformers: the program on its page on perplexity, written again from the description."""

import math

import pytest
import torch
from transformers import Gemma2ForCausalLM

import refgemma
from refgemma.generation.perplexity import strided_perplexity
from refgemma.goldens.released import published_text
from refgemma.hub import find_model


def with_transformers(ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """Set labels to -100 if an earlier window scored them; weight each loss by the number of labels minus one."""
    model = Gemma2ForCausalLM.from_pretrained(find_model("tiny"), dtype=torch.float32, attn_implementation="eager")
    total, count, judged = 0.0, 0, 0
    for start in range(0, ids.shape[1], stride):
        stop = min(start + max_length, ids.shape[1])
        labels = ids[:, start:stop].clone()
        labels[:, : -(stop - judged)] = -100
        with torch.no_grad():
            loss = model(ids[:, start:stop], labels=labels).loss
        weight = int((labels != -100).sum()) - labels.shape[0]
        total, count, judged = total + float(loss) * weight, count + weight, stop
        if stop == ids.shape[1]:
            break
    return math.exp(total / count), count


@pytest.mark.parametrize(("max_length", "stride"), [(320, 320), (100, 40), (64, 63), (50, 50)])
def test_the_page(max_length: int, stride: int) -> None:
    tiny = refgemma.load("tiny")
    ids = tiny.tokenizer.encode(published_text("gettysburg"))[:300]
    expected, count = with_transformers(torch.tensor([ids]), max_length, stride)
    found = strided_perplexity(ids, tiny.weights, tiny.config, max_length, stride)
    assert found.tokens == count
    # 5e-6 of the largest logit (30) in each loss, as asserted of logits, and exp carries that over.
    assert math.isclose(found.perplexity, expected, rel_tol=1.5e-4)
