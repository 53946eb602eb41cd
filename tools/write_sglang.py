"""Write SGLang's tensor dump of a conformance checkpoint, in two tensor-parallel processes, for ``tests/recorded``.

    refgemma conformance -o small --head-dim 8
    python tools/write_sglang.py small SGLANG DIR

SGLANG is the folder of the package sglang 0.5.23 (``pip install --no-deps sglang==0.5.23``). Its dumper writes the
files. SGLang's model needs a GPU, so the model is the one below, which has the modules of SGLang's ``gemma2.py``: fused
projections, split between the processes, and norms that add the residual stream. It computes with PyTorch, in float32.
Needs torch, safetensors and NumPy; does not use refgemma.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

RANKS, DUMPED = 2, [0, 1]
TEXT = ([2, 36, 37], [39], [40])  # the tokens of each pass


class LogitsProcessorOutput:
    def __init__(self, logits):
        self.next_token_logits = logits


class ForwardBatch:
    def __init__(self, input_ids, positions):
        self.input_ids, self.positions = input_ids, positions
        self.seq_lens = torch.tensor([int(positions[-1]) + 1])


def load_dumper(package):
    """Import SGLang's dumper alone: the three classes that it asks for are those above."""
    for name, classes in (
        ("sglang.srt.layers.logits_processor", {"LogitsProcessorOutput": LogitsProcessorOutput}),
        ("sglang.srt.model_executor.forward_batch_info", {"ForwardBatch": ForwardBatch, "PPProxyTensors": type(None)}),
    ):
        sys.modules[name] = types.SimpleNamespace(**classes)
    path = Path(package) / "srt" / "debug_utils" / "tensor_dump_forward_hook.py"
    spec = importlib.util.spec_from_file_location("tensor_dump_forward_hook", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Linear(nn.Module):
    """A projection that returns a pair, as SGLang's do; `reduce` adds the results of the processes."""

    def __init__(self, weight, reduce=False):
        super().__init__()
        self.weight, self.reduce = weight, reduce

    def forward(self, x):
        result = x @ self.weight.T
        if self.reduce:
            dist.all_reduce(result)
        return result, None


class Norm(nn.Module):
    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)
        return normed if residual is None else (normed, total)


