"""Levanter's Gemma 2, by its own loader: the logits."""

import json
import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from glue import main
from levanter.models.gemma import Gemma2Config
from transformers import Gemma2Config as Theirs


def load(folder, dtype):
    config = Gemma2Config.from_hf_config(Theirs.from_pretrained(folder))
    vocab = hax.Axis("vocab", json.loads((folder / "config.json").read_text())["vocab_size"])
    converter = config.hf_checkpoint_converter(ref_checkpoint=str(folder))
    model = converter.load_pretrained(config.model_type, ref=str(folder), config=config, dtype=getattr(jnp, dtype))
    return eqx.nn.inference_mode(model, True), config, vocab


def run(model, case):
    from levanter.layers.attention import AttentionMask

    case.only()
    model, config, _ = model
    batch, position = hax.Axis("batch", 1), config.max_Pos.resize(case.ids.shape[1])
    with jax.default_matmul_precision("highest"):
        logits = model(hax.named(jnp.array(case.ids), (batch, position)), attn_mask=AttentionMask.causal())
    return {"logits": logits.rearrange((batch, position, logits.axes[-1])).array.astype(jnp.float32)}


main(load, run, engine=f"levanter {version('levanter')}, jax {version('jax')}")
