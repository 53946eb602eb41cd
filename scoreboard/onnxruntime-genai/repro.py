"""onnxruntime-genai 0.18.0, Gemma 2: the builder rounds sqrt(hidden) to two decimals, and 1 + w to bfloat16.

Needs onnxruntime-genai, onnx, torch and transformers; takes seconds on a CPU.
"""

import subprocess
import sys
import tempfile

import onnx
import torch
import transformers

config = transformers.Gemma2Config(
    vocab_size=64, hidden_size=320, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=64,
    num_key_value_heads=2,
)  # fmt: skip
model = transformers.Gemma2ForCausalLM(config).bfloat16()
torch.nn.init.normal_(model.model.norm.weight, std=0.1)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", f"{folder}/out"]
    subprocess.run([*command, "-p", "fp32", "-e", "cpu", "-c", folder], check=True, capture_output=True)
    graph = onnx.load(f"{folder}/out/model.onnx").graph
found = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
scale = next(node.input[1] for node in graph.node if node.name == "/model/embed_tokens/Mul")
print("scale of the embedding:", scale, found.get(scale), "sqrt(320) is", 320**0.5)
norm = next(x for n, x in found.items() if "final_norm" in n)
print("largest error of 1 + w:", abs(norm - (1 + model.model.norm.weight.float()).detach().numpy()).max())
