"""Read the folder that SGLang's ``--debug-tensor-dump-output-folder`` writes: for each process a folder, with one file
of `torch.save` for each forward pass.

Checked on files that the dumper of SGLang 0.5.23 wrote for a model with SGLang's modules
(``tools/write_sglang.py``), not on a run of SGLang itself, which needs a GPU. No pickle is executed.

A file has the outputs of the modules without submodules, by the modules' names. The dumper writes a file when the inner
model returns. So results of the outer modules, such as the logits, are in the file of the next pass.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from refgemma.convert.pickles import read_tensors
from refgemma.inputs import InputError
from refgemma.precision import Array
from refgemma.trace.reader import Entry, TraceFile
from refgemma.weights.save import CODE_OF_DTYPE
from refgemma.weights.stored import CheckpointError, Stored

RANK = re.compile(r"TP(\d{1,4})_PP(\d{1,4})_Rank\d{1,5}_pid\d{1,10}")
PASSES = "Pass[0-9]*.pt"
INNER, BATCH = "model.", "model.forward_batch_info."
# Modules whose result is split between the processes; all others return the same in each process.
SPLIT = re.compile(r".*\.(qkv_proj|gate_up_proj|act_fn|attn)(#\d+)?")
HOW_TO_DUMP = "dump one request at a time, with --disable-cuda-graph and --skip-server-warmup"

Pass = dict[str, list[Stored]]  # name -> the tensor of each process


def find_ranks(path: str | Path) -> list[Path]:
    """Return the folders of a dump's processes in their order, given the dump or one of these; none for other paths.

    Examples
    --------
    >>> find_ranks("port.safetensors")
    []
    """
    given = Path(path)
    if not given.is_dir():
        return []
    found = [(int(m[1]), folder) for folder in (given, *given.iterdir()) if (m := RANK.fullmatch(folder.name))]
    return [folder for _, folder in sorted(found)]


def open_ranks(ranks: Sequence[Path]) -> TraceFile:
    """Open the last text of a dump; split tensors have a first axis ``ranks``, with one element for each process.

    A text is a pass whose first position is 0, with the passes behind it. If there are several, they are calls.

    Raises
    ------
    InputError
        If the files are not such a dump, or hold more than one text at a time.
    """
    where = str(ranks[0].parent)
    numbers = [int(m[1]) for folder in ranks if (m := RANK.fullmatch(folder.name))]
    if numbers != list(range(len(ranks))) or any("_PP0_" not in folder.name for folder in ranks):
        raise InputError(f"{where}: must have one folder for each tensor-parallel process, and one pipeline stage")
    files = [sorted(folder.glob(PASSES)) for folder in ranks]
    if not files[0] or len({tuple(file.name for file in one) for one in files}) > 1:
        raise InputError(f"{where}: the processes must have the same passes, and at least one; {HOW_TO_DUMP}")
    try:
        passes = [_join_ranks([read_tensors(file) for file in one], where) for one in zip(*files, strict=True)]
    except CheckpointError as error:
        raise InputError(str(error)) from None
    return _open_text(_last_text(passes, where), where, len(ranks))


def _join_ranks(ranks: Sequence[dict[str, Stored]], where: str) -> Pass:
    for name in ranks[0]:
        shapes = {rank[name].shape if name in rank else None for rank in ranks}
        if len(shapes) > 1:
            raise InputError(f"{where}: {name} has other shapes in some processes: {shapes}")
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def _last_text(passes: list[Pass], where: str) -> list[Pass]:
    """Return the passes of the last text, each with the results of the outer modules for it.

    The last pass of several has no such tensors, and is left out; only its file is needed.
    """
    inner = [{name: x for name, x in one.items() if name.startswith(INNER)} for one in passes]
    outer = [{name: x for name, x in one.items() if not name.startswith(INNER)} for one in passes[1:]]
    for one in inner:
        given = [one.get(f"{BATCH}{name}") for name in ("input_ids", "positions", "seq_lens")]
        if any(x is None or x[0].dtype.kind not in "iu" or len(x[0].shape) != 1 or not all(x[0].shape) for x in given):
            raise InputError(f"{where}: a pass has no tokens, positions or lengths; {HOW_TO_DUMP}")
    starts = [n for n, one in enumerate(inner) if one[f"{BATCH}positions"][0].map()[0] == 0]
    if not starts:
        raise InputError(f"{where}: no pass begins a text; {HOW_TO_DUMP}")
    text = [one | more for one, more in zip(inner, [*outer, {}], strict=True)][starts[-1] :]
    text = text[:-1] or text
    if any(one[f"{BATCH}seq_lens"][0].shape != (1,) for one in text):
        raise InputError(f"{where}: has tensors of several texts at once; {HOW_TO_DUMP}")
    return text


def _open_text(text: list[Pass], where: str, ranks: int) -> TraceFile:
    given = {
        ours: np.concatenate([one[f"{BATCH}{theirs}"][0].map() for one in text])[None].astype(np.int64)
        for ours, theirs in (("input_ids", "input_ids"), ("position_ids", "positions"))
    }
    entries = {name: Entry("I64", x.shape, partial(np.copy, x)) for name, x in given.items()}
    lengths = [one[f"{BATCH}input_ids"][0].shape[0] for one in text]
    prefixes = [f"calls.{n}." if len(text) > 1 else "" for n in range(len(text))]
    for prefix, one in zip(prefixes, text, strict=True):
        for name, found in one.items():
            if not name.startswith(BATCH):
                entries[prefix + name] = _open_entry(found, bool(SPLIT.fullmatch(name)))
    calls = {"calls": json.dumps(lengths)} if len(text) > 1 else {}
    about = {"map": "sglang", "engine": f"SGLang, {ranks} tensor-parallel", **calls}
    return TraceFile(where, about, entries, dict(zip(prefixes, lengths, strict=True)))


def _open_entry(found: list[Stored], split: bool) -> Entry:
    first = found[0]

    def read() -> Array:
        return np.stack([x.map() for x in found]) if split else np.array(first.map())

    code = CODE_OF_DTYPE.get(first.dtype, f"{first.dtype.kind.upper()}{8 * first.dtype.itemsize}")
    return Entry(code, (len(found), *first.shape) if split else first.shape, read)
