"""optimum-onnx 0.1.0, Gemma 2: the cap of attention scores is missing in the file. Needs optimum-onnx and torch."""

import tempfile

import numpy as np
import onnxruntime
import torch
import transformers
from optimum.exporters.onnx import main_export

results = {}
for cap in (50.0, 0.01):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, query_pre_attn_scalar=1, attn_logit_softcapping=cap, initializer_range=1.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
        main_export(folder, f"{folder}/onnx", task="text-generation", no_post_process=True, do_validation=False)
        session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")
    ids = np.arange(4, 28)[None]
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(24)[None]}
    results[cap] = session.run(["logits"], {x.name: given[x.name] for x in session.get_inputs()})[0]
print("largest difference between caps of 50 and of 0.01:", abs(results[50.0] - results[0.01]).max())
