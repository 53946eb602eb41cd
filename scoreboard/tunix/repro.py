"""google-tunix 0.1.7, Gemma 2: two mistakes. Needs google-tunix only; takes seconds on a CPU."""

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.generate import utils
from tunix.models.gemma import model as models

# 1. The feed-forward of the 9B is twice as wide as that of the release, which has 14336.
print("1. hidden_dim", models.ModelConfig.gemma2_9b().hidden_dim)

# 2. A row that is padded on the left, as the sampler pads: the window compares positions, which skip the padding, with
# places in the row. So it is shifted by the padding; with more padding than window, a token does not see itself.
config = models.ModelConfig(
    num_layers=2, num_embed=64, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=16, num_kv_heads=2,
    final_logit_softcap=30.0, use_post_attn_norm=True, use_post_ffw_norm=True, attn_logits_soft_cap=50.0,
    sliding_window_size=8, attention_types=(models.AttentionType.LOCAL_SLIDING, models.AttentionType.GLOBAL),
)  # fmt: skip
model = models.Gemma(config, rngs=nnx.Rngs(0))
state = nnx.state(model, nnx.Param)
nnx.update(model, jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.3, state))
ids = jax.random.randint(jax.random.key(1), (1, 24), 4, 64)
for padding in (0, 4, 9):
    row = jnp.concatenate([jnp.zeros((1, padding), int), ids], 1)
    mask = row != 0
    given = utils.build_positions_from_mask(mask), None, utils.make_causal_attn_mask(mask, row.shape[1])
    logits = model(row, *given)[0][:, padding:]
    whole = logits if padding == 0 else whole
    print(f"2. {padding} tokens of padding: largest error of a logit", float(abs(logits - whole).max()))
