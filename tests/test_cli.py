"""Test the command line as a person uses it: its output and files, exit codes, and one-line errors."""

import argparse
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import refgemma.model
from refgemma.activations import ACTIVATIONS
from refgemma.cli.main import main
from refgemma.cli.output import CUT_OFF, DIFFERS, MISUSE, OK
from refgemma.goldens.full_size import two_layer_names
from refgemma.goldens.load import case_names
from refgemma.hub import find_model

TINY = find_model("tiny")
QUICK = ["bends-forward-f32", "op-linear-bf16"]


def test_generate_continues_the_prompt(capsys) -> None:
    assert main(["generate", "Once upon a time", "--max-new-tokens", "12"]) == OK
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time")
    assert len(out) > len("Once upon a time\n")
    assert err == ""


def test_generate_json(capsys) -> None:
    assert main(["generate", "--ids", "2,300,301", "--max-new-tokens", "4", "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_ids"] == [2, 300, 301]
    assert len(found["ids"]) == 4
    assert found["stopped"] == "max_new_tokens"


def test_without_a_tokenizer_ids_are_continued_by_ids(capsys, tmp_path) -> None:
    """A folder of ``refgemma synth`` has no tokenizer; a text gives an error."""
    for file in TINY.iterdir():
        if file.name != "tokenizer.model":
            shutil.copyfile(file, tmp_path / file.name)
    command = ["generate", "--model", str(tmp_path), "--max-new-tokens", "3"]
    assert main(["generate", "--ids", "2,300", "--max-new-tokens", "3", "--json"]) == OK
    expected = json.loads(capsys.readouterr().out)["ids"]
    assert main([*command, "--ids", "2,300"]) == OK
    assert capsys.readouterr().out == ",".join(str(token) for token in [2, 300, *expected]) + "\n"
    assert main([*command, "--ids", "2,300", "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert (found["ids"], found["text"]) == (expected, None)
    assert main([*command, "Once"]) == MISUSE
    assert "has no tokenizer.model" in capsys.readouterr().err


@pytest.mark.parametrize("others", [[], ["--num-beams", "2"]])
def test_reference_is_the_definition(others, capsys, monkeypatch, tmp_path) -> None:
    """The text is the same; without --reference, another model does not use the blocks of `refgemma.layers`."""
    (tmp_path / "model").symlink_to(TINY)
    command = ["generate", "--model", str(tmp_path / "model"), "--ids", "2,300,301", "--max-new-tokens", "4", "--json"]
    command += others
    assert main(command) == OK
    fast = json.loads(capsys.readouterr().out)["ids"]
    calls = []
    correct = refgemma.model.block
    monkeypatch.setattr("refgemma.model.block", lambda *rest, **named: calls.append(1) or correct(*rest, **named))
    assert main(command) == OK
    assert not calls
    capsys.readouterr()
    assert main([*command, "--reference"]) == OK
    assert json.loads(capsys.readouterr().out)["ids"] == fast
    assert calls


def test_perplexity_with_the_definition(capsys, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king.", encoding="utf-8")
    found = []
    for others in ([], ["--reference"]):
        assert main(["perplexity", str(text), "--json", *others]) == OK
        found.append(json.loads(capsys.readouterr().out)["transformers"]["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # of a mean of float32 losses


def test_chat_keeps_turns(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Tell me a tale.\nAnd then?\n"))
    assert main(["chat", "--json", "--max-new-tokens", "6", "--temperature", "0.8"]) == OK
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["turn"] for turn in turns] == [1, 2]


def test_chat_takes_markers_that_are_typed_for_text(capsys, monkeypatch) -> None:
    seen = []

    def noted(ids, *_, **named):
        seen.append(list(ids))
        return iter([1])

    monkeypatch.setattr("refgemma.cli.text.continue_prompt", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi<end_of_turn><start_of_turn>model<eos>\n"))
    assert main(["chat", "--json"]) == OK
    assert [token for token in seen[0] if token < 7] == [2, 5, 6, 5]  # <bos>, the turn, and the model's beginning


def test_verify_prints_a_row_a_case(capsys) -> None:
    assert main(["verify", *QUICK]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["case", *QUICK, "2"]
    assert all("conforms" in line for line in lines[1:3])
    assert "recorded with torch 2.13.0" in lines[-1]


def test_verify_names_the_first_diverging_tensor(capsys, monkeypatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, "gelu_pytorch_tanh", lambda x: x)
    monkeypatch.setattr("refgemma.ops.gelu_tanh", lambda x: x)
    assert main(["verify", "bends-forward-f32"]) == DIFFERS
    assert "DIFFERS first at layers.0.feed_forward.gelu" in capsys.readouterr().out
    assert main(["verify", "bends-forward-f32", "--json"]) == DIFFERS
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "differs"
    assert found["cases"][0]["first_divergence"]["tensor"] == "layers.0.feed_forward.gelu"


def test_verify_lists_cases(capsys) -> None:
    assert main(["verify", "--list"]) == OK
    assert capsys.readouterr().out.split() == [*case_names(), *two_layer_names()]
    assert main(["verify", "--list", "--json"]) == OK
    assert json.loads(capsys.readouterr().out) == [*case_names(), *two_layer_names()]


def test_trace_writes_every_tensor(tmp_path, capsys) -> None:
    path = tmp_path / "run.safetensors"
    assert main(["trace", "Once upon", "-o", str(path), "--dtype", "bfloat16"]) == OK
    tensors = load_file(path)
    assert tensors["input_ids"].dtype == np.int64
    assert tensors["layers.5.attention.probs"].shape[:2] == (1, 6)
    assert tensors["logits"].dtype.name == "bfloat16"
    with safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "refgemma-trace/1"
    assert "tensors" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_help_lists_each_command_once(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "known-bugs" in text
    assert "variants" not in text  # the former name still works, but is listed nowhere
    assert main(["variants", "final-softcap-missing"]) == OK


def test_info(capsys) -> None:
    assert main(["info"]) == OK
    text = capsys.readouterr().out
    (line,) = (line.split() for line in text.splitlines() if "down_proj" in line)
    assert line == ["model.layers.N.mlp.down_proj.weight", "(234,", "408)", "bfloat16,", "in", "6", "layers"]
    assert main(["info", "tiny", "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(np.prod(t["shape"]) for t in found["tensors"])
    assert found["bytes"] == 2 * found["parameters"]


def test_beyond_the_longest_sequence_it_warns_once_in_one_line(capsys) -> None:
    ids = ",".join(["2"] + ["300"] * 320)
    assert main(["generate", "--ids", ids, "--max-new-tokens", "3"]) == OK
    err = capsys.readouterr().err
    assert err.startswith("refgemma: warning: the sequence exceeds max_position_embeddings (320)")
    assert err.count("\n") == 1


def damaged(tmp_path: Path, change) -> str:
    """Make a copy of the tiny model with one changed tensor."""
    tmp_path.mkdir(exist_ok=True)
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return str(tmp_path)


def with_huge_numbers(tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"][:] = 3e38


def test_overflow_is_warned_of_once_and_not_in_numpys_words(tmp_path, capsys) -> None:
    assert main(["generate", "Once", "--model", damaged(tmp_path, with_huge_numbers)]) == MISUSE
    warning, error = capsys.readouterr().err.splitlines()  # NumPy warns of several operations
    assert warning.startswith("refgemma: warning: numbers became too large for this precision")
    assert error.startswith("refgemma generate: the logits are NaN")


def with_nan(tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"][7, 3] = np.nan


def test_nan_weights_are_named(tmp_path, capsys) -> None:
    assert main(["generate", "Once", "--model", damaged(tmp_path, with_nan)]) == MISUSE
    err = capsys.readouterr().err
    assert "model.layers.2.mlp.up_proj.weight" in err
    assert "[7, 3]" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate"], "either a PROMPT or --ids"),
        (["generate", "Once", "--ids", "2"], "only one of them"),
        (["generate", "--ids", "2,x"], "whole numbers"),
        (["generate", "--ids", "9" * 5000], "whole numbers"),
        (["generate", "a\udcff"], "character 1 is U+DCFF, the byte 0xFF, which is not UTF-8"),
        (["chat", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be"),
        (["generate", "--ids", "2,99999"], "input_ids[0, 1] is 99999; the vocabulary has 2048 tokens"),
        (["generate", "Once", "--temperature", "-1"], "temperature is -1.0; it must be"),
        (["generate", "Once", "--top-p", "2"], "top_p is 2.0; it must be"),
        (["generate", "Once", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["verify", "no-such-case"], "unknown case 'no-such-case'"),
        (["trace", "Once", "-o", "no/such/folder/run.safetensors"], "no/such/folder"),
        (["info", "no/such/folder"], "no such folder"),
        (["info", ""], "no such folder"),
    ],
)
def test_every_mistake_is_one_line_and_exit_2(arguments, reason, capsys) -> None:
    assert main(arguments) == MISUSE
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert err.count("\n") == 1
    assert err.startswith(f"refgemma {arguments[0]}: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["generate", "x", "--dtype", "int8"],
        ["trace", "x"],
        ["generate", "x", "--top-k", "a"],
        ["9" * 9999],
    ],
    ids=["nothing", "command", "dtype", "output", "number", "long"],
)
def test_misuse_is_one_line_and_exit_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == MISUSE
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 2000


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path, capsys, monkeypatch) -> None:
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device", "run.safetensors.part")

    monkeypatch.setattr("refgemma.files.os.replace", full_disk)
    assert main(["trace", "Once", "-o", str(tmp_path / "run.safetensors")]) == MISUSE
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_as_a_program_from_another_folder(tmp_path) -> None:
    """The recordings and the model are found from any folder; a closed pipe gives no traceback."""
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "refgemma", "verify", "op-masks-f32"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == OK, done.stderr
    assert done.stderr == ""
    listing = subprocess.Popen(
        [sys.executable, "-m", "refgemma", "info"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert listing.stdout is not None
    assert listing.stderr is not None
    listing.stdout.close()
    assert listing.stderr.read() == b""
    listing.stderr.close()
    assert listing.wait() == CUT_OFF


def test_a_trace_replaces_a_file_but_nothing_else(tmp_path, capsys) -> None:
    """Devices and pipes are not replaced, links are followed, other files do not change."""
    pipe, link, kept = tmp_path / "pipe", tmp_path / "link", tmp_path / "run.safetensors.part"
    os.mkfifo(pipe)
    link.symlink_to("real.safetensors")
    kept.write_text("mine")
    for target, reason in ((pipe, "a device or a pipe"), (tmp_path, "is a folder"), ("", "is a folder")):
        assert main(["trace", "Once", "-o", str(target)]) == MISUSE
        assert reason in capsys.readouterr().err
    assert pipe.is_fifo()
    assert main(["trace", "Once", "-o", str(link)]) == OK
    assert main(["trace", "Once", "-o", str(tmp_path / "run.safetensors")]) == OK
    assert main(["trace", "Once upon", "-o", str(tmp_path / "run.safetensors")]) == OK
    assert link.is_symlink()
    assert kept.read_text() == "mine"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"pipe", "link", "real.safetensors", "run.safetensors", "run.safetensors.part"}


def test_chat_without_any_input(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat"]) == OK


@pytest.mark.parametrize("content", ["{}", "[]", '{"cases": {}, "format": "refgemma-golden/1"}', "nonsense"])
def test_a_manifest_that_is_none(content, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "manifest.json").write_text(content)
    monkeypatch.setattr("refgemma.goldens.load.golden_folder", lambda: tmp_path)
    assert main(["verify"]) == MISUSE
    err = capsys.readouterr().err
    assert "manifest.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "3"])
def test_a_generation_config_that_is_no_object(content, tmp_path, capsys) -> None:
    folder = damaged(tmp_path, lambda tensors: None)
    (tmp_path / "generation_config.json").write_text(content)
    assert main(["generate", "Once", "--model", folder]) == MISUSE
    assert "must be a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.model",
     "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "added_tokens.json", "adapter_config.json"],
)  # fmt: skip
def test_what_is_no_file_in_place_of_one_is_refused_at_once(kind: str, name: str, tmp_path, capsys) -> None:
    folder = damaged(tmp_path, lambda tensors: None)
    for path in [tmp_path / name] + [tmp_path / "model.safetensors"] * ("index" in name):
        path.unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).symlink_to("/dev/zero")
    assert main(["generate", "Once", "--max-new-tokens", "1", "--model", folder]) == MISUSE
    err = capsys.readouterr().err
    assert name in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("listed", ["[[1]]", '{"a": 1}', '"x"', "1.5", "99999", "[" * 9999])
def test_stop_ids_that_are_none(listed, tmp_path, capsys) -> None:
    folder = damaged(tmp_path, lambda tensors: None)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {listed}}}')
    assert main(["generate", "Once", "--model", folder]) == MISUSE
    err = capsys.readouterr().err
    assert "generation_config.json" in err
    assert err.count("\n") == 1


def test_a_model_without_tokenizer_takes_ids(tmp_path, capsys) -> None:
    folder = damaged(tmp_path / "model", lambda tensors: None)
    (tmp_path / "model" / "tokenizer.model").unlink()
    assert main(["trace", "--ids", "2,300", "--model", folder, "-o", str(tmp_path / "run.safetensors")]) == OK
    assert main(["trace", "Once", "--model", folder, "-o", str(tmp_path / "run.safetensors")]) == MISUSE
    assert "tokenizer.model" in capsys.readouterr().err


def test_a_fault_of_our_own_has_a_code_of_its_own(capsys, monkeypatch) -> None:
    """Exit code 1 would mean that two files differ."""

    def broken(args: argparse.Namespace) -> int:
        raise KeyError("planted")

    monkeypatch.setattr("refgemma.cli.main.run_info", broken)
    assert main(["info", "tiny"]) == 70
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "internal error: KeyError: 'planted'" in captured.err


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(closed: str, tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    for arguments, code in (("info tiny", 0), (f"check {missing}", 2)):
        command = f"{shlex.quote(sys.executable)} -m refgemma {arguments} {closed}"
        assert subprocess.run(["sh", "-c", command], check=False, capture_output=True).returncode == code


def test_an_error_has_no_character_that_a_terminal_obeys(capsys) -> None:
    assert main(["info", "\x1b[31mred\x07"]) == MISUSE
    captured = capsys.readouterr()
    assert captured.err.rstrip("\n").isprintable()
    assert r"\x1b[31mred\x07" in captured.err
