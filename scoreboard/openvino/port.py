"""OpenVINO by optimum-intel's exporter: the logits, with and without a cache."""

from importlib.metadata import version

import numpy as np
import torch
from glue import main
from optimum.intel import OVModelForCausalLM


def load(folder, dtype):
    hint = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    return OVModelForCausalLM.from_pretrained(folder, export=True, ov_config={"INFERENCE_PRECISION_HINT": hint})


def run(model, case):
    ids, mask, past, found = torch.from_numpy(case.ids), torch.from_numpy(case.mask), None, {}
    for prefix, start, end in case.pieces():
        result = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past = result.past_key_values
        found[f"{prefix}logits"] = np.array(result.logits, np.float32)
    return found


main(load, run, engine=f"openvino {version('openvino')}, optimum-intel {version('optimum-intel')}")
