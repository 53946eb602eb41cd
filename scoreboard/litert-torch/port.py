"""LiteRT Torch's own Gemma 2, before it is converted: the steps of its blocks, and the logits."""

import json
import re
from importlib.metadata import version

import torch
from glue import Watch, main
from litert_torch.generative.examples.gemma import gemma2
from litert_torch.generative.layers import kv_cache
from litert_torch.generative.utilities import model_builder

LENGTH = 64  # of the cache and of the masks
NAMES = {
    "pre_atten_norm": "input_layernorm", "atten_func": "attention.out", "post_atten_norm": "post_attention_layernorm",
    "ff.pre_ff_norm": "pre_feedforward_layernorm", "ff.w1": "feed_forward.gate", "ff.w3": "feed_forward.up",
    "ff.w2": "feed_forward.out", "ff.post_ff_norm": "post_feedforward_layernorm",
}  # fmt: skip


def load(folder, dtype):
    c = json.loads((folder / "config.json").read_text())
    config = gemma2.get_model_config_2b()
    config.vocab_size, config.num_layers, config.embedding_dim = (
        c["vocab_size"],
        c["num_hidden_layers"],
        c["hidden_size"],
    )
    config.embedding_scale, config.max_seq_len = c["hidden_size"] ** 0.5, c["max_position_embeddings"]
    config.final_logit_softcap = c["final_logit_softcapping"]
    config.block_configs = config.block_configs[: config.num_layers]
    for block in config.block_configs:
        block.ff_config.intermediate_size = c["intermediate_size"]
        attention = block.attn_config
        attention.num_heads, attention.num_query_groups = c["num_attention_heads"], c["num_key_value_heads"]
        attention.head_dim, attention.logit_softcap = c["head_dim"], c["attn_logit_softcapping"]
        attention.sliding_window_size = c["sliding_window"]
    model = model_builder.build_decoder_only_model(
        checkpoint_path=str(folder), config=config, tensor_names=gemma2.TENSOR_NAMES_SEP_QKV, model_class=gemma2.Gemma2,
        mask_cache_size=LENGTH,
    ).eval()  # fmt: skip
    model.watch = Watch(model)
    return model


@torch.no_grad()
def run(model, case):
    case.only(calls=True)
    cache, found = kv_cache.KVCache.from_model_config(LENGTH, model.config), {}
    for prefix, start, end in case.pieces():
        result = model(torch.from_numpy(case.ids[:, start:end]), torch.arange(start, end), cache)
        cache = result["kv_cache"]
        for name, x in model.watch.take("").items():
            if hit := re.fullmatch(r"transformer_blocks\.(\d+)(?:\.(.*))?", name):
                step = NAMES.get(hit[2]) if hit[2] else "out"
                found |= {f"{prefix}layers.{hit[1]}.{step}": x} if step else {}
        found[f"{prefix}logits"] = result["logits"]
    return found


main(load, run, engine=f"litert-torch {version('litert-torch')}, torch {torch.__version__}")
