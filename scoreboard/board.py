"""Run other implementations of Gemma 2 on the conformance checkpoint, judge them, and write docs/scoreboard.md.

    python scoreboard/board.py transformers litgpt      make the environment, run, check, and write the page
    python scoreboard/board.py all
    python scoreboard/board.py --expired                rows older than 90 days, or with a newer version on the index
    python scoreboard/board.py --check litgpt           run in float32 without a cache, compare with results.json
    python scoreboard/board.py --page                   write the page from results.json

A verdict is the result of `refgemma check` on tensors that the engine computed. An engine that could not be installed
or could not run a case is NOT RUN, with the reason; one that stops with an error FAILED. Checked on planted engines in
tests/test_scoreboard.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, PAGE = HERE / "results.json", ROOT / "docs" / "scoreboard.md"
BUILD = Path(os.environ.get("REFGEMMA_SCOREBOARD", HERE / "build"))  # environments, traces; not in git
DAYS = 90  # a row is valid for so long
EVIDENCE = 2**20  # bytes of a trace that is kept
DTYPES = ("float32", "bfloat16", "float16")
CASES = {
    "short": "one row within the window, one call",
    "plain": "one row of more than three windows, one call",
    "padded": "two rows, the second with left padding",
    "pieces": "a prompt in pieces and steps that share a cache",
    "decoded": "a prompt within the window, then one token at a time past it",
}
INSTALL_LIMIT, RUN_LIMIT, CHECK_LIMIT = 1800, 900, 600  # seconds
# From the worst to the best; a row has its worst case's verdict.
ORDER = ("differs", "FAILED", "noisy", "inconclusive", "conforms", "NOT RUN")
# A difference that was traced to refgemma or to its conformance model. `reference_wrong` in engine.toml names the case
# and gives the evidence; the verdict of the check stays beside it.
REFERENCE_WRONG = "the reference is wrong"


class BoardError(Exception):
    """The description of an engine is wrong."""


@dataclass(frozen=True)
class Row:
    """One engine in one version."""

    name: str  # "litgpt", or "transformers/4.42.3" of an engine with several rows
    folder: Path
    says: str
    package: str  # its name on the index; its version is the row's version
    index: str = "pypi"  # or "npm", "source" (a commit), ""
    python: str = "3.11"
    requirements: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    source: str = ""  # REPOSITORY@COMMIT of an engine on no index; its `source_folder` is put on the path
    source_folder: str = ""
    convert: str = ""  # write the checkpoint in another format of `refgemma convert` too: gguf, flax-npz
    install: tuple[str, ...] = ()  # options of the installer
    model: str = "conformance"  # or the arguments of `refgemma conformance`
    changed: tuple[str, ...] = ()  # `--set` of the check
    dtypes: tuple[str, ...] = DTYPES
    cases: tuple[str, ...] = tuple(CASES)
    command: str = "python port.py"
    map: str = ""
    options: tuple[str, ...] = ()  # more arguments of the check
    arguments: tuple[str, ...] = ()  # of the engine's `load`
    upstream: tuple[str, ...] = ()
    notes: str = ""
    not_run: str = ""  # the reason, if it cannot be installed
    pinned: str = ""  # the reason, if a newer version does not expire the row
    reference_wrong: Mapping[str, str] = field(default_factory=dict)  # case -> evidence

    @property
    def version(self) -> str:
        """The version that the requirements pin."""
        for line in (*self.requirements, *self.npm):
            name, _, version = line.rpartition("@" if line in self.npm else "==")
            if name.partition("[")[0] == self.package:
                return version
        return self.source.rpartition("@")[2][:7]


# --- descriptions -----------------------------------------------------------------------------------------------------


def read_requirements(path: Path) -> tuple[str, ...]:
    """Return the pinned packages of requirements.txt or package.json, none if there is no such file."""
    if not path.is_file():
        return ()
    if path.suffix == ".json":
        return tuple(f"{name}@{pin}" for name, pin in json.loads(path.read_text("utf-8"))["dependencies"].items())
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return tuple(line for line in lines if line)


def replace_pins(pins: Iterable[str], changes: Iterable[str]) -> tuple[str, ...]:
    """Return the pins with those of the same packages replaced, and the others added."""
    by_name = {re.split(r"[=<>\[ ]", pin)[0]: pin for pin in (*pins, *changes)}
    return tuple(by_name.values())


def read_engine(folder: Path) -> list[Row]:
    """Return the rows of an engine's folder."""
    about = tomllib.loads((folder / "engine.toml").read_text("utf-8"))
    rows = about.pop("rows", {"": {}})
    pins, npm = (read_requirements(folder / name) for name in ("requirements.txt", "package.json"))
    known = set(Row.__dataclass_fields__) - {"name", "folder", "npm"}
    found = []
    for name, own in rows.items():
        both = about | own
        if unknown := both.keys() - known:
            raise BoardError(f"{folder.name}/engine.toml: unknown keys {', '.join(sorted(unknown))}")
        values = {key: tuple(x) if isinstance(x, list) else x for key, x in both.items()}
        values["requirements"] = replace_pins(pins, own.get("requirements", ()))
        found.append(Row(name=f"{folder.name}/{name}" if name else folder.name, folder=folder, npm=npm, **values))
    return found


