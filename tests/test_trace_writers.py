"""The writers of traces in docs/how-to/write-a-trace.md: each is run, where there is a compiler, and what it writes is
read as a candidate."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refgemma.config import Gemma2Config
from refgemma.trace.candidate import load_trace

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "write-a-trace.md").read_text("utf-8")
WRITERS = dict(re.findall(r"```(python|cpp|rust|swift)\n(.*?)```", PAGE, re.DOTALL))
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
# The file that a program is written to, and the commands that make it write its trace.
COMMANDS = {
    "python": ("writer.py", [[sys.executable, "writer.py"]]),
    "cpp": (
        "writer.cpp",
        [["g++", *STRICT, "writer.cpp", "-o", "writer"], ["./writer"]],
    ),
    "rust": ("writer.rs", [["rustc", "--edition", "2021", "-D", "warnings", "writer.rs"], ["./writer"]]),
}


@pytest.mark.parametrize("language", COMMANDS)
def test_what_a_writer_writes_is_read(language: str, tmp_path: Path) -> None:
    name, commands = COMMANDS[language]
    if shutil.which(commands[0][0]) is None:
        pytest.skip(f"no {commands[0][0]} on the path: the writer in {language} is not tried")
    (tmp_path / name).write_text(WRITERS[language], encoding="utf-8")
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = load_trace(tmp_path / "port.safetensors", Gemma2Config.from_pretrained("conformance"))
    assert (found.dtype, found.dtype_from, found.engine) == ("bfloat16", "metadata", 'my "port" 1.0')
    assert (found.refused, found.unknown) == ({}, ())
    assert found.call.input_ids.tolist() == [[2, 5, 9]]
    wanted = {
        "embedded": np.arange(90).reshape(1, 3, 30) / 8,
        "layers.0.out": np.ones((1, 3, 30)),
        "logits": np.arange(291).reshape(1, 3, 97) / 4,
    }
    assert set(found.tensors) == set(wanted)
    for tensor, numbers in wanted.items():
        np.testing.assert_array_equal(found.tensors[tensor].numbers, numbers)