class Rotary(nn.Module):
    """One module for all layers, as get_rope returns it."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c["head_dim"]
        self.frequencies = 1 / c["rope_parameters"]["rope_theta"] ** (torch.arange(0, self.head_dim, 2) / self.head_dim)

    def forward(self, positions, *states):
        angles = positions[:, None, None] * self.frequencies
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        rotated = []
        for x in states:
            heads = x.view(len(x), -1, self.head_dim)
            a, b = heads.chunk(2, -1)
            rotated.append((heads * cos + torch.cat([-b, a], -1) * sin).flatten(1))
        return tuple(rotated)


class Attend(nn.Module):
    """RadixAttention: attention of the tokens of a pass to all tokens so far."""

    def __init__(self, c, layer):
        super().__init__()
        self.c, self.kept = c, None
        self.window = c["sliding_window"] if c["layer_types"][layer] == "sliding_attention" else 10**9

    def forward(self, q, k, v, batch):
        d, cap, places = self.c["head_dim"], self.c["attn_logit_softcapping"], batch.positions
        k, v = k.view(len(k), -1, d), v.view(len(v), -1, d)
        if places[0] > 0:
            k, v = torch.cat([self.kept[0], k]), torch.cat([self.kept[1], v])
        self.kept = k, v
        groups = q.shape[1] // d // k.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.view(len(q), -1, d), keys) * self.c["query_pre_attn_scalar"] ** -0.5
        apart = places[:, None] - torch.arange(len(k))
        hidden = (apart < 0) | (apart >= self.window)
        probs = (cap * (scores / cap).tanh()).masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", probs, values).flatten(1)


class Product(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, -1)
        return nn.functional.gelu(gate, approximate="tanh") * up


class Attention(nn.Module):
    def __init__(self, c, layer, split, rotary):
        super().__init__()
        q, k, v = (split(f"self_attn.{name}_proj", 0) for name in "qkv")
        self.sizes = [len(q), len(k), len(v)]
        self.qkv_proj, self.o_proj = Linear(torch.cat([q, k, v])), Linear(split("self_attn.o_proj", 1), True)
        self.rotary_emb, self.attn = rotary, Attend(c, layer)

    def forward(self, x, batch):
        q, k, v = self.qkv_proj(x)[0].split(self.sizes, -1)
        return self.o_proj(self.attn(*self.rotary_emb(batch.positions, q, k), v, batch))[0]


class Mlp(nn.Module):
    def __init__(self, split):
        super().__init__()
        self.gate_up_proj = Linear(torch.cat([split("mlp.gate_proj", 0), split("mlp.up_proj", 0)]))
        self.down_proj, self.act_fn = Linear(split("mlp.down_proj", 1), True), Product()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Layer(nn.Module):
    def __init__(self, c, layer, weights, rotary):
        super().__init__()

        def split(name, axis):
            return weights[f"model.layers.{layer}.{name}.weight"].chunk(RANKS, axis)[dist.get_rank()]

        self.self_attn, self.mlp = Attention(c, layer, split, rotary), Mlp(split)
        for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            name = f"{place}_layernorm"
            setattr(self, name, Norm(weights[f"model.layers.{layer}.{name}.weight"], c["rms_norm_eps"]))

    def forward(self, x, batch, residual):
        x, residual = (self.input_layernorm(x), x) if residual is None else self.input_layernorm(x, residual)
        x = self.post_attention_layernorm(self.self_attn(x, batch))
        x, residual = self.pre_feedforward_layernorm(x, residual)
        return self.post_feedforward_layernorm(self.mlp(x)), residual


class Model(nn.Module):
    def __init__(self, c, weights):
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(weights["model.embed_tokens.weight"])
        rotary = Rotary(c)
        self.layers = nn.ModuleList(Layer(c, n, weights, rotary) for n in range(c["num_hidden_layers"]))
        self.norm = Norm(weights["model.norm.weight"], c["rms_norm_eps"])

    def forward(self, input_ids, positions, batch):
        x, residual = self.embed_tokens(input_ids), None
        x = x * x.shape[-1] ** 0.5
        for layer in self.layers:
            x, residual = layer(x, batch, residual)
        return self.norm(x, residual)[0]


class LogitsProcessor(nn.Module):
    def __init__(self, cap):
        super().__init__()
        self.cap = cap

    def forward(self, hidden, table):
        return LogitsProcessorOutput(self.cap * (hidden[-1:] @ table.weight.T / self.cap).tanh())


class Gemma2ForCausalLM(nn.Module):
    def __init__(self, c, weights):
        super().__init__()
        self.model, self.logits_processor = Model(c, weights), LogitsProcessor(c["final_logit_softcapping"])

    def forward(self, batch):
        hidden = self.model(batch.input_ids, batch.positions, batch)
        return self.logits_processor(hidden, self.model.embed_tokens)


def run(rank, checkpoint, package, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder).resolve()}.rendezvous", rank=rank, world_size=RANKS
    )
    c = json.loads((Path(checkpoint) / "config.json").read_text())
    weights = {name: x.float() for name, x in load_file(Path(checkpoint) / "model.safetensors").items()}
    model = Gemma2ForCausalLM(c, weights)
    load_dumper(package).register_forward_hook_for_model(model, folder, DUMPED, RANKS, rank, 0)
    with torch.no_grad():
        start = 0
        for ids in TEXT:
            model(ForwardBatch(torch.tensor(ids), torch.arange(start, start + len(ids))))
            start += len(ids)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, sys.argv[1:], RANKS)
