"""Read the jobs of a sweep, compute their keys, and run a job. Checked in the tests with `sweep`.

A file of jobs has one JSON object per line. A job is a `trace` to check, or a command to `run` that writes a trace. The
command gets a `prompt` and a `model`, whose `config` may be changed. If a value is a list, each element makes a job;
several lists make every combination.

A job's key is a hash of everything that determines its result: its fields (with the contents of files instead of their
names) and this package's code.
"""

import hashlib
import itertools
import json
import math
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from refgemma.config import Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.files import hash_file, parse_object, quote, read_file
from refgemma.hub import find_model
from refgemma.inputs import InputError
from refgemma.oracle.diagnose import Report
from refgemma.oracle.pipeline import check, read_candidate, run_backend
from refgemma.oracle.verdicts import FAILED, UNREADABLE
from refgemma.sweep.tally import Tally, merge_tallies, tally
from refgemma.trace.candidate import Candidate
from refgemma.trace.name_maps import load_map, map_names
from refgemma.trace.names import field_of
from refgemma.trace.reader import open_safetensors
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.parameters import tensor_shapes

KEPT = "refgemma-sweep-job/2"
FIELDS_OF_A_JOB = {
    "name": str, "trace": str, "run": str, "prompt": str, "model": str, "config": dict, "dtype": str, "map": str,
    "weights": str, "allow": float,
}  # fmt: skip
JOBS_LIMIT = 100_000  # maximum number of jobs per line
OF_A_MODEL = (".json", ".safetensors", ".model")

Done = dict[str, Any]
"""The stored result of a job: the verdict in words, and a `Tally` for every kind of tensor."""


@dataclass(frozen=True)
class Job:
    """A check to run; file names are absolute."""

    name: str
    fields: Mapping[str, Any]
    folder: str  # working folder of the command
    key: str
    code: str  # hash of the package's code


# --- the file of jobs -------------------------------------------------------------------------------------------------


def read_jobs(path: str | Path) -> list[Job]:
    """Read the jobs of a file, drop duplicates, and sort by name.

    Raises
    ------
    InputError
        If a line is not a job, or names a file or a model that does not exist.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: {'is a folder; give a file of jobs' if file.is_dir() else 'no such file'}")
    try:
        lines = read_file(file).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text; it must have one JSON object per line") from None
    content.cache_clear()
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found = [_job(fields, file.resolve().parent) for fields in _combinations(line)]
            except (RefgemmaError, OSError) as error:
                raise InputError(f"{path}, line {number}: {error}") from None
            for job in found:
                jobs.setdefault(job.key, job)
    if not jobs:
        raise InputError(f"{path}: contains no job")
    return sorted(jobs.values(), key=lambda job: (job.name, job.key))


def _combinations(line: str) -> Iterator[dict[str, Any]]:
    """Yield every combination of a line's lists."""
    given = parse_object(line.encode())
    choices = [[(field, v) for v in (value if isinstance(value, list) else [value])] for field, value in given.items()]
    if (count := math.prod(map(len, choices))) > JOBS_LIMIT:
        raise InputError(f"the lists make {count} jobs; the limit per line is {JOBS_LIMIT}")
    yield from (dict(chosen) for chosen in itertools.product(*choices))


def _job(fields: dict[str, Any], folder: Path) -> Job:
    for field, value in fields.items():
        kind = FIELDS_OF_A_JOB.get(field)
        if kind is None:
            raise InputError(f"unknown field {field!r}; the fields are {', '.join(FIELDS_OF_A_JOB)}")
        if not isinstance(value, kind) and not (kind is float and type(value) is int):
            raise InputError(f"{field} is {quote(value)}; it must be a {'number' if kind is float else kind.__name__}")
        if isinstance(value, str) and not value.isprintable():  # a file name has no NUL and no half surrogate pair
            raise InputError(f"{field} is {quote(value)}; it must have only printable characters")
    if ("trace" in fields) == ("run" in fields):
        raise InputError("give either trace (a file) or run (a command that writes one), not both or neither")
    given: dict[str, Any] = {"model": "tiny", "allow": 1.0} | fields
    if not 0 < given["allow"] <= sys.float_info.max:
        raise InputError(f"allow is {quote(given['allow'])}; it must be a factor above 0")
    command = given.get("run", "{trace} {prompt}" if "prompt" in given else "{trace}")
    if "{trace}" not in command or ("prompt" in given) != ("{prompt}" in command):
        raise InputError(
            "run must contain {trace}, for the file to write, and {prompt} if (and only if) the job has a prompt"
        )
    for field in ("trace", "prompt", "weights"):
        if field in given:
            given[field] = str(folder / given[field])
    if "map" in given and given["map"] not in map_names():
        given["map"] = str(folder / given["map"])
    if given["model"] not in ("tiny", "conformance") and (folder / given["model"]).is_dir():
        given["model"] = str(folder / given["model"])
    change_config(given)
    name = given.pop("name", None) or _describe_job(fields)
    return Job(name, given, str(folder), _key(given, folder), code())


