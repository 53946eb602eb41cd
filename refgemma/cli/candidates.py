"""Run the commands of the oracle: `check`, `sweep`, `diff` and others. This file reads the arguments and prints the
results. Checked through the command line."""

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import refgemma
from refgemma.cli import output
from refgemma.config import ConfigError, Gemma2Config
from refgemma.errors import UsageError
from refgemma.files import pluralise, replace_file
from refgemma.hub import find_model
from refgemma.modeling.pretrained import load
from refgemma.oracle import report as reports
from refgemma.oracle.audit import as_json as audit_json
from refgemma.oracle.audit import audit, text_lines
from refgemma.oracle.config_check import check_preset, preset_json
from refgemma.oracle.config_check import lines as config_lines
from refgemma.oracle.coverage import DTYPES as PRECISIONS
from refgemma.oracle.coverage import Detected, cover, detect, list_undetected, write_prompts
from refgemma.oracle.coverage import as_json as prompts_json
from refgemma.oracle.diagnose import Report
from refgemma.oracle.diff import Difference, compare_traces, measure_unexplained
from refgemma.oracle.diff import as_json as difference_json
from refgemma.oracle.engine import Engine
from refgemma.oracle.judge import Statistics
from refgemma.oracle.known_bugs import KNOWN_BUGS
from refgemma.oracle.optimizer_bugs import OPTIMIZER_BUGS
from refgemma.oracle.page import render_report
from refgemma.oracle.pipeline import check, read_candidate, run_backend
from refgemma.oracle.prompts import prompts
from refgemma.oracle.repro import make_repro
from refgemma.oracle.training_bugs import TRAINING_BUGS
from refgemma.oracle.verdicts import CONFORMS, DIFFERS, EXIT, FAILED, INCONCLUSIVE
from refgemma.sweep.jobs import read_jobs
from refgemma.sweep.runner import as_json as sweep_json
from refgemma.sweep.runner import cluster, processes, sweep
from refgemma.trace.candidate import Candidate, is_known, load_trace
from refgemma.trace.name_maps import apply_map, load_map, map_names, match, open_any, split_call
from refgemma.trace.names import list_names, save_trace
from refgemma.trace.server import Server
from refgemma.weights.checkpoint import open_checkpoint
from refgemma.weights.conformance import proportions, write_conformance
from refgemma.weights.parameters import Weights, tensor_shapes

DIFF_ROWS = 20  # tensors that `diff` lists: after the first difference, most of a model's tensors differ
CONFORMANCE_LIMIT = 10**8  # weights: 200 MB
MOST_SECONDS = 86400.0
MODEL_SUFFIXES = (".json", ".safetensors", ".gguf")
EXIT_CODES = (
    "Exit codes: 0 conforms, 1 differs, 2 misuse or bad file, 3 only noisy, 4 inconclusive, 5 the backend failed."
)


