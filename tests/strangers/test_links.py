"""Check that files outside a model's folder are not read, whatever links or names the folder has. The Hugging Face
cache, and a folder that is itself a link, are read. Checked with a file whose contents would be noticed."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import refgemma
from refgemma.cli.main import main
from refgemma.errors import RefgemmaError
from refgemma.hub import FOLLOW_LINKS, TEMPLATE_FOLDER, find_model, refuse_links
from refgemma.weights.checkpoint import open_checkpoint

TINY = find_model("tiny")
SECRET = "the password is swordfish"
NAMES = [
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.model",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    f"{TEMPLATE_FOLDER}/a.jinja", TEMPLATE_FOLDER, "adapter_config.json", "adapter_model.safetensors",
]  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a copy of the tiny model, with a file next to it that must not be read."""
    (tmp_path / "secret").write_text(SECRET)
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_folder_is_not_followed(
    model: Path, name: str, absolute: bool, capsys: Any, monkeypatch: Any
) -> None:
    link = model / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(model.parent / "secret" if absolute else Path(*[".."] * (1 + name.count("/")), "secret"))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n"))
    for command in (["info", str(model)], ["chat", "--max-new-tokens", "1", "--model", str(model)]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert f"{link}: is a link to a place outside its folder" in err
        assert err.count("\n") == 1
        assert "swordfish" not in out + err
    for read in (open_checkpoint, refgemma.Tokenizer.from_pretrained, refgemma.Gemma2Config.from_pretrained):
        with pytest.raises(RefgemmaError, match="a place outside its folder"):
            read(model)


def test_the_environment_can_allow_it(model: Path, monkeypatch: Any) -> None:
    (model / "model.safetensors").rename(model.parent / "store")
    (model / "model.safetensors").symlink_to("../store")
    with pytest.raises(RefgemmaError, match=f"set {FOLLOW_LINKS}=1"):
        refgemma.load(model)
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    assert refgemma.load(model).config.num_hidden_layers == 6


def test_links_within_the_folder_and_the_folder_itself_are_followed(model: Path) -> None:
    (model / "files").mkdir()
    (model / "model.safetensors").rename(model / "files" / "w")
    (model / "model.safetensors").symlink_to("files/w")
    (model / "logs").symlink_to("/")  # nothing reads it
    (model.parent / "link").symlink_to(model)
    assert refgemma.load(model.parent / "link").config.num_hidden_layers == 6


def lay_out_cache(cache: Path, model: Path) -> Path:
    """Make a cache with huggingface_hub's layout, and return the repository's folder."""
    repository = cache / "models--org--small"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(model.iterdir()):
        shutil.copyfile(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def test_the_cache_of_hugging_face_is_read(model: Path, monkeypatch: Any) -> None:
    cache = model.parent / "cache"
    repository = lay_out_cache(cache, model)
    (model.parent / "elsewhere").symlink_to(cache)  # a cache on another disk
    monkeypatch.setenv("HF_HUB_CACHE", str(model.parent / "elsewhere"))
    assert refgemma.load("org/small").config.num_hidden_layers == 6
    assert refgemma.load(repository / "snapshots" / COMMIT).config.num_hidden_layers == 6


@pytest.mark.parametrize("way", ["another repository", "refs", "blobs are a link", "a blob is a link"])
def test_a_cache_leads_to_its_own_blobs_only(model: Path, way: str, monkeypatch: Any) -> None:
    cache = model.parent / "cache"
    repository = lay_out_cache(cache, model)
    config = repository / "snapshots" / COMMIT / "config.json"
    other = cache / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    if way == "blobs are a link":
        other.rmdir()
        (repository / "blobs").rename(other)
        (repository / "blobs").symlink_to(other)
    elif way == "a blob is a link":
        blob = config.resolve()
        blob.unlink()
        blob.symlink_to(model / "config.json")
    else:
        place = other / "aa" if way == "another repository" else repository / "refs" / "aa"
        shutil.copyfile(model / "config.json", place)
        config.unlink()
        config.symlink_to(place)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    with pytest.raises(RefgemmaError, match="a place outside its folder"):
        refgemma.load("org/small")


@pytest.mark.parametrize(
    "shard", ["../secret", "/etc/passwd", "files/a.safetensors", "..", "a\\b.safetensors", "C:a.safetensors"]
)
def test_the_name_of_a_shard_stays_in_its_folder(model: Path, shard: str, capsys: Any) -> None:
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["info", str(model)]) == 2
    out, err = capsys.readouterr()
    assert "it must be the plain name of a weights file" in err
    assert "swordfish" not in out + err


@pytest.mark.parametrize("shard", ["../secret", "/etc/passwd", "a/b.bin"])
def test_the_name_of_a_pickled_shard_stays_in_its_folder(tmp_path: Path, shard: str, capsys: Any) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert main(["convert", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "it must be the plain name of a weights file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "d/0000", "d"])
def test_convert_follows_no_link_out_of_its_source(tmp_path: Path, name: str, capsys: Any) -> None:
    source = tmp_path / "source"
    (source / name).parent.mkdir(parents=True)
    (tmp_path / "secret").write_text(SECRET)
    (source / name).symlink_to(tmp_path / "secret")
    kind = "pytorch" if name.endswith(".bin") else "flax"
    assert main(["convert", str(source), "-o", str(tmp_path / "out"), "--from", kind]) == 2
    out, err = capsys.readouterr()
    assert "is a link to a place outside its folder" in err
    assert "swordfish" not in out + err


def test_compared_weights_follow_no_link(model: Path, capsys: Any) -> None:
    (model / "b.safetensors").symlink_to("../secret")
    trace = model.parent / "run.safetensors"
    main(["trace", "Once", "-o", str(trace)])
    assert main(["check", str(trace), "--weights", str(model)]) == 2
    assert "b.safetensors: is a link" in capsys.readouterr().err


def test_a_subfolder_does_not_lead_out(model: Path) -> None:
    (model / "inside").symlink_to(model.parent)
    with pytest.raises(RefgemmaError, match="inside: is a link to a place outside"):
        refgemma.Tokenizer.from_pretrained(model, subfolder="inside")


def test_a_folder_that_cannot_be_listed_is_one_line(model: Path, monkeypatch: Any) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RefgemmaError, match="model: cannot be read: Permission denied"):
        refuse_links(model)