def _describe_job(fields: Mapping[str, Any]) -> str:
    """Return a name for a job that has none, from its other fields."""
    first = fields.get("trace") or fields["run"]
    others = {k: v for k, v in sorted(fields.items()) if k not in ("trace", "run")}
    return " ".join([first, *(f"{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in others.items())])


def change_config(fields: Mapping[str, Any]) -> Gemma2Config:
    """Return the configuration of a job's model with the job's changes, which must not change the shapes of weights."""
    config = open_checkpoint(find_model(fields["model"])).config
    changed = config.changed(**fields.get("config", {}))
    if tensor_shapes(changed) != tensor_shapes(config):
        raise InputError("config changes the shapes of the model's weights; give a model with these sizes")
    return changed


# --- keys -------------------------------------------------------------------------------------------------------------


@lru_cache
def content(path: str) -> str:
    """Return the hash of a file or of a model's folder."""
    if Path(path).is_dir():
        return _hash(sorted((p.name, content(str(p))) for p in Path(path).iterdir() if p.suffix in OF_A_MODEL))
    return hash_file(path)


@lru_cache
def code() -> str:
    """Return a hash of this package's sources and NumPy's version, which together determine the results."""
    package = Path(__file__).parents[1]
    sources = sorted((p.relative_to(package).as_posix(), content(str(p))) for p in package.rglob("*.py"))
    maps = [(name, content(str(package / "trace" / "maps" / f"{name}.json"))) for name in map_names()]
    return _hash([np.__version__, sources, maps])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(fields: Mapping[str, Any], folder: Path) -> str:
    """Return the hash under which a job's result is stored; it includes the files that a command names."""
    decides = dict(fields) | {"model": content(str(find_model(fields["model"])))}
    for field in ("trace", "prompt", "weights"):
        if field in fields:
            decides[field] = content(fields[field])
    if "map" in fields and fields["map"] not in map_names():
        load_map(fields["map"])
        decides["map"] = content(fields["map"])
    if "run" in fields:
        try:
            words = shlex.split(fields["run"])
        except ValueError as error:
            raise InputError(f"run is not a valid command: {error}") from None
        programs = [shutil.which(word) or str(folder / word) for word in words]
        decides["programs"] = [content(p) for p in programs if Path(p).is_file()]
    return _hash([KEPT, decides, code()])


# --- one job ----------------------------------------------------------------------------------------------------------


def perform(job: Job) -> Done:
    """Run one job, in any process; an error of the job becomes the job's result.

    Raises
    ------
    InputError
        If this process runs different code than the process that made the job.
    """
    if job.code != code():
        raise InputError(
            "a worker has another version of refgemma or NumPy than this process; install the same versions on both"
        )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return _run_job(job, Path(scratch))
        except (RefgemmaError, OSError) as error:
            said = str(error).replace(f"{scratch}/", "").replace(f"{job.folder}/", "")  # the same on every machine
            return fail(UNREADABLE, " ".join(said.split()))


def _run_job(job: Job, scratch: Path) -> Done:
    fields = job.fields
    config, folder = change_config(fields), find_model(fields["model"])
    trace = fields.get("trace") or str(scratch / "trace.safetensors")
    if "run" in fields:
        model = _with_config(folder, config, scratch / "model") if fields.get("config") else folder
        places = {"{model}": str(model), "{prompt}": fields.get("prompt", ""), "{trace}": trace}
        command = fields["run"]
        for place, path in places.items():
            command = command.replace(place, shlex.quote(path))
        if problem := run_backend(command, Path(trace), Path(job.folder), follow_links=model != folder):
            return fail(FAILED, problem.replace(f"{scratch}/", ""))
    candidate = read_candidate(trace, config, fields.get("dtype"), fields.get("map"))
    if "prompt" in fields:
        _same_tokens(candidate, fields["prompt"])
    report = check(candidate, folder, config=config, weights=fields.get("weights"), override=fields["allow"])
    return summarize(report)


def _with_config(folder: Path, config: Gemma2Config, target: Path) -> Path:
    """Make a folder with links to the model's files and a changed config.json."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file.resolve())
    config.save_pretrained(target)
    return target


def _same_tokens(candidate: Candidate, prompt: str) -> None:
    asked = open_safetensors(prompt).entries.get("input_ids")
    if asked is not None and not np.array_equal(asked.read(), candidate.call.input_ids):
        raise InputError("the input_ids of the trace differ from the prompt's; run the port on the prompt")


def fail(verdict: str, message: str) -> Done:
    """Return the result of a failed job."""
    return {"schema": KEPT, "verdict": verdict, "message": message, "dtype": "", "first_divergence": None, "named": "",
            "excluded": [], "blind": [], "found": [], "tensors": {}}  # fmt: skip


def summarize(report: Report) -> Done:
    """Return the stored result of a check: its verdict, and a tally for every kind of tensor."""
    kinds: dict[str, list[Tally]] = {}
    for instance in report.instances:
        kinds.setdefault(field_of(instance.tensor), []).append(tally(instance))
    first = report.first_divergence
    stage = report.wrong_preflight[0] if report.wrong_preflight else None
    named = stage.named if stage else report.findings[0].named if report.findings else ""
    return {
        "schema": KEPT, "verdict": report.verdict, "message": "; ".join(report.remarks),
        "dtype": report.candidate.dtype,
        "first_divergence": stage.name if stage else first.tensor if first else None, "named": named,
        "excluded": [v.name for v in report.excluded], "blind": [v.name for v in report.undetectable],
        "found": sorted({v.name for f in report.findings for v in f.explanations}),
        "tensors": {kind: merge_tallies(some).as_json() for kind, some in kinds.items()},
    }  # fmt: skip
