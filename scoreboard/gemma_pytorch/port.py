"""google/gemma_pytorch: the outputs of its modules, and the logits of every token."""

import json

import torch
from gemma import config as configs
from gemma import model as models
from glue import Watch, main
from safetensors.torch import load_file


def load(folder, dtype):
    c = json.loads((folder / "config.json").read_text())
    config = configs.get_config_for_9b(dtype)
    local, full = configs.AttentionType.LOCAL_SLIDING, configs.AttentionType.GLOBAL
    same = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size",
            "num_key_value_heads", "intermediate_size", "head_dim", "rms_norm_eps", "final_logit_softcapping",
            "attn_logit_softcapping", "query_pre_attn_scalar")  # fmt: skip
    for name in same:
        setattr(config, name, c[name])
    config.sliding_window_size, config.attn_types = c["sliding_window"], [local, full]
    models.tokenizer.Tokenizer = lambda path: None  # the folder has no tokenizer, and none is used
    torch.set_default_dtype(getattr(torch, dtype))  # as its run.py does
    model = models.GemmaForCausalLM(config).eval()
    weights = {
        n.replace("model.embed_tokens", "embedder"): x for n, x in load_file(folder / "model.safetensors").items()
    }
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}.self_attn"
        weights[f"{at}.qkv_proj.weight"] = torch.cat([weights.pop(f"{at}.{p}_proj.weight") for p in "qkv"])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (set(missing) <= {"freqs_cis"}, unexpected) == (True, []), (missing, unexpected)
    model.watch = Watch(model)
    return model


@torch.no_grad()
def run(model, case):
    case.only(calls=True)
    c, ids, length = model.config, torch.from_numpy(case.ids), case.ids.shape[1]
    size = (1, length, c.num_key_value_heads, c.head_dim)
    caches = [(torch.zeros(size), torch.zeros(size)) for _ in range(c.num_hidden_layers)]
    lowest = torch.full((1, 1, length, length), -2.3819763e38, dtype=torch.float)  # as in `generate`
    mask = torch.triu(lowest, diagonal=1)
    local = mask + torch.tril(lowest, diagonal=-c.sliding_window_size)
    found = {}
    for prefix, start, end in case.pieces():
        places = torch.arange(start, end)
        _, logits = model(ids[:, start:end], places, None, caches, mask[:, :, places], torch.arange(end - start), None,
                          torch.ones(1), torch.ones(1), local_mask=local[:, :, places])  # fmt: skip
        found |= model.watch.take(prefix, sampler=logits if end - start > 1 else logits[:, None])
    return found


main(load, run, map="gemma_pytorch", engine=f"google/gemma_pytorch, torch {torch.__version__}")