def add_commands(add: Callable[..., Any]) -> None:
    """Add the commands to the parser.

    `add` makes a command from its name, a sentence, and a flag that hides it from --help.
    """
    command = add("check", "find the first wrong tensor of another implementation, and the known bug that explains it")
    command.epilog = EXIT_CODES
    command.add_argument("candidate", metavar="CANDIDATE", help="the trace file of the implementation")
    command.add_argument(
        "--model", default="tiny", metavar="MODEL", help="tiny, conformance or a folder (default: tiny)"
    )
    command.add_argument(
        "--dtype", choices=output.DTYPES, help="the arithmetic of the implementation, if the file does not name it"
    )
    command.add_argument("--allow", type=float, default=1.0, metavar="X",
                         help="multiply all tolerances by X; every report shows X")  # fmt: skip
    for kind in ("html", "markdown", "junit"):
        command.add_argument(f"--{kind}", metavar="FILE", help=f"write the report as {kind} too")
    command.add_argument("--card", metavar="FILE",
                         help="write a verification card: files, versions, verdict, undetectable bugs")  # fmt: skip
    command.add_argument("--repro", "--bundle", dest="bundle", metavar="FILE",
                         help="write a repro file of the first finding: inputs and result, at most 1 MB")  # fmt: skip
    command.add_argument(
        "--map", metavar="NAME", help=f"the map for the file's names: {', '.join(map_names())}, or a file"
    )
    command.add_argument("--weights", metavar="PATH",
                         help="file or folder with the port's weights, compared with the model's first")  # fmt: skip
    command.add_argument("--quantised", action="store_true",
                         help="ignore products with weights in the verdict, unless --weights is given")  # fmt: skip
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
                         help="change a number of the model before judging; every report line shows it")  # fmt: skip
    command.add_argument("--run", metavar="COMMAND",
                         help="run this command first, to write CANDIDATE; exit with 5 if it fails")  # fmt: skip

    command = add("audit", "ask an OpenAI-compatible server for numbers, and find whether it serves a checkpoint")
    command.add_argument("url", metavar="URL", help="the server's address: http://localhost:8000")
    command.add_argument("--model", default="conformance", metavar="MODEL",
                         help="the checkpoint that it should serve (default: conformance)")  # fmt: skip
    command.add_argument("--served", default="", metavar="NAME",
                         help="the server's name for the model (default: the first that it lists)")  # fmt: skip
    command.add_argument("--api-key-env", metavar="NAME", help="the environment variable with the API key")
    command.add_argument("--tokens", type=int, default=64, metavar="N",
                         help="the most tokens of a text; more than the window show it (default: 64)")  # fmt: skip
    command.add_argument("--requests", type=int, default=64, metavar="N",
                         help="requests for a prompt that the server does not repeat (default: 64)")  # fmt: skip
    command.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for a request (default: 60)")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
                         help="change a number of the model before judging")  # fmt: skip
    command.epilog = (
        "Exit codes: 0 serves it, 1 differs, 2 misuse or bad answer, 3 only noisy or quantised, 4 inconclusive."
    )

    command = add("conformance", "write a small model that shows every known bug, in a size that your engine loads")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="an empty folder, or none yet")
    command.add_argument("--head-dim", type=int, default=64, metavar="N",
                         help="even; hidden_size becomes 5 N, the query scalar 5 N / 4 (default: 64)")  # fmt: skip
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
                         help="change a number of the configuration: query_pre_attn_scalar=64")  # fmt: skip

    command = add("check-config", "compare an engine's configuration with that of a released model")
    command.add_argument("source", metavar="FILE|MODULE:NAME",
                         help="config.json, a .gguf, FILE.py:FUNCTION, or MODULE:OBJECT")  # fmt: skip
    command.add_argument(
        "--size", metavar="SIZE", help="2b, 9b or 27b (default: the release with the most equal numbers)"
    )
    command.epilog = "Exit codes: 0 conforms, 1 a number differs, 2 misuse or bad file, 4 a number is not given."

    command = add("map", "show which tensors of a file a name map knows")
    command.epilog = "Exit codes: 0 the map knows every tensor, 2 misuse or bad file, 4 it does not."
    command.add_argument("file", metavar="FILE")
    command.add_argument("--map", metavar="NAME", help="a name map or a file; required unless FILE names one")
    command.add_argument(
        "--model", default="tiny", metavar="MODEL", help="the model that gives the lengths of the axes"
    )

    command = add("diff", "compare two traces: find the first difference, and the first not caused by rounding")
    command.add_argument("a", metavar="A", help="a trace")
    command.add_argument("b", metavar="B", help="another trace of the same tokens")
    command.add_argument("--model", metavar="MODEL", help="the model of both traces; with it, each operation is judged")
    command.epilog = (
        "Exit codes: 0 the same numbers (with --model: rounding explains all differences), 1 different, "
        "2 misuse or bad file, 4 some tensors are in only one trace, or none are in both."
    )

    command = add("prompts", "list prompts that together show every known bug that can show")
    command.add_argument(
        "--cover",
        action="store_true",
        help="find the known bugs that each prompt shows, and choose few prompts that show all",
    )
    command.add_argument(
        "-o", "--output", metavar="DIR", help="write the prompts; with --cover, write the bugs that each shows"
    )
    command.add_argument("--model", default="conformance", metavar="MODEL", help="the model (default: conformance)")

    command = add("sweep", "check many traces, or many runs of a port; skip finished jobs")
    command.add_argument("jobs", metavar="JOBS", help="a file with one JSON object per line; see docs/how-to/sweep.md")
    command.add_argument("--workers", type=int, metavar="N",
                         help="processes on this machine (default: one per processor)")  # fmt: skip
    command.add_argument("--scheduler", metavar="ADDRESS", help="use the workers of this Dask cluster instead")
    command.add_argument("--results", metavar="DIR", help="the folder for results (default: JOBS.results)")
    command.add_argument("--again", action="store_true", help="repeat finished jobs, too")
    command.epilog = f"{EXIT_CODES} The worst verdict counts, in the order 1, 5, 2, 4, 3, 0."

    for name in ("known-bugs", "variants"):  # the second is the name in version 0.1
        command = add(name, "list the known bugs of Gemma 2 implementations, or describe one", name == "variants")
        command.add_argument("name", nargs="?", metavar="NAME")


