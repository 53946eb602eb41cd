"""torchtune's Gemma 2: the outputs of its modules, and the logits. Its own converter reads the folder."""

import json
from importlib.metadata import version

import torch
from glue import Watch, main
from safetensors.torch import load_file
from torchtune.models.gemma2._component_builders import gemma2
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune


def load(folder, dtype, which):
    c = json.loads((folder / "config.json").read_text())
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    weights = load_file(folder / "model.safetensors")
    weights = gemma2_hf_to_tune(weights, heads, kv_heads, c["hidden_size"], c["head_dim"])
    torch.set_default_dtype(getattr(torch, dtype))
    model = gemma2(
        vocab_size=c["vocab_size"], num_layers=c["num_hidden_layers"], num_heads=heads, head_dim=c["head_dim"],
        num_kv_heads=kv_heads, embed_dim=c["hidden_size"], intermediate_dim=c["intermediate_size"],
        max_seq_len=c["max_position_embeddings"], norm_eps=c["rms_norm_eps"],
        hidden_capping_value=c["attn_logit_softcapping"], final_capping_value=c["final_logit_softcapping"],
        sliding_window_size=c["sliding_window"], query_pre_attn_scalar=c["query_pre_attn_scalar"],
    ).eval()  # fmt: skip
    if which == "repaired":  # to judge all else: the two norms in their places, the cap on the logits
        for n in range(c["num_hidden_layers"]):
            a, b = f"layers.{n}.mlp_norm.scale", f"layers.{n}.mlp_scale.scale"
            weights[a], weights[b] = weights[b], weights[a]
        model.norm.logit_capping = torch.nn.Identity()
    model.load_state_dict({name: x.to(getattr(torch, dtype)) for name, x in weights.items()})
    model.watch, model.cap = Watch(model), c["final_logit_softcapping"] if which == "repaired" else None
    return model


@torch.no_grad()
def run(model, case):
    ids = torch.from_numpy(case.ids)
    length, found = ids.shape[1], {}
    causal = torch.tril(torch.ones(length, length, dtype=torch.bool))[None]
    given, calls = {}, len(case.calls) > 1
    if case.padded:  # as its generation does for left padding
        mask = torch.from_numpy(case.mask).bool()
        given = {"mask": causal & mask[:, None] | torch.eye(length, dtype=torch.bool),
                 "input_pos": (mask.cumsum(-1) - 1).clamp(min=0)}  # fmt: skip
    if calls:
        model.setup_caches(batch_size=1, dtype=next(model.parameters()).dtype, decoder_max_seq_len=length)
    for prefix, start, end in case.pieces():
        if calls:
            given = {"mask": causal[:, start:end], "input_pos": torch.arange(start, end)[None]}
        model.watch.take("")
        logits = model(ids[:, start:end], **given)
        logits = logits if model.cap is None else model.cap * torch.tanh(logits / model.cap)
        found |= model.watch.take(prefix, logits=logits)
    for layer in model.layers if calls else ():
        layer.attn.kv_cache, layer.attn.cache_enabled = None, False
    return found


main(load, run, map="torchtune", engine=f"torchtune {version('torchtune')}, torch {torch.__version__}")
