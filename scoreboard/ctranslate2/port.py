"""CTranslate2's Gemma 2: the logits. Its converter wants a tokenizer, of which it only takes the words."""

import shutil
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
import transformers
from glue import NotRun, main
from tokenizers import Tokenizer, models

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def load(folder, dtype):
    if dtype not in ctranslate2.get_supported_compute_types("cpu"):
        raise NotRun(f"it does not compute in {dtype} on this CPU")
    size = transformers.AutoConfig.from_pretrained(folder).vocab_size
    words = [*SPECIAL, *(f"<{n}>" for n in range(len(SPECIAL), size))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    with tempfile.TemporaryDirectory() as scratch:
        source = shutil.copytree(folder, Path(scratch) / "source")
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(source)
        target = ctranslate2.converters.TransformersConverter(str(source)).convert(str(Path(scratch) / "converted"))
        return ctranslate2.Generator(target, device="cpu", compute_type=dtype)


def run(model, case):
    case.only(padding=True)
    rows = [ids[seen.astype(bool)] for ids, seen in zip(case.ids, case.mask, strict=True)]
    result = np.array(model.forward_batch([row.tolist() for row in rows], return_log_probs=False), np.float32)
    logits = np.full_like(result, np.nan)  # it pads on the right; the case pads on the left
    for n, row in enumerate(rows):
        logits[n, logits.shape[1] - len(row) :] = result[n, : len(row)]
    return {"logits": np.nan_to_num(logits, nan=0.0)}


main(load, run, engine=f"ctranslate2 {ctranslate2.__version__}")
