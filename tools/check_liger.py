"""Check the gradients of Liger's kernels for Gemma 2 in Triton's interpreter, on a processor.

Run `python tools/check_liger.py`, or with the names of some kernels, where liger-kernel, triton, torch and transformers are installed.

The interpreter of Triton 3.9 cannot run two parts of these kernels, so this program repairs both: a number among the
arguments becomes a tensor, and tanh and rsqrt, functions of CUDA's library, are computed by exp and sqrt.
"""  # noqa: E501

import os
import sys
import tempfile
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import transformers
import triton
import triton.language as tl
from triton.runtime import interpreter

from refgemma.hub import find_model
from refgemma.oracle import check
from refgemma.trace.names import save_trace

usual = interpreter._implicit_cvt


def convert(argument: Any) -> Any:
    """Return an argument of a kernel as a tensor, also if it is a float."""
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
    return usual(argument)


interpreter._implicit_cvt = convert

from liger_kernel.ops import cross_entropy, geglu, rms_norm  # noqa: E402
from liger_kernel.transformers import apply_liger_kernel_to_gemma2  # noqa: E402


@triton.jit
def tanh(x: Any) -> Any:
    """Compute tanh by functions that the interpreter knows."""
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def rsqrt(x: Any) -> Any:
    """Compute the inverse square root."""
    return 1 / tl.sqrt(x)


geglu.tanh = cross_entropy.tanh = tanh
rms_norm.rsqrt = rsqrt

RNG = np.random.default_rng(0)
FOLDER = find_model("conformance")


def record(path: str, **kernels: bool) -> None:
    """Write the gradients of one batch of two rows, the second padded."""
    model = transformers.Gemma2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")
    chosen = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "geglu"), False)
    apply_liger_kernel_to_gemma2(model=model, **chosen | kernels)
    ids = RNG.integers(4, model.config.vocab_size, (2, 14))
    mask = np.ones_like(ids)
    mask[1, -3:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask == 0, -100, ids)}
    model.train()(**{name: torch.tensor(x) for name, x in given.items()}, use_cache=False).loss.backward()
    grads = {f"grads.{name}": p.grad.numpy() for name, p in model.named_parameters()}
    save_trace((given | grads).items(), path, {"dtype": "float32"})


if __name__ == "__main__":
    # Liger replaces classes of transformers, so each kernel is added to those before.
    for kernel in sys.argv[1:] or ("fused_linear_cross_entropy", "rms_norm", "geglu", "rope", "cross_entropy"):
        with tempfile.TemporaryDirectory() as folder:
            record(f"{folder}/liger.safetensors", **{kernel: True})
            report = check(f"{folder}/liger.safetensors", "conformance")
        print(kernel, report.verdict, [finding.named for finding in report.findings][:3], flush=True)