def run_check(args: argparse.Namespace) -> int:
    """Run ``refgemma check``."""
    # The repro comes first, because it alone may be refused: then no file is left.
    outputs = {kind: path for kind in ("bundle", "html", "markdown", "junit", "card") if (path := getattr(args, kind))}
    folder = find_model(args.model)
    output.check_outputs(
        {f"--{'repro' if kind == 'bundle' else kind}": path for kind, path in outputs.items()},
        (args.candidate, args.weights, args.map, folder),
    )
    if not args.allow > 0 or not np.isfinite(args.allow):
        raise UsageError(f"--allow is {args.allow}; it must be a factor above 0")
    config, changed = change_numbers(open_checkpoint(folder).config, args.changes), ", ".join(args.changes)
    if args.run is not None and (problem := run_backend(args.run, Path(args.candidate))) is not None:
        output.say(f"refgemma check: --run: {problem}", error=True)
        return EXIT[FAILED]
    candidate = read_candidate(args.candidate, config, args.dtype, args.map)
    found = check(candidate, folder, config=config, weights=args.weights, override=args.allow, quantised=args.quantised)
    found = replace(found, changed=changed)
    made = {"html": render_report, "markdown": reports.markdown, "junit": reports.junit}
    for kind, path in outputs.items():
        if kind == "bundle":
            write_repro(candidate, open_checkpoint(folder).weights(candidate.dtype), found, path)
        elif kind == "card":
            files = list_files({"candidate": Path(args.candidate), "model": folder, "weights": args.weights})
            replace_file(path, reports.card(found, args.model, files, refgemma.__version__).encode())
        else:
            replace_file(path, made[kind](found, args.model).encode())
    output.as_json(reports.as_json(found, args.model)) if args.json else output.say(
        *reports.text(found, args.model).split("\n")
    )
    return EXIT[found.verdict]


def list_files(roles: Mapping[str, str | Path | None]) -> dict[str, Path]:
    """Return the files of each role; a folder stands for its configuration and weights."""
    files: dict[str, Path] = {}
    for role, path in roles.items():
        if path is not None and Path(path).is_dir():
            found = sorted(p for p in Path(path).iterdir() if p.suffix in MODEL_SUFFIXES and p.is_file())
            files |= {f"{role}/{p.name}": p for p in found}
        elif path is not None:
            files[role] = Path(path)
    return files


def run_audit(args: argparse.Namespace) -> int:
    """Run ``refgemma audit``."""
    if not 0 < args.timeout <= MOST_SECONDS:
        raise UsageError(f"--timeout is {args.timeout}; it must be above 0 and at most {MOST_SECONDS}")
    key = os.environ.get(args.api_key_env, "") if args.api_key_env else ""
    if args.api_key_env and not key:
        raise UsageError(f"--api-key-env: there is no environment variable {args.api_key_env!r}, or it is empty")
    config = change_numbers(open_checkpoint(find_model(args.model)).config, args.changes)
    server = Server(args.url, args.served, key, args.timeout)
    found, against = (
        audit(server, args.model, args.tokens, args.requests, config),
        ", ".join([args.model, *args.changes]),
    )
    output.as_json(audit_json(found, against)) if args.json else output.say(*text_lines(found, against))
    return EXIT[found.verdict]


