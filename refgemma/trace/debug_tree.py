"""Read the folder that transformers' ``model_addition_debugger_context`` writes: one safetensors file for each tensor.

Checked in ``tests/parity/test_maps_parity.py``. The context needs ``use_repr=False``; otherwise it writes the tensors
as text, without most of their numbers. The outputs of modules without submodules have the modules' names, as in the map
``transformers``; inputs have the suffix ``_inputs_args_0``.
"""

from dataclasses import replace
from pathlib import Path

from refgemma.inputs import InputError
from refgemma.precision import Array
from refgemma.trace.reader import Entry, TraceFile, open_safetensors

TREE = "_debug_tree_FULL_TENSORS.json"
ONLY_TENSOR = "data"  # the name of the only tensor in each file


def find_debug_tree(path: str | Path) -> Path | None:
    """Return the tree that the debugger wrote, given its folder or the tree itself; None for any other path."""
    given = Path(path)
    found = sorted(given.glob(f"*{TREE}")) if given.is_dir() else [given] if given.name.endswith(TREE) else []
    return found[0] if found else None


def open_debug_tree(tree: Path) -> TraceFile:
    """Open the tensors beside a tree; each is read from its own file.

    Raises
    ------
    InputError
        If the folder has no tensor files, or a file has other tensors.
    """
    model = tree.name.removesuffix(TREE)
    top = {f"{model}_outputs_logits": "logits"} | {
        f"{model}_inputs_{way}": name
        for name, place in (("input_ids", "args_0"), ("attention_mask", "args_1"), ("position_ids", "args_2"))
        for way in (f"kwargs_{name}", place)
    }
    entries = {}
    for file in sorted(tree.parent.glob(f"{model}*.safetensors")):
        name = file.stem.removeprefix(f"{model}.").removesuffix("_outputs")
        entries[top.get(name, name)] = _open_only(file)
    if not entries:
        raise InputError(
            f"{tree}: its folder has no tensor files; call model_addition_debugger_context with use_repr=False"
        )
    return TraceFile(str(tree.parent), {"map": "transformers", "engine": f"transformers, {model}"}, entries)


def _open_only(file: Path) -> Entry:
    """Return the only tensor of a file, which is opened again when it is read."""
    entries = open_safetensors(file).entries
    if set(entries) != {ONLY_TENSOR}:
        raise InputError(
            f"{file}: has the tensors {', '.join(sorted(entries)[:3])}; it must have one, named {ONLY_TENSOR}"
        )

    def read() -> Array:
        return open_safetensors(file).entries[ONLY_TENSOR].read()

    return replace(entries[ONLY_TENSOR], read=read)
