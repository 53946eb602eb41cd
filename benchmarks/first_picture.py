"""Measure the time from ``pip install ".[notebooks]"`` to the first picture, in a new environment.

Run `python benchmarks/first_picture.py` twice: README promises 60 seconds with the packages in pip's cache. The picture
is the first of the first notebook; the cells up to it run in a Jupyter kernel of the new environment.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read({notebook!r}, as_version=4)
client = NotebookClient(notebook, kernel_name="python3", timeout=60)
with client.setup_kernel():
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            client.execute_cell(cell, index)
            if any("image/png" in output.get("data", {{}}) for output in cell.outputs):
                print("picture")
                break
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)  # not measured, because the promise begins with pip
        python = str(Path(folder) / "bin" / "python")
        began = time.perf_counter()
        subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}[notebooks]"], check=True)
        seconds["install"] = time.perf_counter() - began
        program = PROGRAM.format(notebook=str(ROOT / "notebooks" / "01_one_token.ipynb"))
        shown = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, cwd=folder)
        if "picture" not in shown.stdout:
            sys.exit("no cell of the first notebook drew a picture")
        seconds["install and first picture"] = time.perf_counter() - began
    if args.json:
        print(json.dumps({name: round(value, 1) for name, value in seconds.items()}))
    else:
        for name, value in seconds.items():
            print(f"{name:28s} {value:6.1f} s")


if __name__ == "__main__":
    main()
