"""Onnxruntime-genai on the folder that its model builder writes: the logits, in calls of any length."""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai
from glue import main


def load(folder, dtype):
    target = Path(tempfile.mkdtemp())
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run([*builder, "-i", str(folder), "-o", str(target), "-c", str(target / "cache")], check=True)
    return onnxruntime_genai.Model(str(target))


def run(model, case):
    case.only(calls=True)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=case.ids.shape[1] + 8)
    generator, found = onnxruntime_genai.Generator(model, parameters), {}
    for prefix, start, end in case.pieces():
        generator.append_tokens(case.ids[:, start:end].astype(np.int32))
        found[f"{prefix}logits"] = generator.get_output("logits")
    return found


main(load, run, engine=f"onnxruntime-genai {version('onnxruntime-genai')}")
