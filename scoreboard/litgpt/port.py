"""LitGPT's Gemma 2: the outputs of its modules, and the logits. Its own converter reads the folder."""

import json
from importlib.metadata import version

import torch
from glue import Watch, main
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_gemma_2
from safetensors.torch import load_file


def load(folder, dtype, epsilon):
    c = json.loads((folder / "config.json").read_text())
    config = Config.from_name(
        "Gemma-2-9b", vocab_size=c["vocab_size"], padded_vocab_size=c["vocab_size"], n_embd=c["hidden_size"],
        n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"], n_query_groups=c["num_key_value_heads"],
        head_size=c["head_dim"], intermediate_size=c["intermediate_size"], block_size=c["max_position_embeddings"],
        attention_scores_scalar=c["query_pre_attn_scalar"], sliding_window_size=c["sliding_window"],
        sliding_window_indices=[n % 2 == 0 for n in range(c["num_hidden_layers"])],
        attention_logit_softcapping=c["attn_logit_softcapping"], final_logit_softcapping=c["final_logit_softcapping"],
    )  # fmt: skip
    if epsilon == "given":
        config.norm_eps = c["rms_norm_eps"]
    weights = {}
    copy_weights_gemma_2({}, weights, load_file(folder / "model.safetensors"), dtype=getattr(torch, dtype))
    torch.set_default_dtype(getattr(torch, dtype))  # as LitGPT's own commands do; the rotary tables follow
    model = GPT(config).eval()
    model.load_state_dict(weights)
    model.watch = Watch(model)
    return model


@torch.no_grad()
def run(model, case):
    case.only(calls=True)
    ids, found = torch.from_numpy(case.ids), {}
    if len(case.calls) == 1:
        return {**model.watch.take("", logits=model(ids))}
    model.clear_kv_cache()
    model.max_seq_length = ids.shape[1]
    model.set_kv_cache(1)
    for prefix, start, end in case.pieces():
        model.watch.take("")
        logits = model(ids[:, start:end], torch.arange(start, end), end)
        found |= model.watch.take(prefix, logits=logits)
    return found


main(load, run, map="litgpt", engine=f"litgpt {version('litgpt')}, torch {torch.__version__}")
