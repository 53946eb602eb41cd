"""Give damaged folders to the commands: exit code 2 and one line, or the file is read; never a traceback, endless
waiting or excessive memory.

``tests/test_fuzz.py`` tests the readers; this file tests ``info``, ``generate`` and ``chat`` on fixed cases."""

import io
import json
import random
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from refgemma.cli.main import main
from refgemma.cli.output import MISUSE, OK
from refgemma.config import Gemma2Config
from refgemma.hub import find_model
from refgemma.testing.strategies import tensors_of
from refgemma.tokenizer.tokenizer import Tokenizer
from refgemma.weights.checkpoint import INDEX, SINGLE
from refgemma.weights.parameters import tensor_shapes

SEED = 21
DAMAGES = 12  # of each file, half of them of its bytes and half of its JSON
GIBIBYTE = 2**30

SMALL = Gemma2Config(
    vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=2,
)  # fmt: skip
TENSORS = tensors_of(SMALL)
WEIGHTS, CONFIG = save(TENSORS, {"format": "pt"}), SMALL.to_json_string().encode()
TINY = find_model("tiny")

SHORT = ["--max-new-tokens", "2"]
INFO, IDS = ["info", "FOLDER"], ["generate", "--model", "FOLDER", "--ids", "2,3", *SHORT]
TEXT, CHAT = ["generate", "--model", "FOLDER", "Once", *SHORT], ["chat", "--model", "FOLDER", *SHORT]


@dataclass(frozen=True)
class Target:
    """A file to damage, its undamaged contents, the other files of the folder, and the commands that read it."""

    file: str
    whole: bytes
    commands: tuple[list[str], ...]
    beside: dict[str, bytes | Path] = field(default_factory=dict)

    def write(self, folder: Path, content: bytes) -> None:
        """Make the folder with `content` in the file."""
        folder.mkdir()
        for name, other in self.beside.items():
            if isinstance(other, Path):
                shutil.copyfile(other, folder / name)
            else:
                (folder / name).write_bytes(other)
        (folder / self.file).write_bytes(content)


def in_tiny(file: str, whole: bytes, *commands: list[str]) -> Target:
    """Return the target for a file of the tiny model; the other files are copied."""
    beside: dict[str, bytes | Path] = {path.name: path for path in TINY.iterdir() if path.name != file}
    return Target(file, whole, commands, beside)


SETTINGS = json.loads((TINY / "tokenizer_config.json").read_bytes())
SHARDED = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(TENSORS, "a.safetensors")}).encode()
TARGETS = {
    "configuration": Target("config.json", CONFIG, (INFO, IDS), {SINGLE: WEIGHTS}),
    "generation": in_tiny("generation_config.json", (TINY / "generation_config.json").read_bytes(), INFO, TEXT),
    "index": Target(INDEX, SHARDED, (INFO, IDS), {"a.safetensors": WEIGHTS, "config.json": CONFIG}),
    "header": Target(SINGLE, WEIGHTS, (INFO, IDS), {"config.json": CONFIG}),
    "tokenizer": in_tiny("tokenizer.model", (TINY / "tokenizer.model").read_bytes(), TEXT),
    "tokenizer settings": in_tiny("tokenizer_config.json", json.dumps(SETTINGS).encode(), TEXT, CHAT),
}  # fmt: skip


