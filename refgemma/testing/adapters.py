"""Provide transformers as a backend, for each attention implementation that runs on any machine. Checked in
``tests/parity/test_adapters.py``; ``docs/property-tests.md`` has the results of the laws.

torch and transformers are imported when a model is loaded.
"""

import contextlib
import copy
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from refgemma.precision import Array
from refgemma.testing.interface import Capabilities, Output
from refgemma.trace.capture import as_numpy, catch_tensors, in_heads
from refgemma.trace.names import LAYER_NORMS

# Tensors that transformers computes outside the attention function, so that every implementation shows them.
AROUND_ATTENTION = (
    "cos", "sin", "embedded", "norm", "raw_logits", "logits", "layers.*.middle", "layers.*.out",
    *(f"layers.*.{norm}" for norm in LAYER_NORMS), "layers.*.feed_forward.*",
    *(f"layers.*.attention.{name}" for name in ("q", "k", "v", "q_rot", "k_rot", "mixed", "out")),
)  # fmt: skip
SCORES = tuple(f"layers.*.attention.{name}" for name in ("scores", "capped", "probs"))


class Transformers:
    """``Gemma2ForCausalLM`` of transformers. Use one of its three subclasses.

    It does not claim float64, because norms and softmax are float32 in its float64 model. It has no single operations.
    The tokenizer is the same for all three and is compared elsewhere.
    """

    attention: ClassVar[str]
    shown: ClassVar[tuple[str, ...]] = AROUND_ATTENTION

    def capabilities(self) -> Capabilities:
        """Return three precisions, cache, padding and positions."""
        return Capabilities(
            ("float32", "bfloat16", "float16"), tensors=self.shown, cache=True, padding=True, positions=True
        )

    def load(self, folder: Path, dtype: str) -> Any:
        """Load the model in `dtype`, because a later cast would round the rotary frequencies."""
        import torch
        from transformers import Gemma2ForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()  # otherwise there is a bar for each of thousands of small models
        model = Gemma2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
        model.generation_config = GenerationConfig(pad_token_id=0)  # so that no token ends a text
        self._set_attention(model)
        return model.eval()

    def _set_attention(self, model: Any) -> None:
        """Set the attention implementation."""
        model.set_attn_implementation(self.attention)

    def forward(
        self,
        model: Any,
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None = None,
        position_ids: npt.NDArray[np.int64] | None = None,
        cache: Any = None,
        tensors: Sequence[str] = ("logits",),
    ) -> Output:
        """Call the model once, on a copy of the cache, because transformers changes the cache."""
        import torch
        from transformers import DynamicCache

        past = DynamicCache(config=model.config) if cache is None else copy.deepcopy(cache)
        # Always pass a mask: without a mask, transformers treats position ids with gaps as several texts in one row,
        # which do not see each other.
        done = past.get_seq_length()
        unpadded = np.ones((len(input_ids), done + input_ids.shape[1]), np.int64)
        mask = unpadded if attention_mask is None else attention_mask
        positions = None if position_ids is None else torch.tensor(np.broadcast_to(position_ids, input_ids.shape))
        # Pass positional arguments, because past_key_values of transformers 5.23 is called cache from 5.24 on.
        given = (torch.tensor(input_ids), torch.tensor(mask), positions, past)
        with torch.no_grad(), self._prepare_run():
            if set(tensors) == {"logits"}:
                found = {"logits": model(*given, use_cache=True).logits}
            else:
                with catch_tensors(model) as found:
                    logits = model(*given, use_cache=True).logits
                found |= {name: found[name].expand(len(input_ids), -1, -1, -1) for name in ("cos", "sin")}
                found["logits"] = logits
        head_dim = model.config.head_dim
        asked = {
            name: as_numpy(in_heads(name, x, head_dim))
            for name, x in found.items()
            if any(fnmatchcase(name, wanted) for wanted in tensors) and self.capabilities().shows(name)
        }
        return Output(asked, past)

    def _prepare_run(self) -> Any:
        """Return the context in which the model runs."""
        return contextlib.nullcontext()

    def loss(self, model: Any, input_ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> float:
        """Return the model's own loss."""
        import torch

        with torch.no_grad(), self._prepare_run():
            return float(model(input_ids=torch.tensor(input_ids), labels=torch.tensor(labels)).loss)

    def gradients(
        self, model: Any, input_ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64] | None, num_items: float,
    ) -> dict[str, Array]:  # fmt: skip
        """Return autograd's gradients of the model's own loss."""
        import torch

        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        model.zero_grad()
        with self._prepare_run():
            model(input_ids=torch.tensor(input_ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels),
                  use_cache=False, num_items_in_batch=num_items).loss.backward()  # fmt: skip
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
        return {name: as_numpy(grad) for name, grad in found.items()}

    def save(self, model: Any, folder: Path) -> None:
        """Call ``save_pretrained``."""
        model.save_pretrained(folder)

    def sample(self, model: Any, input_ids: npt.NDArray[np.int64], count: int, seed: int) -> Array:
        """Call ``generate`` with ``do_sample``, with all draws as one batch."""
        import torch

        torch.manual_seed(seed)
        asked = self._generate(model, np.repeat(input_ids, count, axis=0), 1, do_sample=True, top_k=0)
        found: Array = asked.sequences[:, -1].numpy()
        return found

    def search(
        self, model: Any, input_ids: npt.NDArray[np.int64], num_beams: int, new_tokens: int
    ) -> tuple[Array, float]:
        """Call ``generate`` with beams, and without a token that ends a text."""
        asked = self._generate(model, input_ids, new_tokens, num_beams=num_beams, length_penalty=0.0, do_sample=False)
        return asked.sequences[0].numpy(), float(asked.sequences_scores[0])

    def _generate(self, model: Any, input_ids: npt.NDArray[np.int64], new_tokens: int, **named: Any) -> Any:
        import torch
        from transformers import GenerationConfig

        plain = GenerationConfig(
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
            use_cache=True,
            **named,
        )
        ids = torch.tensor(input_ids)
        with torch.no_grad(), self._prepare_run():
            return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)


class TransformersEager(Transformers):
    """Attention without fusion, ``attn_implementation="eager"``, which was used for the recordings."""

    attention = "eager"
    shown = (*AROUND_ATTENTION, *SCORES)


class TransformersSdpa(Transformers):
    """torch's fused attention, which has no soft cap, so that the scores are not capped.

    transformers 5.23 refuses this twice: when the model is loaded, and when attention is called with a cap. In 4.57.6
    it is still the default (`_supports_sdpa` of its Gemma 2), and other packages enable it again (optimum-intel #976).
    The laws show the error.
    """

    attention = "sdpa"

    def _set_attention(self, model: Any) -> None:
        """Bypass both of transformers' refusals."""
        model.config._attn_implementation = "sdpa"
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None


class TransformersFlex(Transformers):
    """``attn_implementation="flex_attention"`` without compilation: torch's own reference, on any machine."""

    attention = "flex_attention"

    def _prepare_run(self) -> Any:
        """Disable compilation, which would take seconds per shape and needs a C++ compiler; torch warns of either."""
        import torch

        inside = contextlib.ExitStack()
        inside.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        inside.enter_context(torch.compiler.set_stance("force_eager"))
        return inside
