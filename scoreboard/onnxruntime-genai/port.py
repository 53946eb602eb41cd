"""The graph that onnxruntime-genai's model builder writes, run by onnxruntime: its values, and the logits."""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from glue import main

SHOWN = re.compile(
    r"/model/(embed_tokens/Mul|layers.\d+/(\w+_layernorm|.*MatMul|attn/GroupQueryAttention|mlp/act_fn/FastGelu|mlp/Mul))/"
    r"output_[03]|/lm_head/MatMul/output_0"
)


def load(folder, dtype):
    target = Path(tempfile.mkdtemp())
    subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(target), "-p", "fp32",
         "-e", "cpu", "-c", str(target / "cache")], check=True,
    )  # fmt: skip
    model = onnx.load(target / "model.onnx")
    values = [name for node in model.graph.node for name in node.output if SHOWN.fullmatch(name)]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    c = json.loads((folder / "config.json").read_text())
    shape = (1, c["num_key_value_heads"], 0, c["head_dim"])
    return onnxruntime.InferenceSession(model.SerializeToString(), options), shape


def run(loaded, case):
    case.only(calls=True)
    session, shape = loaded
    past = [x.name for x in session.get_inputs() if x.name.startswith("past_key_values")]
    cache = {name: np.zeros(shape, np.float32) for name in past}
    names, found = [x.name for x in session.get_outputs()], {}
    for prefix, start, end in case.pieces():
        given = {"input_ids": case.ids[:, start:end], "attention_mask": case.mask[:, :end]}
        result = dict(zip(names, session.run(None, given | cache), strict=True))
        cache = {name: result[name.replace("past_key_values", "present")] for name in past}
        found |= {prefix + n: x for n, x in result.items() if x.size and not n.startswith("present")}
        if not prefix:
            found |= {n: x for n, x in result.items() if n.endswith(".key")}
    return found


main(load, run, map="onnxruntime-genai",
     engine=f"onnxruntime-genai {version('onnxruntime-genai')}, onnxruntime {onnxruntime.__version__}")  # fmt: skip
