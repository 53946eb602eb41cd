"""Write conformance checkpoints: small models in which every known bug changes the result.

The tests check that this file reproduces the checkpoint in the package to the last byte, and that other sizes show the
same bugs.

The weights are random bytes times powers of two, exact in bfloat16 (untrained). In the packaged model, no two axes have
the same length, and ``heads * head_dim`` is not the width. The query scalar is neither head_dim nor width / heads, and
``sqrt(hidden)`` is 0.15 % off in bfloat16. Both caps have an effect, and the window is 8. The rows of the embedding
have ten sizes, so that eps matters to some tokens.
"""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from refgemma.config import Gemma2Config
from refgemma.files import replace_file
from refgemma.precision import Array
from refgemma.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    gemma_rest,
    write_model,
)
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.parameters import EMBED_TOKENS, tensor_shapes
from refgemma.weights.parameters import NORM as LAST_NORM
from refgemma.weights.synthetic import raw_bytes

CONFIG = Gemma2Config(
    vocab_size=97, hidden_size=30, intermediate_size=44, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=3, head_dim=10, query_pre_attn_scalar=13, sliding_window=8, attn_logit_softcapping=3.0,
    final_logit_softcapping=2.0, max_position_embeddings=512, dtype="bfloat16", architectures=("Gemma2ForCausalLM",),
)  # fmt: skip
WEIGHT_SEED = 5
# A weight is a number from -128 to 127 (root mean square 74) times 2 to this power. Wider matrices have smaller
# weights.
MATRIX, NORM, TABLE = -8, -8, -7
ROW_SIZES = 10  # row `row` of the embedding is scaled by 2**-(row % 10)

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")  # the ids from 0 on
VOCABULARY = 288  # the special tokens, the bytes, one space, and unused tokens


def proportions(head_dim: int) -> Gemma2Config:
    """Return a configuration that most engines load; as in the 27B, the query scalar is width / heads.

    Two query heads share a key head, the width is ``5 * head_dim``, and the vocabulary has a piece for each byte.

    Examples
    --------
    >>> config = proportions(64)
    >>> config.hidden_size, config.query_pre_attn_scalar, config.sliding_window
    (320, 80, 16)
    """
    return CONFIG.changed(
        vocab_size=VOCABULARY, hidden_size=5 * head_dim, intermediate_size=7 * head_dim, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, query_pre_attn_scalar=5 * head_dim // 4, sliding_window=16,
    )  # fmt: skip


def make_weight(name: str, shape: tuple[int, ...], config: Gemma2Config = CONFIG) -> Array:
    """Return one tensor in float32; its numbers are exact in bfloat16."""
    numbers = raw_bytes(name, 0, int(np.prod(shape)), WEIGHT_SEED).reshape(shape).astype(np.float32)
    halvings = round(math.log2(config.hidden_size / CONFIG.hidden_size) / 2)  # keeps the size of sums over the width
    if name == EMBED_TOKENS:
        sizes = np.exp2(-(np.arange(shape[0]) % ROW_SIZES)).astype(np.float32)
        return np.float32(2.0 ** (TABLE - halvings)) * numbers * sizes[:, None]
    if name == LAST_NORM and config.vocab_size >= VOCABULARY:
        return np.float32(2.0**-7) * numbers - 1  # 1 + w has both signs, so that a token does not predict itself
    return np.float32(2.0 ** (NORM if len(shape) == 1 else MATRIX - halvings)) * numbers


def write_conformance(folder: str | Path, config: Gemma2Config = CONFIG) -> None:
    """Write a checkpoint as a Hugging Face folder, with a tokenizer if the vocabulary is large enough for one."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    shapes = tensor_shapes(config)
    tensors = {name: make_weight(name, shape, config).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    if config.vocab_size >= VOCABULARY:
        Tokenizer(make_tokenizer(config.vocab_size)).save_pretrained(target)
    replace_file(target / "model.safetensors", save(tensors, {"format": "pt"}))
    config.save_pretrained(target)


def make_tokenizer(size: int) -> bytes:
    """Return a ``tokenizer.model`` with special tokens, a piece for each byte, a space, and unused tokens."""
    pieces = [Piece(name, 0.0, UNKNOWN if name == "<unk>" else CONTROL) for name in SPECIAL[:4]]
    pieces += [Piece(name, 0.0, USER_DEFINED) for name in SPECIAL[4:]]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [Piece("\N{LOWER ONE EIGHTH BLOCK}", -1.0, NORMAL)]
    pieces += [Piece(f"<unused{n}>", 0.0, USER_DEFINED) for n in range(size - len(pieces))]
    ids = {name: n for n, name in enumerate(SPECIAL)}
    roles = {role: (f"<{role}>", ids[f"<{role}>"]) for role in ("unk", "bos", "eos", "pad")}
    return write_model(pieces, gemma_rest(**roles))
