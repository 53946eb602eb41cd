"""Tunix's Gemma 2, by its own loader: the steps of its blocks, and the logits."""

import json
from importlib.metadata import version

import jax.numpy as jnp
from glue import main
from tunix.generate import utils
from tunix.models.gemma import model as models
from tunix.models.gemma.params_safetensors import create_model_from_safe_tensors

STEPS = ("input_layernorm", "attention.out", "post_attention_layernorm", "pre_feedforward_layernorm",
         "feed_forward.out", "post_feedforward_layernorm", "out")  # fmt: skip
RESULTS = []


def watch(kind):
    usual = kind.__call__

    def call(*given, **named):
        result = usual(*given, **named)
        RESULTS.append(result[1] if isinstance(result, tuple) else result)
        return result

    kind.__call__ = call


def load(folder, dtype):
    c = json.loads((folder / "config.json").read_text())
    local, full = models.AttentionType.LOCAL_SLIDING, models.AttentionType.GLOBAL
    config = models.ModelConfig(
        num_layers=c["num_hidden_layers"], num_embed=c["vocab_size"], embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"], num_heads=c["num_attention_heads"], head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"], final_logit_softcap=c["final_logit_softcapping"],
        attention_types=(local, full) * (c["num_hidden_layers"] // 2),
        use_post_attn_norm=True, use_post_ffw_norm=True, attn_logits_soft_cap=c["attn_logit_softcapping"],
        sliding_window_size=c["sliding_window"],
    )  # fmt: skip
    for kind in (models.RMSNorm, models.Attention, models.FeedForward, models.DecoderLayer):
        watch(kind)
    return create_model_from_safe_tensors(str(folder), config, dtype=getattr(jnp, dtype))


def run(model, case):
    rows, length = case.ids.shape
    mask = jnp.array(case.mask, bool)
    positions = utils.build_positions_from_mask(mask)  # these two as in its sampler
    visible = utils.make_causal_attn_mask(mask, length)
    cache = model.init_cache(rows, length, model.embedder.input_embedding.value.dtype) if len(case.calls) > 1 else None
    names = [f"layers.{n}.{step}" for n in range(len(model.layers)) for step in STEPS] + ["norm"]
    found = {}
    for prefix, start, end in case.pieces():
        RESULTS.clear()
        given = jnp.array(case.ids[:, start:end]), positions[:, start:end], cache, visible[:, start:end]
        logits, cache = model(*given)
        found |= {prefix + name: x.astype(jnp.float32) for name, x in zip(names, RESULTS, strict=True)}
        found[f"{prefix}logits"] = logits.astype(jnp.float32)
    return found


main(load, run, engine=f"google-tunix {version('google-tunix')}, jax {version('jax')}")
