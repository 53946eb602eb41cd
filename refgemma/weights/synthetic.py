"""Make synthetic weights for models of any size, when needed and with the same bytes on every machine.

They replace the released weights in tests at full size, because released weights cannot be put into a repository. They
are random (untrained), so generated text has no meaning. Checked by hashes of their bytes.

A weight is a random byte times a power of two, so that it is exact in bfloat16 and every wider format. The bytes come
from a counter-based generator (Philox 4x64) keyed by the tensor's name. The powers make every feature of Gemma 2
matter; see `EXPONENTS`.
"""

import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from refgemma.config import Gemma2Config
from refgemma.precision import BF16, Array, as_dtype
from refgemma.weights.parameters import EMBED_TOKENS, NORM, OnDemand, Weights, tensor_shapes
from refgemma.weights.save import OutputTensor, claim, write_checkpoint

SYNTHETIC_SEED = 2

# A weight is a number from -128 to 127 (root mean square 74) times 2 to this power. The effects, measured on a 9B and a
# 27B in docs/full-size.md: scores reach the cap, attention has four degrees of sharpness, the residual stream grows.
EXPONENTS = {
    "embed_tokens": -11, "q_proj": -12, "k_proj": -12, "v_proj": -12, "o_proj": -12, "gate_proj": -12, "up_proj": -12,
    "down_proj": -12, "input_layernorm": -8, "post_attention_layernorm": -7, "pre_feedforward_layernorm": -8,
    "post_feedforward_layernorm": -7, "norm": -4,
}  # fmt: skip
# Queries of head n are multiplied by 2 to the power of entry ``n % 16``. Most heads attend to many tokens, a few to
# one.
HEAD_POWERS = (0, 1, 0, 2, 0, 1, 0, 1, 0, 1, 0, 2, 0, 1, 0, 3)
BYTES_PER_COUNT = 32  # each step of Philox's counter gives four numbers of eight bytes


def raw_bytes(name: str, start: int, count: int, seed: int = SYNTHETIC_SEED) -> npt.NDArray[np.int8]:
    """Return `count` random numbers from -128 to 127 of tensor `name`, from number `start` on.

    Examples
    --------
    >>> raw_bytes("model.norm.weight", 0, 5)[2:], raw_bytes("model.norm.weight", 2, 3)
    (array([109,  24,   7], dtype=int8), array([109,  24,   7], dtype=int8))
    """
    first, skipped = divmod(start, BYTES_PER_COUNT)
    stream = np.random.Philox(counter=first, key=np.array([seed, zlib.crc32(name.encode())], np.uint64))
    words = stream.random_raw(-(-(skipped + count) // 8))
    return words.astype("<u8", copy=False).view(np.int8)[skipped : skipped + count]


@dataclass(frozen=True)
class Synthetic:
    """One synthetic tensor; rows are made when accessed.

    Examples
    --------
    >>> table = Synthetic("model.embed_tokens.weight", (256000, 3584), Gemma2Config.preset("9b"))
    >>> bool((table[[7, 9]] == table[7:10][[0, 2]]).all()), table[7:8].dtype
    (True, dtype('float32'))
    """

    name: str
    shape: tuple[int, ...]
    config: Gemma2Config
    dtype: str = "float32"
    seed: int = SYNTHETIC_SEED

    def __getitem__(self, rows: Any, /) -> Array:
        """Return the rows of a slice or of an array of integers."""
        length = self.shape[0]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(length)
            found = self._numbers(start, max(stop, start))[::step]
        else:
            wanted = np.arange(length)[rows]
            found = np.empty((*wanted.shape, *self.shape[1:]), np.float32)
            for place in np.ndindex(wanted.shape):
                found[place] = self._numbers(int(wanted[place]), int(wanted[place]) + 1)[0]
        # The numbers are exact in bfloat16, so they need no rounding, which would take longer than making them.
        return found.view(BF16) if self.dtype == "bfloat16" else as_dtype(found, self.dtype)

    def _numbers(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows `start` to `stop` in float32."""
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        drawn = raw_bytes(self.name, start * width, (stop - start) * width, self.seed)
        shaped = drawn.reshape(stop - start, *self.shape[1:])
        numbers: npt.NDArray[np.float32] = np.multiply(shaped, self._scales(start, stop), dtype=np.float32)
        return -np.abs(numbers) if ".post_" in self.name else numbers

    def _scales(self, start: int, stop: int) -> Any:
        """Return the power of two for all rows; for queries, one for each row, because heads differ in sharpness."""
        field = self.name.split(".")[-2]
        power = np.float32(2.0 ** EXPONENTS[field])
        if field != "q_proj":
            return power
        heads = np.arange(start, stop) // self.config.head_dim
        return power * np.exp2(np.array(HEAD_POWERS, np.float32)[heads % len(HEAD_POWERS)])[:, None]


def synthetic_weights(config: Gemma2Config, dtype: str = "float32", seed: int = SYNTHETIC_SEED) -> Weights:
    """Return the synthetic weights of a `seed` in `dtype`; each access makes a layer again.

    Examples
    --------
    >>> weights = synthetic_weights(Gemma2Config.preset("27b"))
    >>> weights.embed_tokens[5:6].shape, len(weights.layers)
    ((1, 4608), 46)
    """
    shapes = tensor_shapes(config)

    def tensor(name: str) -> Synthetic:
        return Synthetic(name, shapes[name], config, dtype, seed)

    layers = OnDemand(tensor, range(config.num_hidden_layers), config.attention_bias)
    return Weights(tensor(EMBED_TOKENS), layers, tensor(NORM)[:])


def write_synthetic(config: Gemma2Config, folder: str | Path, max_shard_size: int | str = "5GB") -> int:
    """Write synthetic weights as a Hugging Face folder in bfloat16; return the number of parameters.

    A file has at most `max_shard_size`. After an interruption, the same call continues with the first unfinished file.
    The checkpoint can be opened only after all files have been read back and compared.

    Examples
    --------
    >>> import tempfile
    >>> config = Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    ...                       num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_synthetic(config, folder)
    9888
    """
    outputs = [
        OutputTensor(name, "bfloat16", shape, Synthetic(name, shape, config))
        for name, shape in tensor_shapes(config).items()
    ]
    fingerprint = f"synthetic {SYNTHETIC_SEED} {EXPONENTS} {max_shard_size} {config.to_json_string()}"
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()
    with claim(Path(folder), digest):
        config.changed(dtype="bfloat16", architectures=("Gemma2ForCausalLM",)).save_pretrained(folder)
        write_checkpoint(folder, outputs, max_shard_size, digest)
    return sum(math.prod(output.shape) for output in outputs)
