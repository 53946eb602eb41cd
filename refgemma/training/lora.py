"""Train a LoRA adapter: a matrix of low rank for each chosen weight. Checked against PEFT 0.21: gradients,
steps, and the folder, which PEFT loads and merges to the same weights. Hu et al. 2021, arXiv:2106.09685.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from refgemma.config import Gemma2Config
from refgemma.files import replace_file
from refgemma.hub import ADAPTER_CONFIG
from refgemma.precision import Array
from refgemma.training.optimizer import TrainingError
from refgemma.weights.parameters import layer_tensors
from refgemma.weights.peft_adapters import ADAPTER_MODEL

PEFT_PREFIX = "base_model.model."  # prefix of each name in PEFT
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"  # PEFT's word for all projections


def parse_modules(text: str) -> tuple[str, ...]:
    """Return the projections in `text`, a list with commas; ``all-linear`` means all seven.

    Raises
    ------
    TrainingError
        If a name is not a projection of Gemma 2.

    Examples
    --------
    >>> parse_modules("q_proj,v_proj")
    ('q_proj', 'v_proj')
    """
    named = TARGETS if text == ALL_LINEAR else tuple(name.strip() for name in text.split(","))
    for name in named:
        if name not in TARGETS:
            raise TrainingError(f"{name!r} is not a projection; give {ALL_LINEAR} or any of {', '.join(TARGETS)}")
    return tuple(name for name in TARGETS if name in named)


@dataclass(frozen=True)
class Lora:
    """The settings of a LoRA adapter, which changes a weight to ``W + lora_alpha / r * B @ A``.

    Parameters
    ----------
    r, lora_alpha : int and float
        The rank, and the numerator of the factor ``lora_alpha / r``.
    target_modules : sequence of str
        The projections that have an adapter in every layer; some of `TARGETS`.

    Examples
    --------
    >>> import refgemma
    >>> from refgemma.weights.parameters import named_weights
    >>> tiny = refgemma.load("tiny")
    >>> base = {name: rows[:] for name, rows in named_weights(tiny.weights, tiny.config).items()}
    >>> lora = Lora(r=4, lora_alpha=8)
    >>> adapter = lora.draw(base, tiny.config, seed=0)
    >>> len(adapter), adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape
    (24, (4, 234))
    >>> merged = lora.merge(base, adapter, tiny.config)
    >>> all((merged[name] == base[name]).all() for name in base)  # B begins at zero
    True
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: Sequence[str] = ("q_proj", "v_proj")

    @property
    def scale(self) -> float:
        """The factor of ``B @ A``."""
        return self.lora_alpha / self.r

    def names(self, config: Gemma2Config) -> Iterator[tuple[str, str, str]]:
        """Yield the names of each weight with an adapter, of its ``A (r, in)`` and of its ``B (out, r)``."""
        for layer in range(config.num_hidden_layers):
            tensors = layer_tensors(layer)
            for module in self.target_modules:
                stem = PEFT_PREFIX + tensors[module].removesuffix(".weight")
                yield tensors[module], f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"

    def draw(self, base: Mapping[str, Array], config: Gemma2Config, seed: int) -> dict[str, Array]:
        """Draw a new adapter as in PEFT: A is uniform within ``1 / sqrt(in)``, and B is zero."""
        drawn = {}
        for name, a, b in self.names(config):
            (rows, columns), dtype = base[name].shape, base[name].dtype
            rng = np.random.default_rng([seed, zlib.crc32(a.encode())])
            bound = 1 / math.sqrt(columns)
            drawn[a] = rng.uniform(-bound, bound, (self.r, columns)).astype(dtype)
            drawn[b] = np.zeros((rows, self.r), dtype)
        return drawn

    def merge(self, base: Mapping[str, Array], adapter: Mapping[str, Array], config: Gemma2Config) -> dict[str, Array]:
        """Return all weights; each weight with an adapter is ``W + scale * B @ A``.

        The sum is computed in float64 and rounded once, as when ``refgemma.weights.peft_adapters`` reads the folder. So
        the merged weights in training equal the merged weights that are read later.
        """
        merged = dict(base)
        for name, a, b in self.names(config):
            outer, inner = adapter[b].astype(np.float64), adapter[a].astype(np.float64)
            merged[name] = (base[name] + self.scale * (outer @ inner)).astype(base[name].dtype)
        return merged

    def pull_back(
        self, gradients: Mapping[str, Array], adapter: Mapping[str, Array], config: Gemma2Config
    ) -> dict[str, Array]:
        """Return the gradients of the adapter, given the gradients of the merged weights.

        By the chain rule on ``W + s B A``, with the gradient ``G`` of the sum: ``dA = s B^T G`` and ``dB = s G A^T``.

        Examples
        --------
        >>> lora = Lora(r=1, lora_alpha=2.0, target_modules=["q_proj"])
        >>> config = Gemma2Config(num_hidden_layers=1)
        >>> ((name, a, b),) = lora.names(config)
        >>> adapter = {a: np.array([[1.0, 2.0]]), b: np.array([[3.0]])}
        >>> found = lora.pull_back({name: np.array([[10.0, 0.0]])}, adapter, config)
        >>> found[a], found[b]
        (array([[60.,  0.]]), array([[20.]]))
        """
        found = {}
        for name, a, b in self.names(config):
            found[a] = self.scale * (adapter[b].T @ gradients[name])
            found[b] = self.scale * (gradients[name] @ adapter[a].T)
        return found

    def save(self, folder: Path, adapter: Mapping[str, Array], base_model: str) -> None:
        """Write the two files of a PEFT adapter; each appears complete or not at all."""
        about: dict[str, Any] = {
            "base_model_name_or_path": base_model, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
            "init_lora_weights": True, "lora_alpha": self.lora_alpha, "lora_dropout": 0.0, "peft_type": "LORA",
            "r": self.r, "target_modules": list(self.target_modules), "task_type": "CAUSAL_LM",
        }  # fmt: skip
        replace_file(folder / ADAPTER_MODEL, save(dict(adapter), metadata={"format": "pt"}))
        replace_file(folder / ADAPTER_CONFIG, (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())
