"""litgpt 0.5.13, Gemma 2: two mistakes. Needs torch and litgpt only; takes seconds on a CPU."""

import torch
from litgpt import GPT, Config

# 1. The presets of Gemma 2 have the epsilon of Llama; the release has 1e-6.
print("1.", {size: Config.from_name(f"Gemma-2-{size}").norm_eps for size in ("2b", "9b", "27b")})

# 2. With a cap, the boolean mask of the cache is added to the scores: it adds 1 to the allowed ones, and masks nothing.
torch.manual_seed(0)
config = Config.from_name("Gemma-2-2b", n_layer=2, n_embd=32, n_head=4, n_query_groups=2, head_size=16, vocab_size=64,
                          padded_vocab_size=64, intermediate_size=64, block_size=64)  # fmt: skip
config.sliding_window_indices = [1, 0]
model = GPT(config).eval()
for weights in model.parameters():
    torch.nn.init.normal_(weights)
ids = torch.randint(4, 64, (1, 12))
with torch.no_grad():
    whole = model(ids)
    model.max_seq_length = 12
    model.set_kv_cache(1)
    cached = model(ids, torch.arange(12), 12)
print("2. error of one call with the cache:", (cached - whole).abs().amax((0, 2)).tolist())
