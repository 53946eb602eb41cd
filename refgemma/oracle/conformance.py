"""The conformance checkpoint, a small model in which every known mistake shows, and the inputs that show them. Checked
in the tests: the files in the package are what is written here, to the last byte.

Nobody trained it: its weights are random bytes times powers of two, exact in bfloat16. No two of its axes have one
length, ``heads * head_dim`` is not the width, the query scalar is neither head_dim nor width / heads, ``sqrt(hidden)``
is 0.15 % off in bfloat16, both caps bend, the window is 8, and rows of the embedding have ten sizes, so that eps
matters to some tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
    """Write the checkpoint as a Hugging Face folder.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_conformance(folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight(name, shape).astype(ml_dtypes.bfloat16) for name, shape in tensor_shapes(CONFIG).items()}
    replace_file(target / "model.safetensors", save(tensors, {"format": "pt"}))
    CONFIG.save_pretrained(target)


@dataclass(frozen=True)
class Prompt:
    """Tokens to run a model on."""

    name: str
    why: str
    input_ids: Array  # (batch, seq)
    attention_mask: Array
    calls: tuple[int, ...]  # tokens of each call, when they share a cache


def prompts(config: Gemma2Config) -> Mapping[str, Prompt]:
    """Inputs that together show what can be shown; random tokens after <bos>.

    Examples
    --------
    >>> {name: prompt.calls for name, prompt in prompts(CONFIG).items()}
    {'padded': (28,), 'plain': (28,), 'cached': (10, 6, 1, 1, 9, 1)}
    """
    window = min(config.sliding_window, 1024)
    length = 3 * window + 4
    ids = np.random.default_rng(SEED).integers(4, config.vocab_size, (2, length))
    ids[:, 0] = 2 if config.bos_token_id is None else config.bos_token_id
    seen = np.ones_like(ids)
    padded, visible = ids.copy(), seen.copy()
    padded[1, 3:], visible[1, :3] = ids[1, :-3], 0
    padded[1, :3] = config.pad_token_id or 0
    pieces = (window + 2, window - 2, 1, 1, window + 1)
    return {
        "padded": Prompt("padded", "two rows, one of which begins with padding", padded, visible, (length,)),
        "plain": Prompt("plain", "one row of more than three windows", ids[:1], seen[:1], (length,)),
        "cached": Prompt("cached", "a prompt in pieces and steps that share a cache", ids[:1], seen[:1],
                         (*pieces, length - sum(pieces))),
    }  # fmt: skip
