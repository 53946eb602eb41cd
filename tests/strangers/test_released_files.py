"""Identify the release of a folder, by comparing its files with published lengths and hashes of Google's files. Our own
writer reproduces these lengths and hashes without a weight.

The expected values are those of ``golden/released/files.json``; *proven* and *pin* values were not computed here."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refgemma.cli.main import main
from refgemma.cli.output import MISUSE, OK
from refgemma.config import PRESETS, Gemma2Config
from refgemma.errors import RefgemmaError
from refgemma.goldens import released
from refgemma.goldens.released import FileVerdict, identify_release, known_files, read_released, released_json, releases
from refgemma.tokenizer.chat import CHAT_TEMPLATE
from refgemma.weights.checkpoint import INDEX, open_checkpoint
from refgemma.weights.parameters import tensor_shapes
from refgemma.weights.save import OutputTensor, build_header, build_index, file_bytes, plan_files, write_checkpoint
from refgemma.weights.synthetic import write_synthetic

RELEASES = releases()


def plan(release: str) -> dict[str, list[OutputTensor]]:
    """Return the weights files, as our own writer plans them."""
    about = RELEASES[release]
    shapes = tensor_shapes(Gemma2Config.preset(about["size"]))
    return plan_files([OutputTensor(name, about["dtype"], shape, None) for name, shape in shapes.items()], "5GB")


def json_file(content: dict[str, Any]) -> bytes:
    """Return a configuration as transformers 4.42 wrote it; our writer has other keys, so the text is made here."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def pretend(folder: Path, release: str) -> None:
    """Make a folder whose files have the released lengths and, except for weights, the released bytes."""
    for name, outputs in plan(release).items():
        with (folder / name).open("wb") as file:
            file.write(build_header(outputs))
            file.truncate(file_bytes(outputs))  # all weights are zero and take no space on the disk
    (folder / INDEX).write_bytes(build_index(plan(release)))
    for name, content in released_json(release).items():
        (folder / name).write_bytes(json_file(content))


# --- the published lengths and hashes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_our_index_is_the_released_one_to_the_byte(release: str) -> None:
    index, published = build_index(plan(release)), RELEASES[release]["files"][INDEX]
    assert (len(index), hashlib.sha256(index).hexdigest()) == (published["bytes"], published["sha256"])


@pytest.mark.parametrize("release", RELEASES)
def test_our_shards_have_the_released_lengths(release: str) -> None:
    lengths = {name: file_bytes(outputs) for name, outputs in plan(release).items()}
    published = {name: file for name, file in RELEASES[release]["files"].items() if name.endswith(".safetensors")}
    assert {name: lengths[name] for name in published if "bytes" in published[name]} == {
        name: file["bytes"] for name, file in published.items() if "bytes" in file
    }
    assert published.keys() <= lengths.keys()
    if "weights_bytes" in RELEASES[release]:
        assert sum(lengths.values()) == RELEASES[release]["weights_bytes"]["value"]


def test_something_is_proven_of_five_of_the_six() -> None:
    """Nothing was published about the 27B. If the data were lost, the tests above would pass."""
    proven = [
        name for name, about in RELEASES.items()
        if "weights_bytes" in about or any("proven" in file["state"] for file in about["files"].values())
    ]  # fmt: skip
    assert sorted(RELEASES.keys() - proven) == ["google/gemma-2-27b"]


@pytest.mark.parametrize("release", [name for name, about in RELEASES.items() if "config" in about])
def test_the_configurations_are_rebuilt_to_the_byte(release: str) -> None:
    for name, content in released_json(release).items():
        published, text = RELEASES[release]["files"][name], json_file(content)
        assert (len(text), hashlib.sha256(text).hexdigest()) == (published["bytes"], published["sha256"])


def test_keys_that_a_released_configuration_has_and_ours_has_not() -> None:
    """Our writer has the keys of transformers 5; its files mean the same to readers of either version."""
    content = released_json("google/gemma-2-2b")["config.json"]
    ours = json.loads(Gemma2Config.from_dict(content).to_json_string())
    assert content.keys() - ours.keys() >= {"torch_dtype"}  # dtype now
    assert all(ours[key] == content[key] for key in content.keys() & ours.keys() - {"cache_implementation"})


def test_the_chat_template_is_the_released_text() -> None:
    assert hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest() == read_released("files")["chat_template"]["sha256"]


