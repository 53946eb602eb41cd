"""Test the command `train`: its folder, runs that are killed and resumed, and one-line errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import refgemma
from refgemma.cli.main import main
from refgemma.cli.output import MISUSE, OK
from refgemma.hub import find_model
from refgemma.training import run
from refgemma.training.run import CHECKPOINT
from refgemma.weights.save import STAGING

TEXT = "The king had a daughter, and she was as beautiful as the day. He said: go into the wood, my child. " * 12
SMALL = ["--seq-len", "16", "--batch-size", "2"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_text(TEXT)
    return str(tmp_path / "text")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_learns_its_text_and_is_loaded(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    command = ["train", text, "-o", str(out), *SMALL, "--max-steps", "12", "--learning-rate", "0.002"]
    assert main([*command, "--json"]) == OK
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""  # no terminal, no bar
    assert found["held_out_loss_after"] < found["held_out_loss_before"] - 0.5
    assert len(found["losses"]) == found["steps"] == 12
    assert names(out) == sorted([
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
    ])  # fmt: skip
    model = refgemma.load(out)
    assert model.config.dtype == "float32"
    assert model.stop_ids == refgemma.load("tiny").stop_ids
    assert main(["generate", "The king", "--model", str(out), "--max-new-tokens", "3"]) == OK
    assert main([*command]) == MISUSE
    assert "is not empty; give an empty folder" in capsys.readouterr().err


def test_lines_are_printed_every_few_steps(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", text, "-o", str(tmp_path / "m"), *SMALL, "--max-steps", "3", "--logging-steps", "2"]
    assert main([*command, "--warmup-steps", "1", "--learning-rate", "0.001"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2 of 3: loss ")
    assert lines[0].endswith("learning rate 0.001")
    assert lines[1].startswith("held-out loss ")
    assert len(lines) == 3


def test_an_adapter_is_written_and_read(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    command = ["train", text, "-o", str(out), *SMALL, "--max-steps", "4", "--learning-rate", "0.02", "--json"]
    assert main([*command, "--lora-r", "4", "--lora-target-modules", "q_proj,down_proj"]) == OK
    assert names(out) == ["adapter_config.json", "adapter_model.safetensors"]
    about = json.loads((out / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["target_modules"]) == (4, 8.0, ["q_proj", "down_proj"])
    found = json.loads(capsys.readouterr().out)
    assert found["held_out_loss_after"] < found["held_out_loss_before"]
    assert main(["generate", "The king", "--model", str(out), "--max-new-tokens", "3"]) == OK
    adapted, base = refgemma.load(out).weights, refgemma.load("tiny").weights
    assert (adapted.layers[2].q_proj != base.layers[2].q_proj).any()
    assert (adapted.layers[2].v_proj == base.layers[2].v_proj).all()
    # An adapter of an adapter is none that PEFT could load.
    assert main(["train", text, "-o", str(tmp_path / "b"), *SMALL, "--lora-r", "2", "--model", str(out)]) == MISUSE
    assert "is itself an adapter" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_only_the_number_of_rows_of_a_step_counts(text: str, tmp_path: Path) -> None:
    ways = (["8"], ["2", "--gradient-accumulation-steps", "4"], ["8", "--gradient-checkpointing"])
    for n, way in enumerate(ways):
        command = ["train", text, "-o", str(tmp_path / str(n)), "--seq-len", "16", "--max-steps", "2", "--json"]
        assert main([*command, "--batch-size", *way]) == OK
    written = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(len(ways))]
    assert len(set(written)) == 1


def test_the_seed_counts(text: str, tmp_path: Path) -> None:
    for n, seed in enumerate(["1", "1", "2"]):
        command = ["train", text, "-o", str(tmp_path / str(n)), *SMALL, "--max-steps", "2", "--seed", seed]
        assert main(command) == OK
    written = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(3)]
    assert written[0] == written[1] != written[2]


# --- stopped and resumed ----------------------------------------------------------------------------------------------

LONG = [*SMALL, "--max-steps", "60", "--save-steps", "5", "--learning-rate", "0.001"]


def start(arguments: list[str]) -> Any:
    # A shell makes what it runs in the background ignore SIGINT, and so the tests of such a pytest.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from refgemma.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: Any) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["--lora-r", "2"]], ids=["model", "adapter"])
def test_killed_and_resumed_gives_the_same_bits(lora: list[str], text: str, tmp_path: Path) -> None:
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert main(["train", text, "-o", str(tmp_path / "whole"), *LONG, *lora]) == OK
    killed = tmp_path / "killed"
    command = ["train", text, "-o", str(killed), *LONG, *lora]
    process = start(command)
    wait_for(killed / CHECKPOINT, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / file).exists()
    process = start([*command, "--resume"])  # and once more, a few steps later
    first = os.stat(killed / CHECKPOINT).st_mtime_ns
    while process.poll() is None and os.stat(killed / CHECKPOINT).st_mtime_ns == first:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert main([*command, "--resume"]) == OK
    assert names(killed) == names(tmp_path / "whole")
    assert (killed / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_last_checkpoint(number: signal.Signals, text: str, tmp_path: Path) -> None:
    out = tmp_path / "m"
    process = start(["train", text, "-o", str(out), *LONG])
    wait_for(out / CHECKPOINT, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert names(out) == [CHECKPOINT]
    assert main(["train", text, "-o", str(out), *LONG, "--resume"]) == OK


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run.train_step

    def train_step(state: Any, *arguments: Any) -> Any:
        if state.step == steps:
            raise KeyboardInterrupt
        return plain(state, *arguments)

    monkeypatch.setattr(run, "train_step", train_step)


def test_a_run_stopped_before_its_first_checkpoint_leaves_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, monkeypatch)
    assert main(["train", text, "-o", str(tmp_path / "m"), *SMALL]) == 130
    assert not (tmp_path / "m").exists()
    (tmp_path / "there").mkdir()
    assert main(["train", text, "-o", str(tmp_path / "there"), *SMALL]) == 130
    assert names(tmp_path / "there") == []


def test_a_run_is_resumed_only_as_it_was(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    command = ["train", text, "-o", str(out), *SMALL, "--max-steps", "3", "--save-steps", "1"]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert main(command) == 130
    capsys.readouterr()
    kept = (out / CHECKPOINT).read_bytes()
    (tmp_path / "other").write_text(TEXT.replace("wood", "town"))
    refused = {
        "is not empty; give an empty folder, or continue it with --resume": command,
        "learning_rate was 0.0005, not 0.1": [*command, "--resume", "--learning-rate", "0.1"],
        "max_steps was 3, not 4": [*command[:-3], "4", "--resume"],
        "text was": ["train", str(tmp_path / "other"), *command[2:], "--resume"],
        "model was": [*command, "--resume", "--dtype", "float64"],
        "lora was None": [*command, "--resume", "--lora-r", "2"],
    }
    for said, arguments in refused.items():
        assert main(arguments) == MISUSE
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert names(out) == [CHECKPOINT]
        assert (out / CHECKPOINT).read_bytes() == kept
    assert main([*command, "--resume"]) == OK
    assert main([*command, "--resume"]) == MISUSE
    assert f"has no {CHECKPOINT}, so no run can be resumed" in capsys.readouterr().err


def test_two_runs_in_one_folder(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from refgemma.errors import RefgemmaError
    from refgemma.files import lock_folder

    (tmp_path / "m" / STAGING).mkdir(parents=True)  # also what a process leaves that was killed at once
    with lock_folder(tmp_path / "m" / STAGING, RefgemmaError):
        assert main(["train", text, "-o", str(tmp_path / "m"), *SMALL]) == MISUSE
        assert "another process is writing to this folder" in capsys.readouterr().err
    assert main(["train", text, "-o", str(tmp_path / "m"), *SMALL, "--max-steps", "1"]) == OK


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; give a text to train on"),
        (b"Hello.", "the text is too short: at least one row to train on and one to hold out are needed"),
        (b"a\0b" * 100, "character 1 is NUL"),
        (b"\x93quoted\x94", "byte 0 is not UTF-8"),
    ],
)
def test_texts_that_cannot_be(content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_bytes(content)
    check_refusal(["train", str(tmp_path / "text"), "-o", str(tmp_path / "m")], said, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seq-len", "1"], "--seq-len is 1; it must be from 2 to 320"),
        (["--seq-len", "321"], "--seq-len is 321; it must be from 2 to 320"),
        (["--batch-size", "0"], "per_device_train_batch_size is 0; it must be a whole number of at least 1"),
        (["--batch-size", "1000000000000"], "lower --batch-size"),
        (["--gradient-accumulation-steps", "-3"], "gradient_accumulation_steps is -3"),
        (["--max-steps", "0"], "max_steps is 0"),
        (["--num-train-epochs", "0"], "--num-train-epochs 0"),
        (["--num-train-epochs", "inf"], "--num-train-epochs inf"),
        (["--learning-rate", "nan"], "learning_rate is nan; it must be a number above 0"),
        (["--warmup-steps", "-1"], "warmup_steps is -1.0"),
        (["--warmup-steps", "nan"], "warmup_steps is nan"),
        (["--adam-beta2", "1"], "adam_beta2 is 1.0; it must be a number from 0 to below 1"),
        (["--seed", "-1"], "seed is -1"),
        (["--save-steps", "0"], "--save-steps 0: it must be at least 1"),
        (["--logging-steps", "0"], "--logging-steps 0: it must be at least 1"),
        (["--validation-split-percentage", "nan"], "the validation split is nan percent"),
        (["--validation-split-percentage", "100"], "is 100 percent; it must be above 0 and below 100"),
        (["--lora-alpha", "3"], "--lora-alpha needs --lora-r"),
        (["--lora-r", "0"], "both must be above 0"),
        (["--lora-r", "2", "--lora-alpha", "inf"], "both must be above 0"),
        (["--lora-r", "2", "--lora-target-modules", "lm_head"], "'lm_head' is not a projection"),
        (["--model", "nowhere"], "no such folder"),
        (["--model", "conformance"], "tokenizer"),
        (["--dtype", "bfloat16"], "invalid choice"),
        (["--max-steps", "3", "--learning-rate", "1e30"], "so training stops; lower the learning rate"),
        (["--max-steps", "1", "--learning-rate", "1e39"], "is no longer finite; lower the learning rate"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(
    arguments: list[str], said: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(["train", text, "-o", str(tmp_path / "m"), *SMALL, *arguments], said, tmp_path, capsys)


def check_refusal(command: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Require exit code 2, one line, and that nothing was written."""
    before = names(folder)
    try:
        code = main(command)
    except SystemExit as refusal:  # by argparse
        code = int(str(refusal.code))
    error = capsys.readouterr().err
    assert code == MISUSE, error
    assert said in error
    assert error.count("\n") == 1
    assert [name for name in names(folder) if name != "m"] == before
    assert not (folder / "m").exists() or names(folder / "m") == [CHECKPOINT]


