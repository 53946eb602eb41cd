"""Run every command in README and the pages and compare its output, or check where the table says that it runs."""

import math
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma import activations, layers
from refgemma.backward import compute_gradients
from refgemma.cli.main import main
from refgemma.hub import find_model
from refgemma.oracle import known_bugs
from refgemma.precision import narrow, wide
from refgemma.testing.properties import LAWS
from refgemma.trace.names import run_in_order, save_trace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts)]
README = PAGES[0].read_text("utf-8")


def blocks(page: str, kind: str) -> list[str]:
    found = re.findall(rf"^( *)```{kind}\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)  # in a list they are indented
    return [textwrap.dedent(block) for _, block in found]


def block_of(kind: str, start: str) -> str:
    """Return the only block of all pages that begins with this text."""
    (found,) = {block for page in PAGES for block in blocks(page.read_text("utf-8"), kind) if block.startswith(start)}
    return found


def commands() -> set[str]:
    """Return the lines of console blocks (`$` marks lines with output), and README's table of commands."""
    found = set()
    for page in PAGES:
        text = page.read_text("utf-8")
        if "| command | action |" in text:
            found |= set(re.findall(r"^\| `(refgemma .*?)` \|", text, re.MULTILINE))
        for block in blocks(text, "console"):
            lines = block.splitlines()
            typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
            found |= {part.split("   #")[0].strip() for line in typed for part in line.split(" && ")}
    return found


# --- refgemma: run here ---------------------------------------------------------------------------------------------

# A command of the pages -> what is run for it, with small files in place of the reader's, and the exit code.
RUN = {
    'refgemma generate "Once upon a time" --temperature 0.7': ("{} --max-new-tokens 8", 0),
    "refgemma verify [CASE ...]": ("refgemma verify op-linear-f32", 0),
    'refgemma trace "Once upon a time" -o run.safetensors': ("{}", 0),
    'refgemma explore "Once upon a time" -o page.html': ("{}", 0),
    "refgemma explore --live -o page.html": ("{}", 0),
    "refgemma perplexity FILE": ("refgemma perplexity text.txt", 0),
    "refgemma convert SOURCE -o DIR": ("refgemma convert model.gguf -o again", 0),
    "refgemma check PORT.safetensors": ("refgemma check run.safetensors", 0),
    "refgemma check port.safetensors --model conformance": ("{}", 1),
    "refgemma check gradients.safetensors --model conformance": ("{}", 1),
    "refgemma sweep jobs.jsonl": ("{}", 1),
    "refgemma sweep jobs.jsonl --workers 4": ("refgemma sweep jobs.jsonl --workers 2", 1),
    "refgemma conformance -o small --head-dim 64": ("{}", 0),
    "refgemma conformance -o small-gguf --head-dim 64 --set query_pre_attn_scalar=64": ("{}", 0),
    "refgemma convert small-gguf --to gguf -o small.gguf": ("refgemma convert source --to gguf -o small.gguf", 0),
    "refgemma diff A B": ("refgemma diff run.safetensors run.safetensors", 0),
    "refgemma map FILE --map NAME": ("refgemma map run.safetensors --map transformers", 4),  # refgemma's own names
    "refgemma prompts": ("{}", 0),
    "refgemma conformance -o DIR": ("{}", 0),
    "refgemma check-config config.json": ("refgemma check-config source/config.json", 1),  # no released size
    "refgemma known-bugs [NAME]": ("refgemma known-bugs", 0),
    "refgemma info [MODEL]": ("refgemma info tiny", 0),
    "refgemma info gemma-2-2b-it-Q4_K_M.gguf": ("refgemma info model.gguf", 0),
    'refgemma generate "Why is the sky blue?" --model gemma-2-2b-it-Q4_K_M.gguf': (
        'refgemma generate "Why is the sky blue?" --model model.gguf --max-new-tokens 4', 0,
    ),
    "refgemma convert path/to/folder --to gguf -o model.gguf": ("refgemma convert source --to gguf -o new.gguf", 0),
    "refgemma convert path/to/folder --to gguf -o model.gguf --dtype float32": (
        "refgemma convert source --to gguf -o new.gguf --dtype float32", 0,
    ),
    # Weights that nobody recorded: exit code 2. No test records one, which needs PyTorch.
    "refgemma verify --model path/to/folder": ("refgemma verify --model {tiny}", 2),
    "refgemma verify --model path/to/folder --dtype bfloat16": ("refgemma verify --model {tiny} --dtype bfloat16", 2),
    "refgemma convert model.gguf -o path/to/folder --dtype bfloat16": (
        "refgemma convert model.gguf -o folder --dtype bfloat16", 0,
    ),
}  # fmt: skip
# Commands that other tests run, or that need what a test has not: (file, a text of it).
ELSEWHERE = {
    "refgemma train TEXT -o DIR": ("tests/test_training_command.py", "train"),
    "refgemma audit URL": ("tests/strangers/test_audit.py", "def audit("),
    "refgemma train book.txt -o trained": ("tests/test_training_command.py", "train"),
    'refgemma generate "Once upon a time" --model trained': ("tests/test_training_command.py", "train"),
    "refgemma train book.txt -o adapter --lora-r 8 --learning-rate 0.005": ("tests/test_training_command.py", "lora"),
    # Five to seven minutes; the tests train with the same options and fewer steps.
    "refgemma train tinyshakespeare.txt -o book --max-steps 600 --learning-rate 0.001 --lr-scheduler-type cosine "
    "--warmup-steps 50 --weight-decay 0.1": ("tests/test_training_command.py", "--max-steps"),
    "refgemma train tinyshakespeare.txt -o adapter --max-steps 600 --learning-rate 0.005 --lr-scheduler-type cosine "
    "--warmup-steps 50 --lora-r 8 --lora-target-modules all-linear": (
        "tests/test_training_command.py", "--lora-target-modules",
    ),
    "refgemma verify": (".ci/run", "pip install . && refgemma verify"),  # all 71 cases
    "refgemma known-bugs gelu-without-cube": ("tests/test_documented_commands.py", "test_the_samples_of_a_known_bug"),
    "refgemma chat --temperature 0.7": ("tests/test_cli.py", '"chat"'),
    "refgemma verify --full 9b-synthetic": (".ci/run", "refgemma verify --full 9b-synthetic"),
    "refgemma verify --full 9b-synthetic --reference": ("tests/test_full_size.py", "reference"),
    "refgemma verify --full 27b-synthetic --reference": ("tests/test_full_size.py", "reference"),
    "refgemma synth 9b -o DIR": ("tests/test_synthetic.py", "synth"),
    "refgemma sweep jobs.jsonl --scheduler tcp://10.0.0.1:8786 --json > sweep.json": (
        "tests/test_sweep.py", "scheduler",
    ),
    "refgemma check port.txt --model model.gguf": ("tests/test_maps.py", "open_eval_callback"),
    'llama-eval-callback -m model.gguf -p "Once upon a time" -fa off -ctk f32 -ctv f32 -t 1 -c 64 > port.txt 2>&1': (
        "tests/test_maps.py", "llama-eval-callback",
    ),
    "refgemma check port.safetensors --model conformance --json": ("tests/test_skill.py", "CHECK"),
    "refgemma check port.safetensors --model conformance --card card.json": ("tests/test_skill.py", "CARD"),
    "refgemma audit http://localhost:8000 --model small-gguf": ("tests/strangers/test_audit.py", "def audit("),
    "refgemma audit http://127.0.0.1:8191 --model small": ("tests/strangers/test_audit.py", "def audit("),
    "refgemma check-config engine/presets.py:gemma2_9b": ("tests/test_config_check.py", "presets.py:gemma2_9b"),
    "refgemma check-config 'engine.config:Config(\"gemma-2-9b\")'": ("tests/test_config_check.py", "engine.config:"),
    ".ci/quick": (".ci/quick", "pytest"),
    ".ci/installs": (".ci/installs", 'refgemma" verify'),
    "done": ("docs/reliability.md", "done"),
    "for seed in 1 2 3 4 5 6 7 8 9 10; do": ("docs/reliability.md", "done"),
}  # fmt: skip


def mean_of_means() -> dict[str, np.ndarray]:
    """Return the gradients of a trainer that averages each row before the batch."""
    model, recorded = refgemma.load("conformance"), dict(np.load(ROOT / "tests/recorded/gradients-conformance.npz"))
    rows = []
    for n in range(2):
        ids, labels, mask = (recorded[name][n : n + 1] for name in ("input_ids", "labels", "attention_mask"))
        rows.append(compute_gradients(ids, labels, model.weights, model.config, attention_mask=mask)[1])
    given = {name: x for name, x in recorded.items() if not name.startswith("grads.")}
    return given | {f"grads.{name}": (x + rows[1][name]) / 2 for name, x in rows[0].items()}


def test_the_sample_of_a_trainer(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = block_of("text", "DIFFERS first at grads.")
    assert main(["check", str(desk / "gradients.safetensors"), "--model", "conformance"]) == 1
    assert sample in capsys.readouterr().out


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the files that the commands read."""
    folder = tmp_path_factory.mktemp("desk")
    model = refgemma.load("conformance")
    ids = np.random.default_rng(0).integers(4, 97, (1, 24))
    ids[:, 0] = 2
    wrong = [("input_ids", ids), *run_in_order(ids, model.weights, model.config.changed(sliding_window=9))]
    save_trace(wrong, folder / "port.safetensors", {"dtype": "float32"})
    save_trace(mean_of_means().items(), folder / "gradients.safetensors", {"dtype": "float32"})
    assert main(["trace", "Once upon a time", "-o", str(folder / "run.safetensors")]) == 0
    source = folder / "source"  # the tiny model with the scale of scores that llama.cpp takes for such a model
    config = refgemma.load("tiny").config
    shutil.copytree(find_model("tiny"), source)
    config.changed(query_pre_attn_scalar=config.head_dim).save_pretrained(source)
    assert main(["convert", str(source), "--to", "gguf", "-o", str(folder / "model.gguf")]) == 0
    (folder / "text.txt").write_text("There was once a little princess.\n")
    (folder / "jobs.jsonl").write_text('{"trace": "port.safetensors", "model": "conformance"}\n')
    return folder


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run, code = RUN[command]
    program, *arguments = shlex.split(run.replace("{}", command).replace("{tiny}", str(find_model("tiny"))))
    assert program == "refgemma"
    assert main(arguments) == code


# --- other programs -------------------------------------------------------------------------------------------------


def script_takes(command: str) -> bool:
    """Return True if a script of this repository exists, and its source has each option of the command."""
    words = shlex.split(command)[1:]
    path = words[1].replace(".", "/") if words[0] == "-m" else words[0].removesuffix(".py")
    places = [ROOT / f"{path}.py", ROOT / path / "__main__.py", ROOT / path / "__init__.py"]
    source = "".join(place.read_text("utf-8") for place in places if place.is_file())
    options = {word for word in words if word.startswith("--")}
    return bool(source) and all(f'"{option}"' in source for option in options)


def installs(command: str) -> bool:
    """Return True if `pip install` asks for this folder, and for extras that it has."""
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE))
    wanted = [word for word in shlex.split(command)[2:] if word not in ("-e", "atheris>=3")]
    return all(re.fullmatch(r"\.(\[[\w,]+\])?", word) for word in wanted) and extras.issuperset(
        re.findall(r"\w+", " ".join(wanted))
    )


def pytest_takes(command: str) -> bool:
    """Return True if each file of a pytest command exists, and refgemma's plugin has each of its long options."""
    plugin = (ROOT / "refgemma" / "testing" / "plugin.py").read_text("utf-8")
    words = re.findall(r"[\w./:-]+", command)
    known = ("--pyargs", "--hypothesis-seed", "--threads")
    return all(word in known or f'"{word}"' in plugin for word in words if word.startswith("--")) and all(
        (ROOT / word).exists() for word in words if word.startswith("tests/")
    )


KINDS: dict[str, Callable[[str], bool]] = {
    "pip install": installs,
    "python ": script_takes,
    "pytest": pytest_takes,
    "jupyter lab ": lambda command: (ROOT / command.removeprefix("jupyter lab ")).is_file(),
    "sphinx-build ": lambda command: (ROOT / "docs" / "conf.py").is_file(),
    "git clone ": lambda command: True,
}


def problem(command: str) -> str:
    """Return the reason why nothing runs a command, or an empty text."""
    if command in RUN or f"$ {command}\n" in README:  # test_the_sample_of_generate
        return ""
    if command in ELSEWHERE:
        file, text = ELSEWHERE[command]
        return "" if text in (ROOT / file).read_text("utf-8") else f"{file} does not contain {text!r}"
    for start, check in KINDS.items():
        if command.startswith(start):
            return "" if check(command) else f"this command does not exist so: {command}"
    return f"nothing runs {command}"


def test_every_command_is_run() -> None:
    assert [found for command in sorted(commands()) if (found := problem(command))] == []


def test_the_tables_have_only_commands_of_the_pages() -> None:
    assert sorted({*RUN, *ELSEWHERE} - commands()) == []


def test_the_table_has_every_command() -> None:
    options, table = ((ROOT / "docs" / page).read_text("utf-8") for page in (
        "reference/command-line.md", "how-to/commands.md"))  # fmt: skip
    known = {*re.findall(r"^## refgemma ([\w-]+)$", options, re.MULTILINE)} - {"variants"}  # known-bugs, in version 0.1
    assert len(known) > 15
    assert {*re.findall(r"^\| `refgemma ([\w-]+)", table, re.MULTILINE)} == known


@pytest.mark.parametrize(
    "command",
    ["refgemma paint", "python tools/regen.py --chek", "python tools/gone.py", 'pip install ".[gone]"',
     'pip install "refgemma[gguf]"', "pytest tests/test_gone.py", "pytest --backened x", "jupyter lab gone.ipynb"],
)  # fmt: skip
def test_a_wrong_command_is_seen(command: str) -> None:
    assert problem(command)


# --- samples of output ----------------------------------------------------------------------------------------------


def test_the_sample_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    sample = block_of("console", "$ refgemma generate")
    command, _, said = sample.partition("\n")
    assert main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out == said


def columns(line: str) -> tuple[str, ...]:
    """Return a row without the distance, whose last digits depend on the processor."""
    case, tensors, distance, verdict = line.split(maxsplit=3)
    float(distance)
    return case, tensors, re.sub(r"\(.*", "", verdict)


def test_the_sample_of_verify() -> None:
    sample = block_of("text", "case                             tensors  worst/bound  verdict\nbends")
    head, *rows, _, total = sample.splitlines()
    command = [sys.executable, "-m", "refgemma", "verify"]  # not in pytest, where shapes are checked and cost time
    shown = subprocess.run([*command, *(row.split()[0] for row in rows)], capture_output=True, text=True, check=True)
    out = shown.stdout.splitlines()
    assert out[0].split() == head.split()
    assert [columns(row) for row in out[1:-1]] == [columns(row) for row in rows]
    # The last line counts all cases, which .ci/run verifies; here only how many there are, and with what.
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert total.startswith(f"{len(listed)} cases, ")
    assert total.partition(" 0 differ")[2] == out[-1].partition(" 0 differ")[2]


def test_the_sample_of_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # "the tanh form of GELU was replaced by the exact one on purpose"
    sample = block_of("text", "bends-forward-f32")
    monkeypatch.setattr(layers, "ACTIVATIONS", {"gelu_pytorch_tanh": activations.gelu}, raising=False)
    monkeypatch.setattr(layers, "gelu_tanh", activations.gelu, raising=False)
    monkeypatch.setitem(activations.ACTIVATIONS, "gelu_pytorch_tanh", activations.gelu)
    assert main(["verify", "bends-forward-f32"]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bends"))
    assert columns(row) == columns(sample.strip())
    assert (
        re.findall(r"\((operation): 1.9e\+03", row) == re.findall(r"\((operation): 1.9e\+03", sample) == ["operation"]
    )


def test_the_samples_of_a_known_bug(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "how-to" / "add-a-known-bug.md").read_text("utf-8")
    function, entry, said = blocks(page, "text")
    names = vars(known_bugs) | {"np": np, "math": math, "wide": wide, "narrow": narrow}
    exec(compile(function, "add-a-known-bug.md", "exec"), names)
    bug = eval(compile(f"({entry.strip()})", "add-a-known-bug.md", "eval"), names)[0]
    monkeypatch.setattr(known_bugs, "KNOWN_BUGS", (*known_bugs.KNOWN_BUGS, bug))
    for module in [module for name, module in sys.modules.items() if name.startswith("refgemma.")]:
        if hasattr(module, "KNOWN_BUGS") and module is not known_bugs:
            monkeypatch.setattr(module, "KNOWN_BUGS", known_bugs.KNOWN_BUGS)
    model = refgemma.load("conformance")
    ids = np.random.default_rng(0).integers(4, 97, (1, 24))
    with monkeypatch.context() as during:
        during.setitem(activations.ACTIVATIONS, "gelu_pytorch_tanh", names["gelu_without_cube"])
        wrong = [("input_ids", ids), *run_in_order(ids, model.weights, model.config)]
        save_trace(wrong, tmp_path / "port.safetensors", {"dtype": "float32"})
    assert main(["known-bugs", "gelu-without-cube"]) == 0
    assert "the tanh form of GELU has no cubic term" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "port.safetensors"), "--model", "conformance"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line in said.splitlines()] == said.splitlines()


SAMPLES: dict[str, str] = {  # the first line of a block of output -> where it is compared
    "case                             tensors  worst/bound  verdict": "test_the_sample_of_verify",
    "def gelu_without_cube(x: Array) -> Array:": "test_the_samples_of_a_known_bug",
    'KnownBug("gelu-without-cube", "the tanh form of GELU has no cubic term", ("feed_forward.gelu",),': (
        "test_the_samples_of_a_known_bug"
    ),
    "DIFFERS first at layers.0.feed_forward.gelu: gelu-without-cube": "test_the_samples_of_a_known_bug",
    "DIFFERS first at grads.model.norm.weight: loss-mean-of-means": "test_the_sample_of_a_trainer",
    '{"trace": "runs/plain.safetensors", "model": "conformance"}': "tests/test_sweep.py reads such files",
    "http://127.0.0.1:8181 (small.gguf) against small-gguf: 612 log probabilities at 55 places": (
        "an answer of llama-cpp-python, which is not installed here; tests/strangers/test_audit.py reads other answers"
    ),
}


def test_every_sample_is_compared() -> None:
    first = [block.splitlines()[0] for page in PAGES for block in blocks(page.read_text("utf-8"), "text")]
    left = [line for line in first if line not in SAMPLES and not line.startswith("bends-forward-f32")]
    assert left == []


def test_the_numbers_in_the_readme() -> None:
    said = " ".join(README.split())
    assert "knows over a hundred bugs, most of them found in real ports" in said
    assert len(known_bugs.KNOWN_BUGS) > 100
    assert sum(not bug.seen.startswith("unverified") for bug in known_bugs.KNOWN_BUGS) > 0.5 * len(
        known_bugs.KNOWN_BUGS
    )
    assert f"apply {len(LAWS)} laws" in said
    total = block_of("text", "case                             tensors  worst/bound  verdict\nbends").splitlines()[-1]
    assert f"Of {total.split()[2]} recorded tensors none differs" in said
