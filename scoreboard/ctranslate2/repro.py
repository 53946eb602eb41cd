"""ctranslate2 4.8.5, Gemma 2: neither cap changes anything. Needs ctranslate2, torch and transformers."""

import tempfile

import ctranslate2
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<{n}>" for n in range(4, 64))]
tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
results = {}
for cap in (50.0, 0.01):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, attn_logit_softcapping=cap, final_logit_softcapping=cap,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        target = ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}/converted")
        model = ctranslate2.Generator(target, device="cpu", compute_type="float32")
        results[cap] = np.array(model.forward_batch([list(range(4, 28))], return_log_probs=False))
print("largest difference between caps of 50 and of 0.01:", abs(results[50.0] - results[0.01]).max())
