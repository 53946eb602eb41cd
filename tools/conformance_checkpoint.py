"""Write the conformance checkpoint, a small model in which every known bug shows, into a folder. Checked in the tests:
the files in the package are what is written here, to the last byte.

    python tools/conformance_checkpoint.py refgemma/checkpoints/conformance

Nobody trained it: its weights are random bytes times powers of two, exact in bfloat16. No two of its axes have one
length, ``heads * head_dim`` is not the width, the query scalar is neither head_dim nor width / heads, ``sqrt(hidden)``
is 0.15 % off in bfloat16, both caps bend, the window is 8, and rows of the embedding have ten sizes, so that eps
matters to some tokens.
"""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from refgemma.config import Gemma2Config
from refgemma.files import replace_file
from refgemma.precision import Array
from refgemma.weights.parameters import EMBED_TOKENS, tensor_shapes
from refgemma.weights.synthetic import raw_bytes

CONFIG = Gemma2Config(
    vocab_size=97, hidden_size=30, intermediate_size=44, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=3, head_dim=10, query_pre_attn_scalar=13, sliding_window=8, attn_logit_softcapping=3.0,
    final_logit_softcapping=2.0, max_position_embeddings=512, dtype="bfloat16", architectures=("Gemma2ForCausalLM",),
)  # fmt: skip
SEED = 5
# A weight is -128 to 127, root mean square 74, times 2 to this power.
MATRIX, NORM, TABLE = -8, -8, -7
ROW_SIZES = 10  # a row of the embedding is 2**-(row % 10) times as large


def weight(name: str, shape: tuple[int, ...]) -> Array:
    """One tensor, as float32 numbers that are exact in bfloat16."""
    numbers = raw_bytes(name, 0, int(np.prod(shape)), SEED).reshape(shape).astype(np.float32)
    if name == EMBED_TOKENS:
        return (
            np.float32(2.0**TABLE) * numbers * np.exp2(-(np.arange(shape[0]) % ROW_SIZES)).astype(np.float32)[:, None]
        )
    return np.float32(2.0 ** (NORM if len(shape) == 1 else MATRIX)) * numbers


def write_conformance(folder: str | Path) -> None:
    """Write the checkpoint as a Hugging Face folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight(name, shape).astype(ml_dtypes.bfloat16) for name, shape in tensor_shapes(CONFIG).items()}
    replace_file(target / "model.safetensors", save(tensors, {"format": "pt"}))
    CONFIG.save_pretrained(target)


if __name__ == "__main__":
    write_conformance(sys.argv[1])