def test_a_loss_that_is_not_finite_at_the_end(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([3.0, float("nan")])
    monkeypatch.setattr(run, "mean_loss", lambda *_: next(losses))
    command = ["train", text, "-o", str(tmp_path / "m"), *SMALL, "--max-steps", "1"]
    check_refusal(command, "the held-out loss after the last step is nan; lower --learning-rate", tmp_path, capsys)


def test_dropout_is_not_silent(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(find_model("tiny"), tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    command = ["train", text, "-o", str(tmp_path / "m"), *SMALL, "--max-steps", "1", "--model", str(tmp_path / "tiny")]
    assert main(command) == OK
    assert "attention_dropout is 0.1 in the configuration; refgemma applies no dropout" in capsys.readouterr().err


def test_a_folder_that_is_a_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", text, "-o", text]) == MISUSE
    assert "is a file; give an empty folder or a new one" in capsys.readouterr().err
    assert Path(text).read_text() == TEXT


def test_a_model_that_does_not_fit(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)  # 1 MB of memory
    check_refusal(
        ["train", text, "-o", str(tmp_path / "m"), *SMALL], "not enough memory: training this", tmp_path, capsys
    )


def test_a_model_of_another_precision_is_trained_in_float64(text: str, tmp_path: Path) -> None:
    command = ["train", text, "-o", str(tmp_path / "m"), *SMALL, "--max-steps", "1", "--dtype", "float64"]
    assert main(command) == OK
    assert {x.dtype for x in load_file(tmp_path / "m" / "model.safetensors").values()} == {np.dtype(np.float64)}
    assert find_model("tiny").is_dir()