def write_tokenizer_json() -> bytes:
    """Return the tokenizer.json of the tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.from_pretrained("tiny").save_pretrained(folder)
        return (Path(folder) / "tokenizer.json").read_bytes()


TEMPLATE = b"{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endfor %}"
TARGETS["tokenizer.json"] = in_tiny("tokenizer.json", write_tokenizer_json(), TEXT)
del TARGETS["tokenizer.json"].beside["tokenizer.model"]
TARGETS["template"] = in_tiny("chat_template.jinja", TEMPLATE, CHAT)

Q_PROJ = "model.layers.0.self_attn.q_proj"
Q_ROWS, Q_COLUMNS = tensor_shapes(Gemma2Config.from_pretrained("tiny"))[f"{Q_PROJ}.weight"]
LORA = save({
    f"base_model.model.{Q_PROJ}.lora_A.weight": np.ones((2, Q_COLUMNS), np.float32),
    f"base_model.model.{Q_PROJ}.lora_B.weight": np.zeros((Q_ROWS, 2), np.float32),
})  # fmt: skip
ADAPTER = json.dumps({
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(TINY)
}).encode()  # fmt: skip
TARGETS["adapter"] = Target("adapter_config.json", ADAPTER, (INFO, IDS), {"adapter_model.safetensors": LORA})
TARGETS["adapter's tensors"] = Target("adapter_model.safetensors", LORA, (INFO, IDS), {"adapter_config.json": ADAPTER})


# --- damage -----------------------------------------------------------------------------------------------------------

ODD: list[Callable[[], Any]] = [
    lambda: None, lambda: -1, lambda: 0, lambda: 2**31, lambda: 2**63, lambda: 1e308, lambda: True, lambda: "",
    lambda: "x" * 100_000, lambda: "\ud800", lambda: "../../etc/passwd", lambda: [], lambda: {}, lambda: [[]] * 3,
    lambda: {"a": {"a": {}}}, lambda: float("nan"), lambda: "{{ 1 }}", lambda: "\x1b[31m\n",
]  # fmt: skip


def damage_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Change, insert, remove or double bytes, or cut off the rest; most often near the start."""
    out = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(min(len(out), draw.choice([16, 400, 10**9])) or 1)
        match draw.choice(["change", "insert", "delete", "double", "cut", "number"]):
            case "change":
                out[at : at + 3] = draw.randbytes(3)
            case "insert":
                out[at:at] = draw.randbytes(draw.randint(1, 30))
            case "delete":
                del out[at : at + draw.randint(1, 40)]
            case "double":
                out[at:at] = out[at : at + 40]
            case "cut":
                del out[at:]
            case "number":
                out[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
    return bytes(out)


def damage_json(text: bytes, draw: random.Random) -> bytes:
    """Replace a value at any depth, or remove or add a key."""
    top = json.loads(text)
    place, kept = top, []
    while isinstance(place, dict | list) and place and (not kept or draw.random() < 0.7):
        key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
        kept.append((place, key))
        place = place[key]
    into, key = kept[-1]
    if draw.random() < 0.2:
        del into[key]
    else:
        into[key] = draw.choice(ODD)()
    return json.dumps(top).encode()


def damages(target: Target, draw: random.Random) -> Iterator[bytes]:
    """Yield `DAMAGES` damaged contents of a file; in a safetensors file, the JSON header is damaged."""
    for number in range(DAMAGES):
        if number % 2 or target.file.endswith((".model", ".jinja")):
            yield damage_bytes(target.whole, draw)
        elif target.file.endswith(".json"):
            yield damage_json(target.whole, draw)
        else:
            length = int.from_bytes(target.whole[:8], "little")
            header = damage_json(target.whole[8 : 8 + length], draw)
            yield struct.pack("<Q", len(header)) + header + target.whole[8 + length :]


def ask(command: list[str], folder: Path, monkeypatch: Any, capsys: Any) -> int:
    """Run a command on a folder, check its output against the rules, and return the exit code."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n"))
    code = main([str(folder) if part == "FOLDER" else part for part in command])
    err = capsys.readouterr().err
    if code != OK:
        assert code == MISUSE, err
        said = [line for line in err.splitlines() if not line.startswith("refgemma: warning: ")]
        assert len(said) == 1, err
        assert said[0].startswith(f"refgemma {command[0]}: ")
        assert said[0].isprintable()
        assert len(said[0]) < 2000
    return code


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """If every folder gave an error, the test below would pass."""
    target = TARGETS[name]
    target.write(tmp_path / "whole", target.whole)
    for command in target.commands:
        assert ask(command, tmp_path / "whole", monkeypatch, capsys) == OK


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_end_in_one_line(name: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    target, draw = TARGETS[name], random.Random(f"{SEED} {name}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number, content in enumerate(damages(target, draw)):
        target.write(tmp_path / str(number), content)
        codes = [ask(command, tmp_path / str(number), monkeypatch, capsys) for command in target.commands]
        refused += MISUSE in codes
    assert refused >= DAMAGES // 4  # the damage is such that it matters
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIBIBYTE


@pytest.mark.parametrize("key", ["hidden_size", "model_type", "hidden_activation", "layer_types"])
def test_a_long_value_is_cut_in_the_line(key: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    target = TARGETS["configuration"]
    target.write(tmp_path / "long", json.dumps(json.loads(CONFIG) | {key: "x" * 100_000}).encode())
    assert ask(INFO, tmp_path / "long", monkeypatch, capsys) == MISUSE