@pytest.mark.parametrize(("size", "release"), [("2b", "2b-it"), ("9b", "9b-it"), ("27b", "27b-it")])
def test_synth_has_the_layout_of_the_release_in_bfloat16(
    size: str, release: str, tmp_path: Path, monkeypatch: Any
) -> None:
    written: dict[str, Any] = {}

    def keep(folder: Path, shards: dict[str, list[OutputTensor]], fingerprint: str) -> None:
        written.update(shards)
        raise KeyboardInterrupt

    monkeypatch.setattr("refgemma.weights.save._write_shards", keep)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(Gemma2Config.preset(size), tmp_path)
    index = RELEASES[f"google/gemma-2-{release}"]["files"][INDEX]
    assert hashlib.sha256(build_index(written)).hexdigest() == index["sha256"]


# --- a folder ---------------------------------------------------------------------------------------------------------


def verdicts(folder: Path, **more: Any) -> dict[str, FileVerdict]:
    found = identify_release(folder, open_checkpoint(folder).config, **more)
    return {file.name: file for file in found.files}


def test_info_says_which_release_a_folder_is(tmp_path: Path, capsys: Any) -> None:
    pretend(tmp_path, "google/gemma-2-2b-it")
    assert main(["info", str(tmp_path)]) == OK
    out = capsys.readouterr().out
    assert "nearest is google/gemma-2-2b-it (revision 299a8560), with 5 of its files" in out
    assert main(["info", str(tmp_path), "--json"]) == OK
    found = json.loads(capsys.readouterr().out)["released"]
    assert (found["release"], found["complete"]) == ("google/gemma-2-2b-it", False)
    assert {file["name"]: file["verdict"] for file in found["files"]} == {
        "config.json": "same",
        "generation_config.json": "same",
        "model.safetensors.index.json": "same",
        "model-00001-of-00002.safetensors": "same length",
        "model-00002-of-00002.safetensors": "same length",
        "special_tokens_map.json": "absent",
        "tokenizer.json": "absent",
        "tokenizer.model": "absent",
        "tokenizer_config.json": "absent",
        "chat template": "absent",
    }


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [(CHAT_TEMPLATE, "same"), (CHAT_TEMPLATE.replace(" | trim", ""), "differs"), ([{"name": "a"}], "differs")],
)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_that_was_edited_is_seen(tmp_path: Path, place: str, changed: Any, verdict: str) -> None:
    pretend(tmp_path, "google/gemma-2-2b-it")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": changed}))
    if place == "chat_template.jinja":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "not the one that counts"}))
        (tmp_path / place).write_text(str(changed))
    assert verdicts(tmp_path)["chat template"].verdict == verdict


def test_what_differs_is_named_key_by_key(tmp_path: Path) -> None:
    pretend(tmp_path, "google/gemma-2-2b")
    config = released_json("google/gemma-2-2b")["config.json"]
    (tmp_path / "config.json").write_bytes(json_file(config | {"eos_token_id": [1, 107], "added": 0}))
    found = verdicts(tmp_path)["config.json"]
    assert found.verdict == "differs"
    assert found.detail == "added is 0, released without; eos_token_id is [1, 107], released 1"


