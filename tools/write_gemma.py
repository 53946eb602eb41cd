"""Google DeepMind's Gemma 2 in Flax: every intermediate that ``capture_intermediates`` keeps, under its path.

pip install gemma==3.3.0
refgemma convert refgemma/checkpoints/conformance --to flax-npz --dtype float32 -o flax
python tools/write_gemma.py refgemma/checkpoints/conformance flax --ids 2,36,37,38 -o port.safetensors
refgemma check port.safetensors --model conformance
"""

import argparse
import dataclasses
import json
import sys
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from gemma.gm.nn import _config, _gemma, _modules
from jax.tree_util import tree_leaves
from safetensors.numpy import save_file


def load(folder, flax):
    c = json.loads((Path(folder) / "config.json").read_text())
    tree = {}
    for name, x in np.load(Path(flax) / "params.npz").items():
        *path, leaf = name.removesuffix("/w" if "/mlp/" in name else "").split("/")[1:]
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = jnp.array(x)
    # The released sizes have one of three scalars; this model has another.
    _config.TransformerConfig.query_pre_attn_scalar = lambda self: c["query_pre_attn_scalar"] ** -0.5
    local, full = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
    config = dataclasses.replace(
        _gemma.Gemma2_9B.config, num_embed=c["vocab_size"], embed_dim=c["hidden_size"], head_dim=c["head_dim"],
        hidden_dim=c["intermediate_size"], num_heads=c["num_attention_heads"], num_kv_heads=c["num_key_value_heads"],
        final_logit_softcap=c["final_logit_softcapping"], attn_logits_soft_cap=c["attn_logit_softcapping"],
        sliding_window_size=c["sliding_window"], attention_types=(local, full) * (c["num_hidden_layers"] // 2),
    )  # fmt: skip
    return _gemma.Gemma2_9B(config=config, dtype=jnp.float32), tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("flax")
    parser.add_argument("--ids", required=True)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    model, params = load(args.folder, args.flax)
    ids = np.array([[int(n) for n in args.ids.split(",")]])
    length = ids.shape[1]
    _, kept = model.apply(
        {"params": params}, jnp.array(ids, jnp.int32), positions=jnp.arange(length)[None],
        attention_mask=jnp.tril(jnp.ones((1, length, length), bool)), mutable=["intermediates"],
        capture_intermediates=True,
    )  # fmt: skip
    tensors = {"input_ids": ids}
    for name, found in flatten_dict(kept["intermediates"], sep="/").items():
        for number, x in enumerate(tree_leaves(found)):
            tensors[f"{name}#{number}" if number else name] = np.asarray(x, np.float32)
    about = {"map": "gemma", "dtype": "float32", "engine": f"gemma {version('gemma')}, jax {version('jax')}"}
    save_file(tensors, args.output, about)
    print(f"{args.output}: {len(tensors)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
