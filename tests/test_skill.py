"""Follow the instructions for coding agents, docs/how-to/SKILL.md, on a port with three bugs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from refgemma.cli.main import main
from refgemma.oracle.known_bugs import known_bug

SKILL = (Path(__file__).parents[1] / "docs" / "how-to" / "SKILL.md").read_text("utf-8")
CHECK, CARD = (shlex.split(line)[1:] for line in re.findall(r"```console\n(.*?)\n```", SKILL))

PORT = """
import numpy as np
import refgemma
from refgemma.trace.names import run_in_order, save_trace

model = refgemma.load("conformance")
ids = np.random.default_rng(0).integers(4, 97, (1, 24))
ids[:, 0] = 2
config = model.config.changed(
    sliding_window=9,
    rms_norm_eps=1e-5,
    final_logit_softcapping=None,
)
save_trace([("input_ids", ids), *run_in_order(ids, model.weights, config)], "port.safetensors", {"dtype": "float32"})
"""
# What the agent deletes when the oracle has named the bug.
FIXES = {
    "swa-window-plus-one": "    sliding_window=9,\n",
    "norm-eps-1e-5": "    rms_norm_eps=1e-5,\n",
    "final-softcap-missing": "    final_logit_softcapping=None,\n",
}


def test_the_loop_ends_with_a_port_that_conforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    port, named = PORT, []
    while True:
        (tmp_path / "port.py").write_text(port)
        subprocess.run([sys.executable, "port.py"], check=True)
        capsys.readouterr()
        code = main(CHECK)
        report = json.loads(capsys.readouterr().out)
        assert report["exit_code"] == code
        if code == 0:
            break
        named.append(report["findings"][0]["named"])
        assert report["first_divergence"].endswith(known_bug(named[-1]).fields)  # the tensor of that bug
        assert FIXES[named[-1]] in port, "the same bug is named again after it was fixed"
        port = port.replace(FIXES[named[-1]], "")
    assert sorted(named) == sorted(FIXES)
    assert main(CARD) == 0
    assert json.loads((tmp_path / "card.json").read_text("utf-8"))["verdict"] == "conforms"


def test_the_keys_of_the_table_are_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "port.py").write_text(PORT)
    subprocess.run([sys.executable, "port.py"], check=True)
    assert main(CHECK) == 1
    report = json.loads(capsys.readouterr().out)
    keys = re.findall(r"^\| (`.*?`) \|", SKILL, re.MULTILINE)
    for key in re.findall(r"`(.*?)`", " ".join(keys)):
        value = report
        for part in re.findall(r"\w+", key):
            value = value[int(part) if part.isdigit() else part]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`refgemma (.*?)`", SKILL))))
def test_every_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command.split()[0], "--help"])
    assert end.value.code == 0
    for flag in re.findall(r"--[a-z-]+", command):
        assert flag in capsys.readouterr().out


@pytest.mark.parametrize("code", re.findall(r'`python -c "(.*?)"`', SKILL))
def test_the_definition_of_an_operation_is_printed(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code, {})
    assert "tanh" in capsys.readouterr().out
