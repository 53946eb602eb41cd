"""Penzai's Gemma 2, from the Flax checkpoint that refgemma writes: the logits, with and without a cache."""

import json
from importlib.metadata import version

import jax.numpy as jnp
import numpy as np
from glue import main
from penzai import pz
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM
from penzai.models.transformer.variants import gemma
from penzai.models.transformer.variants import llamalike_common as common


def load(folder, dtype):
    c = json.loads((folder / "config.json").read_text())
    tree = {}
    for name, x in np.load(folder / "params.npz").items():
        module, _, leaf = name.rpartition("/")
        tree.setdefault(module, {})[leaf] = jnp.array(x, getattr(jnp, dtype))
    window, every = common.AttentionTypeSlidingWindowCausal(c["sliding_window"]), common.AttentionTypeGlobalCausal()
    gemma._GEMMA_PRESETS["gemma2_9b"] = {
        "num_decoder_blocks": c["num_hidden_layers"], "vocab_size": c["vocab_size"],
        "num_kv_heads": c["num_key_value_heads"], "embedding_dim": c["hidden_size"], "projection_dim": c["head_dim"],
        "query_head_multiplier": c["num_attention_heads"] // c["num_key_value_heads"],
        "mlp_hidden_dim": c["intermediate_size"], "query_scaling_factor": c["query_pre_attn_scalar"] ** -0.5,
        "attention_type": (window, every), "use_post_attn_norm": True, "use_post_ffw_norm": True,
        "final_logit_softcap": c["final_logit_softcapping"], "attn_logits_soft_cap": c["attn_logit_softcapping"],
    }  # fmt: skip
    return gemma.gemma_from_pretrained_checkpoint(tree, preset_name="gemma2_9b")


def run(model, case):
    if len(case.calls) > 1 or case.padded:
        rows, length = case.ids.shape
        model = KVCachingTransformerLM.from_uncached(model, cache_len=length, batch_axes={"batch": rows})
    found = {}
    for prefix, start, end in case.pieces():
        ids = pz.nx.wrap(jnp.array(case.ids[:, start:end])).tag("batch", "seq")
        given = {} if isinstance(model, KVCachingTransformerLM) else {"token_positions": pz.nx.arange("seq", end)}
        found[f"{prefix}logits"] = model(ids, **given).unwrap("batch", "seq", "vocabulary").astype(jnp.float32)
    return found


main(load, run, engine=f"penzai {version('penzai')}, jax {version('jax')}")
