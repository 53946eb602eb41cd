"""transformers 4.57.6, Gemma 2: the default attention has no cap. Needs torch and transformers; takes seconds."""

import torch
import transformers

torch.manual_seed(0)
config = transformers.Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, query_pre_attn_scalar=1, attn_logit_softcapping=1.0,
)  # fmt: skip
model = transformers.Gemma2ForCausalLM(config).eval()
for weights in model.parameters():
    torch.nn.init.normal_(weights)
print("default attention:", model.config._attn_implementation)
ids = torch.randint(4, 64, (1, 24))
with torch.no_grad():
    default = model(ids).logits
    model.set_attn_implementation("eager")
    eager = model(ids).logits
print("largest difference from eager attention:", (default - eager).abs().max().item())