def read_rows(names: Iterable[str] = ("all",)) -> list[Row]:
    """Return the rows of engines by name: ``all``, an engine, or one of its rows.

    Raises
    ------
    BoardError
        If there is no such engine.
    """
    rows = [row for path in sorted(HERE.glob("*/engine.toml")) for row in read_engine(path.parent)]
    chosen = []
    for name in names:
        hits = [row for row in rows if name in ("all", row.name, row.folder.name)]
        if not hits:
            raise BoardError(f"there is no engine {name!r}; there are {', '.join(row.name for row in rows)}")
        chosen += [row for row in hits if row not in chosen]
    return chosen


# --- running ----------------------------------------------------------------------------------------------------------


def refgemma(*arguments: str, limit: int = CHECK_LIMIT) -> subprocess.CompletedProcess[str]:
    """Run a command of this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "refgemma", *arguments], capture_output=True, text=True, env=environment, timeout=limit,
        check=False,
    )  # fmt: skip


def find_checkpoint(model: str) -> str:
    """Return the folder of a conformance checkpoint, which is written if it is not there."""
    if model == "conformance":
        return str(ROOT / "refgemma" / "checkpoints" / "conformance")
    folder = BUILD / "checkpoints" / re.sub(r"\W+", "-", model).strip("-")
    if not folder.exists():
        done = refgemma("conformance", "-o", str(folder), *model.split())
        if done.returncode:
            raise BoardError(done.stderr)
    return str(folder)


def find_converted(folder: str, kind: str) -> str:
    """Return the checkpoint in another format, in float32, which is written if it is not there."""
    path = BUILD / "checkpoints" / f"{Path(folder).name}-{kind}{'.gguf' if kind == 'gguf' else ''}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        done = refgemma("convert", folder, "--to", kind, "--dtype", "float32", "-o", str(path))
        if done.returncode:
            raise BoardError(done.stderr)
    return str(path)


def write_cases(folder: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the cases for a checkpoint: those of `refgemma prompts`, a short one, and one of single steps."""
    sys.path.insert(0, str(ROOT))
    import refgemma as package
    from refgemma.oracle.prompts import prompts

    config = package.load(folder).config
    given = prompts(config)
    ids, window = given["plain"].input_ids, config.sliding_window
    ones, length = given["plain"].attention_mask, given["plain"].input_ids.shape[1]
    start = window - 2
    cases = {
        "short": (ids[:, : window - 1], ones[:, : window - 1], [window - 1]),
        "plain": (ids, ones, [length]),
        "padded": (given["padded"].input_ids, given["padded"].attention_mask, [length]),
        "pieces": (ids, ones, list(given["cached"].calls)),
        "decoded": (ids[:, : 2 * window + 2], ones[:, : 2 * window + 2], [start] + [1] * (2 * window + 2 - start)),
    }
    return [
        {"name": name, "input_ids": i.tolist(), "attention_mask": m.tolist(), "calls": [int(n) for n in calls]}
        for name, (i, m, calls) in cases.items() if name in names
    ]  # fmt: skip


