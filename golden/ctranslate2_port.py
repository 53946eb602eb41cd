"""CTranslate2's Gemma 2 on the conformance checkpoint, or another folder without a tokenizer: a trace of its logits.

pip install ctranslate2 transformers torch
python golden/ctranslate2_port.py refgemma/checkpoints/conformance --ids 2,5,9,30 -o port.safetensors
refgemma check port.safetensors --model conformance

Its converter wants a tokenizer, of which it only takes the words: one word a token is made up.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--ids", required=True)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    ids = np.array([[int(n) for n in args.ids.split(",")]])
    size = transformers.AutoConfig.from_pretrained(args.folder).vocab_size
    words = [*SPECIAL, *(f"<{n}>" for n in range(len(SPECIAL), size))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory() as scratch:
        source = shutil.copytree(args.folder, Path(scratch) / "source")
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(source)
        target = ctranslate2.converters.TransformersConverter(str(source)).convert(str(Path(scratch) / "converted"))
        model = ctranslate2.Generator(target, device="cpu", compute_type="float32")
        logits = np.array(model.forward_batch(ids.tolist(), return_log_probs=False), np.float32)
    about = {"dtype": "float32", "engine": f"ctranslate2 {ctranslate2.__version__}"}
    save_file({"input_ids": ids, "logits": logits}, args.output, about)
    print(f"{args.output}: 1 tensor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