@pytest.mark.parametrize("spoil", [b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff"])
def test_a_file_that_is_no_json_is_said_to_differ(tmp_path: Path, spoil: bytes) -> None:
    pretend(tmp_path, "google/gemma-2-2b")
    (tmp_path / "generation_config.json").write_bytes(spoil)
    assert verdicts(tmp_path)["generation_config.json"].verdict == "differs"


def test_a_wrong_scalar_is_seen_where_no_configuration_was_published(tmp_path: Path) -> None:
    """transformers' first 27B divided scores by the root of head_dim, 128, not 144."""
    pretend(tmp_path, "google/gemma-2-27b-it")
    config = Gemma2Config.preset("27b").to_dict() | {
        "architectures": ["Gemma2ForCausalLM"],
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_bytes(json_file(config))
    assert verdicts(tmp_path)["config.json"].verdict == "unknown"
    (tmp_path / "config.json").write_bytes(json_file(config | {"query_pre_attn_scalar": 128}))
    assert verdicts(tmp_path)["config.json"].detail == "query_pre_attn_scalar is 128, released 144"


def test_weights_of_another_length(tmp_path: Path) -> None:
    """The model is in one file, as the current save_pretrained writes a 2B."""
    pretend(tmp_path, "google/gemma-2-2b-it")
    (tmp_path / INDEX).unlink()
    for name in plan("google/gemma-2-2b-it"):
        (tmp_path / name).unlink()
    outputs = [output for part in plan("google/gemma-2-2b-it").values() for output in part]
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(build_header(outputs))
        file.truncate(file_bytes(outputs))
    found = verdicts(tmp_path)
    assert found["model.safetensors"].verdict == "extra"
    assert found["model-00001-of-00002.safetensors"].verdict == "absent"


def test_a_tokenizer_alone_names_no_release(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(released, "_judge_all", lambda folder, name, _: released.Identified(
        name, None, (FileVerdict("tokenizer.model", "same", "pin"), FileVerdict("config.json", "differs", "")))
    )  # fmt: skip
    assert identify_release(tmp_path, Gemma2Config.preset("9b")).release is None


@pytest.fixture
def small_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a release of some kilobytes, whose weights can be hashed."""
    config = Gemma2Config(
        vocab_size=8, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2,
    )  # fmt: skip
    shapes = tensor_shapes(config)
    write_checkpoint(tmp_path, [OutputTensor(n, "float32", s, np.ones(s, np.float32)) for n, s in shapes.items()])
    config.save_pretrained(tmp_path)
    names = ("vocab_size", *released.RELEASE_SIZES, "head_dim", "query_pre_attn_scalar")
    monkeypatch.setitem(PRESETS, "small", {name: getattr(config, name) for name in names})
    sums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in os.listdir(tmp_path)}
    files = {name: {"sha256": digest, "state": "pin"} for name, digest in sums.items()}
    about = {"x/small": {"size": "small", "dtype": "float32", "revision": "0" * 40, "files": files}}
    monkeypatch.setattr(released, "releases", lambda: about)
    monkeypatch.setattr(released, "known_files", known_files.__wrapped__)
    return tmp_path


def test_weights_are_hashed_on_request_only(small_release: Path) -> None:
    assert verdicts(small_release)["model.safetensors"].verdict == "same length"
    assert verdicts(small_release, hash_weights=True)["model.safetensors"].verdict == "same"
    raw = bytearray((small_release / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (small_release / "model.safetensors").write_bytes(raw)
    assert verdicts(small_release)["model.safetensors"].verdict == "same length"
    assert verdicts(small_release, hash_weights=True)["model.safetensors"].verdict == "differs"


def test_a_whole_release_is_called_one(small_release: Path, capsys: Any) -> None:
    assert main(["info", str(small_release), "--hash"]) == OK
    out = capsys.readouterr().out
    assert "release: x/small (revision 00000000), all 2 known files\n" in out
    assert main(["info", str(small_release)]) == OK
    assert "were not compared" in capsys.readouterr().out


# --- hostile folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_in_one_line(small_release: Path, name: str, kind: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(released, "releases", lambda: {
        "x/small": {"size": "small", "dtype": "float32", "revision": None, "files": {name: {"state": "pin"}}}
    })  # fmt: skip
    os.mkfifo(small_release / name) if kind == "pipe" else (small_release / name).mkdir()
    assert main(["info", str(small_release)]) == MISUSE
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{name}: is a folder, a pipe or a device, not a file; remove it" in err


def test_a_huge_file_is_not_read(small_release: Path) -> None:
    """The file is a sparse terabyte. No known file has this length, so its hash is not needed."""
    with (small_release / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    about = released.releases()
    about["x/small"]["files"]["tokenizer.json"] = {"bytes": 17525357, "sha256": "0" * 64, "state": "pin"}
    found = verdicts(small_release, hash_weights=True)["tokenizer.json"]
    assert found.verdict == "differs"
    assert found.detail == "1,099,511,627,776 bytes, released 17,525,357"


def test_links_are_followed_and_circles_end(small_release: Path) -> None:
    (small_release / "away").mkdir()
    os.rename(small_release / "model.safetensors", small_release / "away" / "model")
    (small_release / "model.safetensors").symlink_to("away/model")  # as the cache of huggingface_hub has them
    assert verdicts(small_release)["model.safetensors"].verdict == "same length"
    (small_release / "model.safetensors").unlink()
    (small_release / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises((RefgemmaError, OSError)):
        identify_release(small_release, Gemma2Config.from_json_file(small_release / "config.json"))
