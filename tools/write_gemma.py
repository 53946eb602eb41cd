r"""Google DeepMind's Gemma 2 in Flax: every intermediate that ``capture_intermediates`` keeps, under its path.

pip install gemma==4.0.1 jax==0.12.0.1 flax==0.12.12 kauldron==1.4.4 sentencepiece==0.2.0 protobuf==7.36.2 \
    safetensors==0.8.0   # Python 3.12
refgemma convert refgemma/checkpoints/conformance --to flax-npz --dtype float32 -o flax
PYTHONPATH=scoreboard:scoreboard/gemma python tools/write_gemma.py flax --ids 2,36,37,38,39,40,41,42,43,44 \
    -o port.safetensors
refgemma check port.safetensors --model conformance

tests/recorded/gemma.safetensors has these intermediates for two layers. It was written with gemma 3.3.0 and jax 0.8.2;
the versions above give the same names, and numbers that differ by at most 1.3e-6 of each tensor's largest.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.tree_util import tree_leaves
from port import load
from safetensors.numpy import save_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ids", required=True)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    model, params = load(args.folder, "float32")
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
