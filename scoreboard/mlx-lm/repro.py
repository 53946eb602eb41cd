"""mlx-lm 0.32.2, Gemma 2: no layer slides. Needs mlx and mlx-lm only; takes seconds on a CPU."""

import mlx.core as mx
from mlx_lm.models import gemma2

mx.set_default_device(mx.cpu)
args = gemma2.ModelArgs(
    model_type="gemma2", hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=4, head_dim=16,
    rms_norm_eps=1e-6, vocab_size=64, num_key_value_heads=2,
)  # fmt: skip
print("fields about a window:", [name for name in vars(args) if "window" in name or "sliding" in name])
model = gemma2.Model(args)
ids = mx.random.randint(4, 64, (1, 5000))
other = mx.concatenate([mx.array([[5]]), ids[:, 1:]], axis=1)
# The only layer slides in the release: the last of 5000 tokens must not depend on the first.
print("the last logits depend on the first token:", mx.abs(model(ids)[0, -1] - model(other)[0, -1]).max().item() > 0)