def run_conformance(args: argparse.Namespace) -> int:
    """Run ``refgemma conformance``."""
    if args.head_dim < 2:
        raise UsageError(f"--head-dim is {args.head_dim}; it must be an even number above 0")
    target = Path(args.output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"-o {target}: must be an empty folder, or none yet")
    config = read_changes(proportions(args.head_dim), args.changes)
    if sum(math.prod(shape) for shape in tensor_shapes(config).values()) > CONFORMANCE_LIMIT:
        raise UsageError(f"more than {CONFORMANCE_LIMIT:,} weights; for large models use refgemma synth")
    write_conformance(target, config)
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    if args.json:
        output.as_json({"folder": args.output, "config": config.to_dict(), "files": files, "weights": "random"})
    else:
        output.say(f"{args.output}: random (untrained) weights, {sum(files.values()):,} bytes in {', '.join(files)}")
    return 0


def change_numbers(config: Gemma2Config, changes: Sequence[str]) -> Gemma2Config:
    """Return the configuration of `read_changes`; refuse it if the shapes of the weights change.

    Raises
    ------
    UsageError
        As in `read_changes`, or if a shape changes.
    """
    changed = read_changes(config, changes)
    if tensor_shapes(changed) != tensor_shapes(config):
        raise UsageError(
            "--set: these values change the shapes of the weights; give a model that has them with --model"
        )
    return changed


