"""easydel 0.3.0, Gemma 2: attention scores are not capped. Needs easydel, pillow and torch."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
import easydel as ed
import jax
import jax.numpy as jnp
from flax import nnx

ids = jax.random.randint(jax.random.key(1), (1, 24), 4, 64)
results = {}
for cap in (None, 50.0, 0.001):
    config = ed.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, attn_logit_softcapping=cap,
        attn_mechanism=ed.AttentionMechanisms.VANILLA,
    )  # fmt: skip
    model = ed.Gemma2ForCausalLM(config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    with model.mesh:
        results[cap] = model(input_ids=ids, attention_mask=jnp.ones_like(ids)).logits
for cap in (50.0, 0.001):
    print(f"cap {cap}: largest difference from no cap", float(abs(results[cap] - results[None]).max()))
