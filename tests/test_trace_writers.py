"""Test the writers of traces in docs/how-to/write-a-trace.md: each is run if a compiler is available, and its file is
read as a candidate."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from refgemma.config import Gemma2Config
from refgemma.trace.candidate import load_trace

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "how-to" / "write-a-trace.md").read_text("utf-8")
WRITERS = dict(re.findall(r"```(python|c|cpp|rust|swift)\n(.*?)```", PAGE, re.DOTALL))
HEADER = f"-I{DOCS / '_static'}"
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
# The file that a program is written to, and the commands that make it write its trace.
COMMANDS = {
    "python": ("writer.py", [[sys.executable, "writer.py"]]),
    "c": (
        "writer.c",
        [
            ["gcc", "-std=c99", "-pedantic", *STRICT[1:], HEADER, "writer.c", "-o", "writer"],
            ["./writer"],
        ],
    ),
    "cpp": (
        "writer.cpp",
        [["g++", *STRICT, "writer.cpp", "-o", "writer"], ["./writer"]],
    ),
    "rust": ("writer.rs", [["rustc", "--edition", "2021", "-D", "warnings", "writer.rs"], ["./writer"]]),
}


def assert_aligned(path: Path) -> None:
    """Require that the numbers begin at a multiple of eight bytes, so that a memory map is aligned."""
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("language", COMMANDS)
def test_what_a_writer_writes_is_read(language: str, tmp_path: Path) -> None:
    name, commands = COMMANDS[language]
    if shutil.which(commands[0][0]) is None:
        pytest.skip(f"no {commands[0][0]} on the path: the writer in {language} is not tried")
    (tmp_path / name).write_text(WRITERS[language], encoding="utf-8")
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_aligned(tmp_path / "port.safetensors")
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


FAULTS = r"""
#include "refgemma_trace.h"
int main() {
    const size_t shape[] = {1};
    float one = 1;
    refgemma_trace trace = {};
    refgemma_trace_add(&trace, "logits", "F8", 1, shape, &one);
    refgemma_trace_add(&trace, "logits", "F32", 1, shape, &one);
    if (!refgemma_trace_save(&trace, "port.safetensors")) return 1;
    puts(trace.error);
    refgemma_trace_free(&trace);
    refgemma_trace_add(&trace, "logits", "F32", 1, shape, &one);
    if (!refgemma_trace_save(&trace, "missing/port.safetensors")) return 1;
    puts(trace.error);
    refgemma_trace_free(&trace);
    refgemma_trace_metadata(&trace, "engine", "a \\ and\ta tab");
    refgemma_trace_add(&trace, "logits", "F32", 1, shape, &one);
    return refgemma_trace_save(&trace, "port.safetensors");
}
"""


def test_the_header_gives_errors_and_is_cpp_too(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the path: the C header is not tried")
    (tmp_path / "faults.cpp").write_text(FAULTS, encoding="utf-8")
    subprocess.run(["g++", *STRICT, HEADER, "faults.cpp", "-o", "faults"], cwd=tmp_path, check=True)
    done = subprocess.run(["./faults"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["logits: unknown dtype F8", "missing/port.safetensors: cannot be opened"]
    assert done.returncode == 0
    assert_aligned(tmp_path / "port.safetensors")
    with safe_open(tmp_path / "port.safetensors", "np") as file:
        assert file.metadata() == {"engine": "a \\ and\ta tab"}
        assert file.get_tensor("logits").tolist() == [1.0]