def read_changes(config: Gemma2Config, changes: Sequence[str]) -> Gemma2Config:
    """Return the configuration after the changes ``NAME=VALUE``; values are JSON.

    Raises
    ------
    UsageError
        If a field does not exist, or a value does not fit the model.
    """
    values: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        try:
            values[name] = json.loads(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--set is {change!r}; it must be NAME=VALUE with a JSON value: query_pre_attn_scalar=10")
    if "rope_theta" in values:
        values.setdefault("rope_parameters", None)
    try:
        return config.changed(**values)
    except ConfigError as error:
        raise UsageError(f"--set: {error}") from None


def run_check_config(args: argparse.Namespace) -> int:
    """Run ``refgemma check-config``."""
    found = check_preset(args.source, args.size)
    code = EXIT[found.verdict]
    output.as_json(preset_json(found, code)) if args.json else output.say(*config_lines(found))
    return code


def run_map(args: argparse.Namespace) -> int:
    """Run ``refgemma map``; return 0 if the map knows every tensor of the file, else 4."""
    config = open_checkpoint(find_model(args.model)).config
    file = open_any(args.file)
    chosen = args.map or file.metadata.get("map")
    if not chosen:
        raise UsageError(f"{args.file}: does not name its map; give --map {', '.join(map_names())} or a file")
    names = load_map(chosen)
    matched = match(file, names)
    usable = apply_map(file, names, config).entries
    rows = []
    for ours, (theirs, rule) in matched.found.items():
        shape = usable[ours].shape
        problem = "" if is_known(split_call(ours)[1], config) else "this model has no such tensor"
        rows.append({"tensor": ours, "from": theirs, "layout": rule.layout, "shape": list(shape), "problem": problem})
    unusable = [row for row in rows if row["problem"]]
    code = EXIT[INCONCLUSIVE] if matched.unmatched or unusable else 0
    if args.json:
        output.as_json({
            "schema": "refgemma-map/1", "map": names.name, "learned_from": names.learned_from, "run_on": names.run_on,
            "matched": rows, "ignored": dict(matched.ignored), "unmatched": list(matched.unmatched), "exit_code": code,
        })  # fmt: skip
        return code
    output.say(f"{names.name}: {names.says}")
    output.say(
        f"from {names.learned_from}; "
        + (f"tried on {names.run_on}" if names.run_on else "not yet tried on real output")
    )
    for row in rows:
        output.say(f"  {row['from']:44} {row['tensor']:40} {tuple(row['shape'])} {row['problem']}".rstrip())
    for name, why in matched.ignored.items():
        output.say(f"  {name:44} - {why}")
    for name in matched.unmatched:
        output.say(f"  {name:44} ? matches nothing")
    output.say(
        f"{len(rows)} matched, {len(matched.ignored)} known and not needed, {len(matched.unmatched)} match nothing"
    )
    return code


def run_diff(args: argparse.Namespace) -> int:
    """Run ``refgemma diff``."""
    a, b = (open_any(path) for path in (args.a, args.b))
    found = compare_traces(a, b)
    only_a, only_b = sorted(set(a.entries) - set(b.entries)), sorted(set(b.entries) - set(a.entries))
    if args.model:
        folder = find_model(args.model)
        config = open_checkpoint(folder).config
        sides = [load_trace(path, config) for path in (args.a, args.b)]
        weights = {side.dtype: open_checkpoint(folder).weights(side.dtype) for side in sides}
        units = measure_unexplained(sides[0], sides[1], weights, config)
        found = [replace(d, unexplained=units.get(d.tensor)) for d in found]
    code = diff_code(found, bool(only_a or only_b), bool(args.model))
    if args.json:
        output.as_json(difference_json(args.a, args.b, found, only_a, only_b, code))
        return code
    output.say(*(part for line in diff_lines(found, only_a, only_b) for part in reports.wrap(line)))
    return code


def diff_code(found: list[Difference], missing: bool, judged: bool) -> int:
    """Return the exit code of a comparison of two traces."""
    wrong = [d for d in found if d.problem or ((d.unexplained or 0) > 1 if judged else d.differs)]
    unknown = judged and any(d.differs and d.unexplained is None for d in found)
    if wrong:
        return EXIT[DIFFERS]
    return EXIT[INCONCLUSIVE] if missing or unknown or not found else 0


def diff_lines(found: list[Difference], only_a: list[str], only_b: list[str]) -> list[str]:
    """Return the lines of text: the first difference, the first unexplained difference, and a table from there on."""
    wrong = [d for d in found if d.differs]
    bad = [d for d in wrong if (d.unexplained or 0) > 1]
    lines = [f"{pluralise(len(found), 'tensor')} in both, {len(found) - len(wrong)} of them equal bit for bit"]
    if wrong:
        lines.append(f"first difference: {wrong[0].tensor}")
    if bad:
        lines.append(f"first difference not explained by inputs and rounding: {bad[0].tensor}")
    elif any(d.unexplained is not None for d in found):
        lines.append("inputs and rounding explain every tensor that could be judged")
    if wrong:
        lines += ["", f"{'tensor':42s} {'equal':>7s} {'largest':>10s} {'relative':>10s} {'unexplained':>16s}  at"]
    for d in (bad or wrong)[:DIFF_ROWS]:
        bound = "" if d.unexplained is None else f"{reports.factor(d.unexplained)} x bound"
        row = f"{d.equal:>7.3f} {reports.number(d.largest):>10s} {reports.number(d.relative):>10s} {bound:>16s}"
        lines.append(f"{d.tensor:42s} {d.problem or row + '  ' + ', '.join(map(str, d.place))}")
    if len(bad or wrong) > DIFF_ROWS:
        lines.append(f"and {pluralise(len(bad or wrong) - DIFF_ROWS, 'later tensor')}; --json lists all")
    for side, names in (("A", only_a), ("B", only_b)):
        if names:
            lines.append(f"only in {side}: {list_names(names)}")
    return lines


def run_prompts(args: argparse.Namespace) -> int:
    """Run ``refgemma prompts``."""
    config = open_checkpoint(find_model(args.model)).config
    known = prompts(config)
    found: list[Detected] = [Detected(name, "", ()) for name in known]
    if args.cover:
        models = {dtype: load(args.model, dtype) for dtype in PRECISIONS}
        found = cover([detect(p, d, m.weights, config) for p in known.values() for d, m in models.items()])
    if args.output:
        for path in write_prompts(found, config, Path(args.output), args.model):
            output.say(str(path), error=True)
    if args.json:
        output.as_json(prompts_json(found, config, args.model))
        return 0
    output.say(f"{args.model}: {pluralise(len(found), 'prompt')}; check their traces with --model {args.model}", "")
    for s in found:
        prompt = known[s.prompt]
        count = f" in {s.dtype}: shows {pluralise(len(s.variants), 'known bug')}" if args.cover else ""
        output.say(
            f"{prompt.name}{count}: {prompt.why}; {prompt.input_ids.shape[0]} x {prompt.input_ids.shape[1]} tokens"
        )
        output.say(f"  computed in calls of {', '.join(map(str, prompt.calls))}")
    for v in list_undetected(found) if args.cover else ():
        output.say(f"not shown by any: {v.name}, which needs {v.shows}")
    return 0


def write_repro(candidate: Candidate, weights: Weights, found: Report, path: str) -> None:
    """Write the inputs and the result of the first finding's operation into a repro file."""
    if not found.findings:
        output.say(f"refgemma check: no difference found; {path} not written", error=True)
        return
    finding = found.findings[0]
    tensors, about = make_repro(Engine(candidate, weights, found.config), finding.instances[0])
    save_trace(tensors.items(), path, about | {"named": finding.named})


def run_sweep(args: argparse.Namespace) -> int:
    """Run ``refgemma sweep``."""
    workers = (os.cpu_count() or 1) if args.workers is None else args.workers
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it must be at least 1")
    jobs = read_jobs(args.jobs)
    results = Path(args.results or f"{args.jobs}.results")
    with cluster(args.scheduler) if args.scheduler else nullcontext((processes, workers)) as (pool, width):
        found = list(tqdm(sweep(jobs, results, pool, width, args.again), "jobs", len(jobs), disable=None))
    report = sweep_json(found)
    output.as_json(report) if args.json else output.say(*sweep_lines(report))
    return int(report["exit_code"])


def sweep_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines of text: the verdicts, the jobs that do not conform, and the tensors with the largest errors."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in report["counts"].items())
    lines = [f"{pluralise(len(report['jobs']), 'job')}: {counts}", ""]
    other = [job for job in report["jobs"] if job["verdict"] != CONFORMS]
    for job in other:
        what = f"{job['first_divergence']}: {job['named']}" if job["first_divergence"] else job["message"]
        lines.append(f"{job['verdict']:12s} {job['name']}: {what}".rstrip(": "))
    lines += [""] if other else []
    rows = sorted(report["tensors"], key=lambda row: (-float(row["worst"]), -float(row["rms"])))
    if rows:
        lines.append(f"{'tensor':28s} {'precision':9s} {'elements':>9s} {reports.ERRORS}")
    for row in rows:
        share = row["exact"] / max(1, row["elements"])
        s = Statistics(exact=share, error_over_bound=float(row["worst"]), rms=float(row["rms"]))
        lines.append(f"{row['tensor']:28s} {row['dtype']:9s} {row['elements']:>9d} {reports.error_columns(s)}")
    lines += [reports.UNITS, ""] if rows else []
    known = len(report["excluded"]) + len(report["found"]) + len(report["blind"])
    if known:
        lines.append(f"known bugs: {len(report['excluded'])} of {known} ruled out by at least one trace")
    if report["blind"]:
        lines.append(f"look like the correct model in every trace: {list_names(report['blind'])}")
    return [part for line in lines for part in reports.wrap(line)]


def run_known_bugs(args: argparse.Namespace) -> int:
    """Run ``refgemma known-bugs``."""
    catalogue = (*KNOWN_BUGS, *TRAINING_BUGS, *OPTIMIZER_BUGS)
    chosen = [v for v in catalogue if args.name in (None, v.name)]
    if not chosen:
        near = [v.name for v in catalogue if args.name in v.name or args.name in v.fields[0]]
        hint = f"there are {', '.join(near)}" if near else "refgemma known-bugs lists them"
        raise UsageError(f"unknown bug {args.name!r}; {hint}")
    if args.json:
        output.as_json([reports.known_bug_json(v) for v in chosen])
    elif args.name:
        v = chosen[0]
        tensors = f"  first tensor: {v.fields[0]}; all: {', '.join(v.fields)}"
        output.say(f"{v.name} ({v.kind})", f"  {v.says}", tensors)
        key = "config key " * hasattr(Gemma2Config, v.knob)
        output.say(f"  look at: {key}{v.knob}", f"  shown by: {v.shows}", f"  seen in: {v.seen}")
    else:
        for v in chosen:
            output.say(f"{v.name:34s} {v.fields[0]:28s} {v.says}")
    return 0


RUN = {
    "audit": run_audit, "check": run_check, "check-config": run_check_config, "conformance": run_conformance,
    "diff": run_diff, "map": run_map, "prompts": run_prompts, "sweep": run_sweep, "known-bugs": run_known_bugs,
    "variants": run_known_bugs,
}  # fmt: skip
