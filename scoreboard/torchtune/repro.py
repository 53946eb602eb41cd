"""torchtune 0.6.1, Gemma 2: four mistakes. Needs torch, torchao and torchtune only; takes seconds on a CPU."""

import torch
from torchtune.models import gemma2 as presets
from torchtune.models.gemma2 import _component_builders, _convert_weights, _model_builders

# 1. The converter exchanges the two norms around the feed-forward: mlp_norm is the one before it.
names = _convert_weights._GEMMA2_FROM_HF
print("1.", names["model.layers.{}.pre_feedforward_layernorm.weight"], "should be layers.{}.mlp_norm.scale")

# 2. The presets exchange the caps: the release has 50 for attention scores and 30 for logits.
_model_builders.gemma2 = lambda **sizes: sizes
print("2.", {name: x for name, x in presets.gemma2_2b().items() if "capping" in name})

# 3. The final cap bends the last norm, not the logits: they may exceed it.
torch.manual_seed(0)
sizes = {"vocab_size": 64, "num_layers": 2, "num_heads": 4, "head_dim": 16, "num_kv_heads": 2, "embed_dim": 32,
         "intermediate_dim": 64, "max_seq_len": 64, "sliding_window_size": 8, "final_capping_value": 30.0}  # fmt: skip
model = _component_builders.gemma2(**sizes).eval()
for weights in model.parameters():
    torch.nn.init.normal_(weights)
ids = torch.randint(4, 64, (1, 24))
with torch.no_grad():
    whole = model(ids)
    print("3. largest logit", whole.abs().max().item(), "should be below 30")
    # 4. With a cache the window of sliding layers starts at the first key of the cache, whatever the token's position.
    model.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=24)
    mask = torch.tril(torch.ones(24, 24, dtype=torch.bool))[None]
    steps = [model(ids[:, n : n + 1], mask=mask[:, n : n + 1], input_pos=torch.tensor([[n]])) for n in range(24)]
error = (torch.cat(steps, 1) - whole).abs().amax((0, 2))
print("4. error at each position, with a window of 8:", [round(x, 3) for x in error.tolist()])
