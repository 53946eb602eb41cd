"""penzai 0.2.5, Gemma 2 in float16: a row with padding on the left is NaN throughout. Needs penzai; takes seconds."""

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM
from penzai.models.transformer.variants import llamalike_common as common

for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    config = common.LlamalikeTransformerConfig(
        num_kv_heads=2, query_head_multiplier=2, embedding_dim=32, projection_dim=16, mlp_hidden_dim=64,
        num_decoder_blocks=2, vocab_size=64, mlp_variant="geglu_approx", tie_embedder_and_logits=True,
        rope_wavelength=10_000, parameter_dtype=dtype, activation_dtype=dtype, use_post_attn_norm=True,
        use_post_ffw_norm=True, final_logit_softcap=30.0, attn_logits_soft_cap=50.0,
    )  # fmt: skip
    model = common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0), name="transformer")
    model = KVCachingTransformerLM.from_uncached(model, cache_len=12, batch_axes={"batch": 2})
    ids = jax.random.randint(jax.random.key(1), (2, 12), 4, 64).at[1, :3].set(0)  # 0 is padding
    logits = model(pz.nx.wrap(ids).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")
    print(dtype.__name__, "NaN in each row:", jnp.isnan(logits).any((1, 2)).tolist(), "of 12 tokens:",
          jnp.isnan(logits).any(2).sum(1).tolist())  # fmt: skip
