"""Run one check: run the candidate's command, compare weights and tokens, judge the tensors, return a report.
Checked through the command line and in the tests of `refgemma.oracle`.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from refgemma.config import Gemma2Config
from refgemma.files import pluralise
from refgemma.hub import FOLLOW_LINKS, find_model
from refgemma.inputs import InputError
from refgemma.oracle.diagnose import Report, diagnose, report_on
from refgemma.oracle.engine import Engine
from refgemma.oracle.known_bugs import KNOWN_BUGS
from refgemma.oracle.preflight import Preflight, compare_tokens, compare_weights, open_weights
from refgemma.oracle.verdicts import EXACT, UNKNOWN
from refgemma.precision import Array, as_dtype, as_float64
from refgemma.tokenizer.tokenizer import Tokenizer, TokenizerError
from refgemma.trace.candidate import Candidate, load_trace
from refgemma.trace.name_maps import NameMap, load_map, map_names, match, open_any
from refgemma.trace.reader import TraceFile
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import Weights, tensor_shapes, weights_of

STDERR = 2  # number of the stream to which a subprocess writes
WATCHER = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"  # stdin closes when this process ends
NAMES_LIMIT = 2000  # names with which maps are compared
EMBEDDED = ("tiny", "conformance")
HALVES = ("bfloat16", "float16")


def read_candidate(
    path: str | Path, config: Gemma2Config, dtype: str | None = None, name_map: str | None = None
) -> Candidate:
    """Read a candidate's trace, and check that some tensor can be judged; the arguments are those of `load_trace`.

    Raises
    ------
    InputError
        As in `load_trace`; also if the file has no tensor of this model, or most tensors have the shapes of another.
    """
    candidate = load_trace(path, config, dtype, name_map)
    advice = "" if candidate.name_map else suggest_map(path, candidate.unknown)
    if not candidate.tensors and not candidate.refused:
        otherwise = "write at least the logits, under refgemma's names"
        raise InputError(f"{path}: has no tensor of this model; {advice or otherwise}")
    if len(candidate.refused) > len(candidate.tensors):
        name, problem = next(iter(candidate.refused.items()))
        fitting = [model for model in EMBEDDED if fits_model(path, model, name_map)]
        hint = (
            f"the shapes fit {fitting[0]}: use --model {fitting[0]}"
            if fitting
            else "give that model's folder with --model"
        )
        count = pluralise(len(candidate.refused) + len(candidate.tensors), "tensor")
        raise InputError(
            f"{path}: {len(candidate.refused)} of {count} have the shapes of another model ({name} {problem}); {hint}"
        )
    return replace(candidate, remarks=(*candidate.remarks, advice)) if advice else candidate


def fits_model(path: str | Path, model: str, name_map: str | None) -> bool:
    """Return True if most tensors of a trace have the shapes of a model inside this package."""
    try:
        found = load_trace(path, open_checkpoint(find_model(model)).config, None, name_map)
    except InputError:
        return False
    return len(found.refused) < len(found.tensors)


def suggest_map(path: str | Path, unknown: Sequence[str]) -> str:
    """Return advice to use the map that knows most of the unknown names of a file; it is empty if no map knows any."""
    file = open_any(path)
    some = replace(file, entries={name: file.entries[name] for name in unknown[:NAMES_LIMIT]})
    known = {name: _count_matches(some, load_map(name)) for name in map_names()}
    best = max(known, key=lambda name: (known[name], name == "transformers"))  # some maps share names
    unknown_names = pluralise(len(some.entries), "unknown name")
    return f"--map {best} knows {known[best]} of {unknown_names} in the file; give this map" if known[best] else ""


def _count_matches(file: TraceFile, names: NameMap) -> int:
    try:
        return len(match(file, names).found)
    except InputError:  # the map gives one name to several tensors
        return 0


def check(
    trace: str | Path | Candidate, model: str | Path = "tiny", *, config: Gemma2Config | None = None,
    dtype: str | None = None, name_map: str | None = None, weights: str | Path | None = None, override: float = 1.0,
    quantised: bool = False,
) -> Report:  # fmt: skip
    """Check another implementation's trace against the model; report the first wrong tensor and the reason.

    Parameters
    ----------
    trace : path or Candidate
        The trace file (see docs/how-to/write-a-trace.md), or the result of `load_trace`.
    model : str or path
        ``tiny``, ``conformance``, a Hugging Face folder or a hub id.
    config : Gemma2Config, optional
        The configuration to use instead of the model's own.
    dtype : str, optional
        The precision of the computation, if the file does not name it.
    name_map : str, optional
        The map for the file's names; see `refgemma.trace.name_maps`.
    weights : path, optional
        The weights of the implementation, a file or folder. They are compared with the model's weights first. If they
        are quantised, products with weights are judged with the quantised weights.
    override : float
        A factor on all tolerances. Every report shows it if it is not 1.
    quantised : bool
        If true, the weights are quantised; unless `weights` is given, products with weights do not affect the verdict.

    Returns
    -------
    Report
        The result. ``verdict`` is ``conforms``, ``differs``, ``noisy`` or ``inconclusive``. ``first_divergence`` is the
        first wrong tensor, or None. ``findings`` are the wrong tensors, each with the known bugs that explain it.
        ``excluded`` are the known bugs that the trace excludes.

    Raises
    ------
    InputError
        If the trace or the weights cannot be read, or does not fit the model.

    Examples
    --------
    >>> import tempfile, refgemma
    >>> import numpy as np
    >>> from refgemma.oracle import check, save_trace
    >>> from refgemma.trace.names import named_tensors
    >>> tiny = refgemma.load("tiny")
    >>> run = refgemma.forward([[2, 300, 400]], tiny.weights, tiny.config.changed(sliding_window=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tensors = [("input_ids", np.array([[2, 300, 400]])), *named_tensors(run)]
    ...     _ = save_trace(tensors, f"{folder}/port.safetensors", {"dtype": "float32"})
    ...     report = check(f"{folder}/port.safetensors")
    >>> report.verdict, report.first_divergence.tensor, report.findings[0].named
    ('differs', 'layers.0.attention.probs', 'sliding_window = 2')
    """
    folder = find_model(str(model))
    numbers = config or open_checkpoint(folder).config
    candidate = trace if isinstance(trace, Candidate) else read_candidate(trace, numbers, dtype, name_map)
    preflight, remarks = run_preflight(candidate, folder, numbers, weights)
    by_name = read_dequantised(weights, preflight, numbers)

    def read_weights(precision: str) -> Weights:
        if not by_name:
            return open_checkpoint(folder).weights(precision)
        return weights_of({name: as_dtype(x, precision) for name, x in by_name.items()}, numbers)

    found = diagnose(candidate, read_weights(candidate.dtype), numbers, override, quantised and not by_name)
    refused = found.candidate.refused  # another precision does not explain a wrong shape
    unknown = [f for f in found.findings if f.named == UNKNOWN and f.instances[0].tensor not in refused][:1]
    # Test only possible reasons: bugs of this tensor, and the closest bug.
    closest = [finding.closest[0] for finding in unknown if finding.closest]
    bugs = [v for v in KNOWN_BUGS if v in closest or any(finding.field in v.fields for finding in unknown)]
    others = [assume_dtype(found.candidate, other) for other in HALVES if unknown and other != candidate.dtype]
    again = [report_on(Engine(one, read_weights(one.dtype), numbers, override), bugs, numbers=True) for one in others]
    if by_name:
        remarks.append("products with weights are judged with the port's own, quantised weights")
    return replace(found, preflight=preflight, remarks=(*found.remarks, *remarks), again=tuple(again))


def assume_dtype(candidate: Candidate, dtype: str) -> Candidate:
    """Return the candidate, to be judged as if it had been computed in `dtype`, whatever its storage format."""
    tensors = {name: replace(x, storage=dtype) for name, x in candidate.tensors.items()}
    return replace(candidate, dtype=dtype, tensors=tensors, dtype_from="option")


def read_dequantised(
    weights: str | Path | None, preflight: Sequence[Preflight], config: Gemma2Config
) -> dict[str, Array]:
    """Return a port's weights, dequantised, if they are the model's weights in quantised form; else an empty dict."""
    words = {stage.named for stage in preflight if stage.verdict != EXACT}
    if weights is None or words != {"weights-quantised"}:
        return {}
    entries = open_weights(weights)
    return {name: as_float64(entries[name].read()) for name in tensor_shapes(config)}


def run_preflight(
    candidate: Candidate, folder: Path, config: Gemma2Config, weights: str | Path | None
) -> tuple[tuple[Preflight, ...], list[str]]:
    """Compare weights, if given, and tokens, if the trace has their text, before any computation."""
    compare_tensors = compare_weights(weights, folder, config) if weights else []
    if not {"text", "chat"} & set(candidate.metadata):
        return tuple(compare_tensors), []
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except TokenizerError as error:
        return tuple(compare_tensors), [f"tokens: not compared, because the model has no tokenizer ({error})"]
    row, seen = candidate.call.input_ids[0], candidate.call.visible[0]
    tokens = compare_tokens([int(n) for n in row[seen]], candidate.metadata, tokenizer)
    return (*([tokens] if tokens else []), *compare_tensors), []


def _run_words(words: list[str], folder: Path | None, environment: Mapping[str, str]) -> int:
    """Run a command and return its exit code; if this process ends, the command and all its processes end too."""
    command = subprocess.Popen(words, stdout=STDERR, cwd=folder, env=environment, start_new_session=True)
    watcher = subprocess.Popen([sys.executable, "-IS", "-c", WATCHER, str(command.pid)], stdin=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        return command.wait()
    except BaseException:
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()
        raise
    finally:
        watcher.kill()
        watcher.communicate()


def run_backend(command: str, trace: Path, folder: Path | None = None, follow_links: bool = False) -> str | None:
    """Run a candidate's command, which must write `trace`; return the problem, or ``None`` on success.

    The command's output goes to stderr, so that it cannot be confused with a report. If the command is refgemma,
    `follow_links` allows it to read a model's folder that consists of links.
    """
    before = trace.stat() if trace.exists() else None
    environment = os.environ | ({FOLLOW_LINKS: "1"} if follow_links else {})
    try:
        words = shlex.split(command)
        code = _run_words(words, folder, environment) if words else None
    except (OSError, ValueError) as error:
        return f"{command!r} cannot be run: {error}"
    if code is None:
        return "the command is empty"
    if code:
        return f"{words[0]} ended with exit code {code}"
    after = trace.stat() if trace.exists() else None
    if after is None or (before and (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)):
        return f"{words[0]} succeeded, but did not write {trace}"
    return None
