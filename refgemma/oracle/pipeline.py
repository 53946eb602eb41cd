"""A port and what is asked of it: its command is run, its weights and tokens are compared, its tensors are judged.
Checked through the command line."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

from refgemma.config import Gemma2Config
from refgemma.inputs import InputError
from refgemma.oracle.check import Report, check
from refgemma.oracle.preflight import Stage, tokens_stage, weights_stage
from refgemma.tokenizer.tokenizer import Tokenizer, TokenizerError
from refgemma.trace.candidate import Candidate, load_candidate
from refgemma.trace.name_maps import load_map, map_names, match, open_any
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Weights

STDERR = 2  # as a number: what a subprocess writes to


def read_port(
    path: str | Path, config: Gemma2Config, dtype: str | None = None, name_map: str | None = None
) -> Candidate:
    """A port's trace, of which something at least can be judged; arguments and errors are `load_candidate`'s."""
    candidate = load_candidate(path, config, dtype, name_map)
    if not candidate.tensors and not candidate.refused:
        raise InputError(f"{path}: holds no tensor of this model; {known_to(path, candidate)}")
    return candidate


def read_weights(folder: Path, dtype: str) -> Weights:
    """A model's weights in the candidate's precision."""
    return open_checkpoint(folder).weights(dtype)


def judged_port(
    candidate: Candidate, folder: Path, config: Gemma2Config, port_weights: str | None = None, override: float = 1.0
) -> Report:
    """All that can be said of a port: its weights, if a path of them is given, its tokens and its tensors.

    Parameters
    ----------
    candidate : Candidate
        From `read_port`.
    folder : Path
        The model that it claims to be.
    config : Gemma2Config
        Of that model, or the same with other numbers.
    port_weights : str, optional
        The port's weights, a file or folder.
    override : float
        A factor on what rounding may do, see `check`.
    """
    stages, remark = stages_of(candidate, folder, config, port_weights)
    found = check(candidate, read_weights(folder, candidate.dtype), config, override)
    return replace(found, stages=stages, remarks=(*found.remarks, *remark))


def stages_of(
    candidate: Candidate, folder: Path, config: Gemma2Config, port: str | None
) -> tuple[tuple[Stage, ...], list[str]]:
    """What comes before any computation: weights, if they are given, and tokens, if the trace says of what."""
    stages = weights_stage(port, folder, config) if port else []
    if not {"text", "chat"} & set(candidate.metadata):
        return tuple(stages), []
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except TokenizerError as error:
        return tuple(stages), [f"tokens: not compared, for the model has no tokenizer ({error})"]
    row, seen = candidate.call.input_ids[0], candidate.call.visible[0]
    tokens = tokens_stage([int(n) for n in row[seen]], candidate.metadata, tokenizer)
    return (*([tokens] if tokens else []), *stages), []


def run_backend(command: str, trace: Path, folder: Path | None = None) -> str | None:
    """Run a port's own command, in a folder, that writes `trace`; what went wrong, if anything did.

    What the command prints goes to stderr, where it cannot be taken for a report.
    """
    before = trace.stat() if trace.exists() else None
    try:
        words = shlex.split(command)
        code = subprocess.run(words, stdout=STDERR, check=False, cwd=folder).returncode if words else None
    except (OSError, ValueError) as error:
        return f"{command!r} cannot be run ({error})"
    if code is None:
        return "the command is empty"
    if code:
        return f"{words[0]} ended with code {code}"
    after = trace.stat() if trace.exists() else None
    if after is None or (before and (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)):
        return f"{words[0]} ended well, but did not write {trace}"
    return None


def known_to(path: str | Path, candidate: Candidate) -> str:
    """What to do about a file without a name of ours."""
    file = open_any(path)
    counts = {name: len(match(file, load_map(name)).found) for name in map_names()} if not candidate.name_map else {}
    fitting = [f"--map {name} knows {n}" for name, n in counts.items() if n]
    return f"but {', '.join(fitting)} of them" if fitting else "logits at the least are needed"