def make_environment(row: Row) -> tuple[Path, float]:
    """Install the pinned packages, once; return the folder and the seconds that it took."""
    said = json.dumps([row.python, row.requirements, row.install, row.npm, row.source])
    folder = BUILD / "environments" / f"{row.folder.name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    done = folder / "seconds"
    if done.is_file():
        return folder, float(done.read_text("utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not row.requirements:  # uv makes the folder itself
        folder.mkdir()
    began = time.monotonic()
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") or "uv"
    commands = []
    if row.requirements:
        options = [in_folder(row, option) for option in row.install]
        python = str(folder / "bin" / "python")
        commands = [[uv, "venv", "--quiet", "--python", row.python, str(folder)],
                    [uv, "pip", "install", "--quiet", "--python", python, *options, *row.requirements]]  # fmt: skip
    if row.npm:
        commands.append(
            ["npm", "install", "--silent", "--no-audit", "--ignore-scripts", "--prefix", str(folder), *row.npm]
        )
    for command in commands:
        run = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT, check=False)
        if run.returncode:
            raise BoardError(last_line(run.stderr))
    if row.source:
        unpack_source(row, folder / "source")
    done.write_text(f"{time.monotonic() - began:.0f}", "utf-8")
    return folder, time.monotonic() - began


def in_folder(row: Row, word: str) -> str:
    """Return the path of a file of the engine's folder, and any other word unchanged."""
    return str(row.folder / word) if (row.folder / word).is_file() else word


def unpack_source(row: Row, folder: Path) -> None:
    """Unpack one folder of a repository at a commit, from a clone in SCOREBOARD_CLONES or from the network."""
    url, _, commit = row.source.rpartition("@")
    clone = Path(os.environ.get("SCOREBOARD_CLONES", "none"), "+".join(url.split("/")[-2:]), "repo")
    folder.mkdir()
    if not clone.is_dir():
        clone = folder.parent / "clone"
        run = subprocess.run(["git", "clone", "--quiet", "--bare", url, str(clone)], capture_output=True, text=True)
        if run.returncode:
            raise BoardError(last_line(run.stderr))
    archive = subprocess.run(["git", "-C", str(clone), "archive", commit, row.source_folder], capture_output=True)
    if archive.returncode:
        raise BoardError(last_line(archive.stderr.decode()))
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def last_line(text: str) -> str:
    """Return the last line that says something, without paths of this machine, at most 200 characters."""
    lines = [line.strip(" ╰─▶│×") for line in text.splitlines() if line.strip(" ╰─▶│×")] or ["no message"]
    return re.sub(r"(?:/[\w.+-]+){2,}/", ".../", lines[-1])[:200]


def run_port(row: Row, environment: Path, dtype: str, model: str, out: Path) -> tuple[dict[str, str], float]:
    """Run an engine's program in one precision; return the result for each case, and the seconds."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    cases = write_cases(model, row.cases)
    job = {"model": model, "dtype": dtype, "arguments": list(row.arguments), "out": str(out), "cases": cases}
    if row.convert:
        job["converted"] = find_converted(model, row.convert)
    (out / "job.json").write_text(json.dumps(job), "utf-8")
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {
        **os.environ, "PATH": path, "PYTHONPATH": f"{HERE}{os.pathsep}{environment / 'source'}", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "SCOREBOARD_ENVIRONMENT": str(environment),
    }  # fmt: skip
    program, *arguments = (in_folder(row, word) for word in row.command.split())
    program = shutil.which(program, path=path) or program
    began = time.monotonic()
    with (out / "log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                [program, *arguments, str(out / "job.json")], cwd=out, env=variables, stdout=log, stderr=log,
                timeout=RUN_LIMIT, check=False,
            )  # fmt: skip
            ended = f"FAILED: exit code {done.returncode}: {last_line((out / 'log').read_text('utf-8', 'replace'))}"
        except subprocess.TimeoutExpired:
            ended = f"FAILED: no end after {RUN_LIMIT} s"
    seconds = time.monotonic() - began
    said = json.loads((out / "result.json").read_text("utf-8")) if (out / "result.json").is_file() else {}
    rest = said.get("load", ended)
    return {case["name"]: said.get(case["name"], rest) for case in cases}, seconds


def check_trace(row: Row, trace: Path, model: str) -> dict[str, Any]:
    """Return the result of `refgemma check` for a trace: verdict, first tensor, known bug, evidence."""
    arguments = ["check", str(trace), "--model", model, "--json", *row.options]
    arguments += ["--map", str(path if (path := row.folder / row.map).is_file() else row.map)] if row.map else []
    for change in row.changed:
        arguments += ["--set", change]
    run = refgemma(*arguments)
    if run.returncode not in (0, 1, 3, 4):
        return {"verdict": "FAILED", "says": last_line(run.stderr)}
    about = json.loads(run.stdout)
    trace.with_suffix(".check.json").write_text(run.stdout, "utf-8")
    result = {"verdict": about["verdict"], "tensors": len(about["tensors"])}
    if about["findings"]:
        worst = [f for f in about["findings"] if f["tensor"] == about["first_divergence"]] or about["findings"]
        if (note := str(worst[0]["statistic"]["note"])).startswith("has shape"):  # the port's mistake, not the engine's
            return {"verdict": "FAILED", "says": f"the port wrote {worst[0]['tensor']}, which {note}"}
        result |= {"first": worst[0]["tensor"], "named": worst[0]["named"]}
        result["all_named"] = sorted({f["named"] for f in about["findings"]})
        if worst[0]["named"] == "UNKNOWN" and worst[0]["closest"]:
            result["closest"] = [worst[0]["closest"]["variant"], round(worst[0]["closest"]["leaves"], 3)]
        if again := [a["said"] for a in about["again"]]:
            result["again"] = again
    if trace.stat().st_size < EVIDENCE:
        digest = hashlib.sha256(trace.read_bytes()).hexdigest()
        result["evidence"] = {"file": trace.name, "bytes": trace.stat().st_size, "sha256": digest[:16]}
    return result


def run_row(row: Row, today: date) -> dict[str, Any]:
    """Return the row for results.json."""
    entry: dict[str, Any] = {"version": row.version, "date": today.isoformat(), "results": {}}
    if row.not_run:
        return entry | {"not_run": row.not_run}
    print(f"{row.name}: install {' '.join((*row.requirements, *row.npm))}", flush=True)
    try:
        environment, seconds = make_environment(row)
    except (BoardError, subprocess.TimeoutExpired, FileNotFoundError) as error:
        return entry | {"not_run": f"could not be installed: {error}"}
    model = find_checkpoint(row.model)
    entry |= {"install_seconds": round(seconds), "run_seconds": 0, "glue_lines": glue_lines(row)}
    for dtype in row.dtypes:
        out = BUILD / "evidence" / row.name.replace("/", "-") / dtype
        results, seconds = run_port(row, environment, dtype, model, out)
        entry["run_seconds"] += round(seconds)
        entry["results"][dtype] = {}
        for case, said in results.items():
            if said == "written":
                result = check_trace(row, out / f"{case}.safetensors", model)
            else:
                verdict, _, reason = said.partition(": ")
                result = {"verdict": verdict, "says": last_line(reason)}
            if case in row.reference_wrong and result["verdict"] == "differs":
                result |= {"class": REFERENCE_WRONG, "says": row.reference_wrong[case]}
            print(f"  {dtype} {case}: {short(result)}", flush=True)
            entry["results"][dtype][case] = result
    return entry


def glue_lines(row: Row) -> int:
    """Return the number of lines of our own code that are neither blank nor comments."""
    files = [path for path in row.folder.iterdir() if path.stem == "port"]
    lines = [line.strip() for path in files for line in path.read_text("utf-8").splitlines()]
    return sum(1 for line in lines if line and not line.startswith(("#", "//")))


# --- the page ---------------------------------------------------------------------------------------------------------


def short(result: Mapping[str, Any]) -> str:
    """Return a result in a few words."""
    if "class" in result:
        return str(result["class"])
    words = result["verdict"]
    if "first" in result:
        named = result["named"]
        if "closest" in result:
            named = f"UNKNOWN, closest {result['closest'][0]} (leaves {result['closest'][1]:.0%})"
        words += f" at `{result['first']}`: {named}"
    if result["verdict"] == "FAILED":
        words += f": {result['says']}"
    return words


def worst(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the worst verdict of the cases, and the number of cases that were run."""
    verdicts = [REFERENCE_WRONG if "class" in r else r["verdict"] for r in results.values()]
    known = [*ORDER[:2], REFERENCE_WRONG, *ORDER[2:]]
    if not verdicts:
        return ""
    ran = sum(v != "NOT RUN" for v in verdicts)
    return f"{min(verdicts, key=known.index)} ({ran} of {len(verdicts)})" if ran else "NOT RUN"


def escape(text: str) -> str:
    """Return a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def expired(entry: Mapping[str, Any], today: date, newest: str | None = None, pinned: str = "") -> str:
    """Return the reason why a row has expired, or an empty string."""
    age = (today - date.fromisoformat(entry["date"])).days
    if age > DAYS:
        return f"{age} days old"
    if newest and not pinned and newest != entry["version"]:
        return f"version {newest} is on the index; the row is for {entry['version']}"
    return ""


def newest_version(row: Row) -> str | None:
    """Return the newest version on the row's index for the row's Python, or None if there is no answer."""
    if row.index == "npm":
        command = ["npm", "view", row.package, "version"]
    elif row.index == "pypi":
        command = [sys.executable, "-m", "pip", "index", "versions", row.package, "--python-version", row.python]
    else:
        return None
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"\(([^)]+)\)" if row.index == "pypi" else r"(\S+)", run.stdout)
    return found[1] if run.returncode == 0 and found else None


def check_entries(rows: Iterable[Row], results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with results.json."""
    by_name = {row.name: row for row in rows}
    for name in sorted(results.keys() ^ by_name.keys()):
        yield f"{name}: is in only one of results.json and the folders"
    for name in results.keys() & by_name.keys():
        entry, row = results[name], by_name[name]
        if entry["version"] != row.version:
            yield f"{name}: the row is for {entry['version']}, but {row.version} is pinned"
        if bool(entry.get("not_run")) == bool(entry["results"]):
            yield f"{name}: has to have either results or the reason why it was not run"
        if row.not_run and entry["results"]:
            yield f"{name}: has results, but its folder says that it cannot be run"
        for dtype, cases in entry["results"].items():
            for case, result in cases.items():
                where = f"{name} {dtype} {case}"
                if result["verdict"] not in ORDER:
                    yield f"{where}: unknown verdict {result['verdict']!r}"
                elif result["verdict"] in ("FAILED", "NOT RUN"):
                    if not result.get("says"):
                        yield f"{where}: {result['verdict']} without a reason"
                elif not result.get("evidence") or not result.get("tensors"):
                    yield f"{where}: a verdict without evidence"
                elif (result["verdict"] in ("differs", "noisy")) != ("first" in result):
                    yield f"{where}: {result['verdict']} and the first tensor contradict each other"


INTRODUCTION = f"""# Scoreboard

<!-- written by scoreboard/board.py from scoreboard/results.json -->

This page has the verdicts of `refgemma check` for other implementations of Gemma 2. For each row, the engine was run in
the pinned version on a small model with random weights, whose caps, window and scale show mistakes. The verdicts are
the words of [the oracle](oracle.md): `conforms` (rounding explains everything), `noisy` (the right model with more
rounding), `differs` (a wrong tensor), `inconclusive` (too few tensors were recorded). `FAILED` means that the engine
stopped with an error. `NOT RUN` means that there is no verdict, and the row gives the reason. `{REFERENCE_WRONG}` means
that the difference was traced to refgemma or to its model. As evidence, `scoreboard/results.json` has the size and the
SHA-256 of each trace. The seconds to install were measured with uv's cache. A row expires after {DAYS} days, or when a
newer version is on the index; `python scoreboard/board.py --expired` lists the expired rows.

`nox -s scoreboard -- NAME` makes a row again. The small model has none of the released sizes. So a query scalar that is
wrong for it can, for instance, be right for the 2B. The notes of each engine say which sizes a mistake concerns.

The cases are
"""


def write_page(rows: Iterable[Row], results: Mapping[str, Any]) -> str:
    """Return docs/scoreboard.md."""
    rows = list(rows)
    lines = [INTRODUCTION.rstrip()]
    lines += [f"`{name}`\n: {says}\n" for name, says in CASES.items()]
    lines[1] = "\n" + lines[1]
    lines += ["The worst verdict of each precision, and the number of cases that were run:", ""]
    lines += ["| engine | version | float32 | bfloat16 | float16 | date |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        entry = results.get(row.name)
        if entry is None:
            continue
        cells = [f"[{row.name}](#{re.sub(r'[^a-z0-9_-]', '', row.folder.name.lower())})", entry["version"]]
        if "not_run" in entry:
            cells += ["NOT RUN"] * 3
        else:
            cells += [worst(entry["results"].get(dtype, {})) for dtype in DTYPES]
        lines.append("| " + " | ".join([*cells, entry["date"]]) + " |")
    for folder in dict.fromkeys(row.folder for row in rows):
        lines += _engine_section([row for row in rows if row.folder == folder], results)
    return "\n".join(lines).rstrip() + "\n"


def _engine_section(rows: list[Row], results: Mapping[str, Any]) -> list[str]:
    lines = ["", f"## {rows[0].folder.name}", "", rows[0].says]
    if rows[0].notes:
        lines += ["", rows[0].notes.strip()]
    if rows[0].upstream:
        lines += ["", "Known upstream:", "", *(f"- {item}" for item in rows[0].upstream)]
    if (rows[0].folder / "repro.py").is_file():
        lines += ["", f"`scoreboard/{rows[0].folder.name}/repro.py` shows it without refgemma."]
    for row in rows:
        entry = results.get(row.name)
        if entry is None:
            continue
        lines += ["", f"**{row.name} {entry['version']}**, {entry['date']}"]
        if "not_run" in entry:
            lines[-1] += f": NOT RUN, {entry['not_run']}"
            continue
        judged = "" if row.model == "conformance" else f", on `refgemma conformance {row.model}`"
        judged += f", judged with {', '.join(row.changed)}" if row.changed else ""
        lines[-1] += (
            f"{judged}; {entry['glue_lines']} lines of glue, {entry['install_seconds']} s to install, "
            f"{entry['run_seconds']} s to run"
        )
        lines += ["", "| case | " + " | ".join(entry["results"]) + " |", "| --- |" + " --- |" * len(entry["results"])]
        for case in (case for case in row.cases if any(case in cases for cases in entry["results"].values())):
            cells = [escape(short(cases[case])) for cases in entry["results"].values()]
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
        shown = [result for cases in entry["results"].values() for result in cases.values()]
        reasons = {result["says"] for result in shown if result["verdict"] == "NOT RUN"}
        lines += ["", "Not run: " + "; ".join(sorted(escape(r) for r in reasons)) + "."] if reasons else []
    return lines


# --- the command ------------------------------------------------------------------------------------------------------


def read_results() -> dict[str, Any]:
    """Return results.json."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="an engine, one of its rows (ENGINE/ROW), or all")
    parser.add_argument("--expired", action="store_true", help="list the rows that have expired; ask the indexes")
    parser.add_argument("--page", action="store_true", help="only write the page from results.json")
    parser.add_argument("--dry", action="store_true", help="print the results, write neither results.json nor the page")
    parser.add_argument("--check", action="store_true", help="as --dry, on two cases; exit with 1 if a verdict changed")
    args = parser.parse_args(arguments)
    today = datetime.now(UTC).date()
    try:
        rows = read_rows(args.names or ["all"])
        if args.expired:
            return list_expired(rows, today)
        if not args.page and not args.names:
            parser.error("give names of engines, or all")
        if args.check:
            return check_again(rows, today)
        for row in [] if args.page else rows:
            entry = run_row(row, today)
            if entry.get("not_run") and not row.not_run:
                print(f"{row.name}: NOT RUN: {entry['not_run']}")
            if args.dry:
                continue
            results = read_results() | {row.name: entry}
            known = [r.name for r in read_rows()]
            results = {name: results[name] for name in known if name in results}
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        if not args.dry:
            PAGE.write_text(write_page(read_rows(), read_results()), "utf-8")
        return 0
    except BoardError as error:
        print(error, file=sys.stderr)
        return 2


def check_again(rows: list[Row], today: date) -> int:
    """Run rows in float32 on two cases, and compare with results.json; return 1 if a verdict differs.

    `conforms` and `noisy` count as one verdict here: both are the same model, and another processor rounds differently.
    """
    changed, results = 0, read_results()
    for row in rows:
        entry = run_row(replace(row, dtypes=("float32",), cases=("short", "plain")), today)
        if "not_run" in entry:
            print(f"NOT RUN: {row.name}: {entry['not_run']}")
        for case, found in entry["results"].get("float32", {}).items():
            expected = results[row.name]["results"]["float32"][case]
            right = {"conforms", "noisy"}
            if short(expected) != short(found) and not {expected["verdict"], found["verdict"]} <= right:
                print(f"{row.name} {case}: {short(found)}; results.json has {short(expected)}")
                changed = 1
    return changed


def list_expired(rows: list[Row], today: date) -> int:
    """Print the rows that have expired; return 1 if there are any."""
    results = read_results()
    rows = [row for row in rows if row.name in results]
    asked = {(row.index, row.package, row.python): row for row in rows}
    with ThreadPoolExecutor(4) as pool:
        newest = dict(zip(asked, pool.map(newest_version, asked.values()), strict=True))
    count = 0
    for row in rows:
        found = newest[row.index, row.package, row.python]
        if reason := expired(results[row.name], today, found, row.pinned):
            print(f"{row.name}: {reason}")
            count += 1
        elif found is None and row.index in ("pypi", "npm"):
            print(f"{row.name}: the index did not answer; the row is of {results[row.name]['date']}")
    print(f"{count} of {len(rows)} rows have expired")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
