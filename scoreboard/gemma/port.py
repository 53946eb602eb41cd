"""Google DeepMind's own Gemma 2 in Flax, from the checkpoint that refgemma writes: its intermediates and the logits."""

import dataclasses
import json
from importlib.metadata import version

import jax.numpy as jnp
import numpy as np
from gemma.gm.nn import _config, _gemma, _modules
from glue import main

STEPS = {
    "pre_attention_norm": "input_layernorm", "attn": "attention.out", "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm", "mlp": "feed_forward.out",
    "post_ffw_norm": "post_feedforward_layernorm", None: "out",
}  # fmt: skip


def load(folder, dtype):
    c = json.loads((folder / "config.json").read_text())
    kind = getattr(jnp, dtype)
    tree = {}
    for name, x in np.load(folder / "params.npz").items():
        *path, leaf = name.removesuffix("/w" if "/mlp/" in name else "").split("/")[1:]
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = jnp.array(x, kind)
    # The released sizes have one of three scalars; this model has another.
    _config.TransformerConfig.query_pre_attn_scalar = lambda self: c["query_pre_attn_scalar"] ** -0.5
    local, full = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
    config = dataclasses.replace(
        _gemma.Gemma2_9B.config, num_embed=c["vocab_size"], embed_dim=c["hidden_size"], head_dim=c["head_dim"],
        hidden_dim=c["intermediate_size"], num_heads=c["num_attention_heads"], num_kv_heads=c["num_key_value_heads"],
        final_logit_softcap=c["final_logit_softcapping"], attn_logits_soft_cap=c["attn_logit_softcapping"],
        sliding_window_size=c["sliding_window"], attention_types=(local, full) * (c["num_hidden_layers"] // 2),
    )  # fmt: skip
    return _gemma.Gemma2_9B(config=config, dtype=kind), tree


def run(loaded, case):
    (model, params), (rows, length) = loaded, case.ids.shape
    seen = case.mask.astype(bool)
    positions = np.maximum(seen.cumsum(-1) - 1, 0)
    visible = np.tril(np.ones((length, length), bool)) & seen[:, None]
    cache = None
    if len(case.calls) > 1:
        cache = model.config.init_cache(batch_size=rows, dtype=model.dtype, cache_length=length)
    found = {}
    for prefix, start, end in case.pieces():
        ids = jnp.array(case.ids[:, start:end], jnp.int32)
        given = {"positions": jnp.array(positions[:, start:end]), "attention_mask": jnp.array(visible[:, start:end])}
        result, kept = model.apply(
            {"params": params}, ids, cache=cache, mutable=["intermediates"], capture_intermediates=True, **given
        )
        cache = result.cache
        kept = kept["intermediates"]
        for n in range(model.config.num_layers):
            for theirs, ours in STEPS.items():
                at = kept[f"layer_{n}"] if theirs is None else kept[f"layer_{n}"][theirs]
                x = at["__call__"][-1]  # the einsums of a module share its name; its own result is the last
                found[f"{prefix}layers.{n}.{ours}"] = (x[1] if isinstance(x, tuple) else x).astype(jnp.float32)
        found |= {f"{prefix}norm": kept["final_norm"]["__call__"][0].astype(jnp.float32)}
        found |= {f"{prefix}logits": result.logits.astype(jnp.float32)}
    return found


if __name__ == "__main__":
    main(load, run, engine=f"gemma {version('gemma')}, jax {version('jax')}")
