"""An ONNX file by optimum's exporter, run by onnxruntime, with and without a cache, or by transformers.js: logits."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from glue import main


def load(folder, dtype, runner):
    from optimum.exporters.onnx import main_export

    target = Path(tempfile.mkdtemp())
    source = shutil.copytree(folder, target / "source")
    main_export(str(source), str(target / "onnx"), task="text-generation-with-past", dtype="fp32", device="cpu",
                no_post_process=True, do_validation=False)  # fmt: skip
    if runner == "transformers.js":
        (target / "onnx" / "onnx").mkdir()
        for path in (target / "onnx").glob("model.onnx*"):
            path.rename(target / "onnx" / "onnx" / path.name)
        return target / "onnx"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(target / "onnx" / "model.onnx", options)


def run(session, case):
    if isinstance(session, Path):
        return run_node(session, case)
    past = {x.name: x for x in session.get_inputs() if x.name.startswith("past_key_values")}
    rows, length = case.ids.shape
    cache = {name: np.zeros((rows, x.shape[1], 0, x.shape[3]), np.float32) for name, x in past.items()}
    names, found = [x.name for x in session.get_outputs()], {}
    positions = np.maximum(case.mask.cumsum(-1) - 1, 0) if case.padded else np.arange(length)[None]
    asked = {x.name for x in session.get_inputs()}
    for prefix, start, end in case.pieces():
        given = {"input_ids": case.ids[:, start:end], "attention_mask": case.mask[:, :end],
                 "position_ids": positions[:, start:end]}  # fmt: skip
        result = session.run(None, {name: x for name, x in given.items() if name in asked} | cache)
        by_name = dict(zip(names, result, strict=True))
        cache = {name: by_name[name.replace("past_key_values", "present")] for name in past}
        found[f"{prefix}logits"] = by_name["logits"]
    return found


def run_node(folder, case):
    """Run the same file in transformers.js, which gives the logits as text."""
    case.only(calls=False, padding=True)
    about = {"folder": str(folder), "input_ids": case.ids.tolist(), "attention_mask": case.mask.tolist()}
    program = Path(__file__).parent / "logits.mjs"
    done = subprocess.run(["node", str(program)], input=json.dumps(about), capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {"logits": np.array(json.loads(done.stdout), np.float32).reshape(*case.ids.shape, -1)}


main(load, run, engine=f"optimum-onnx, {sys.argv[0]}")
