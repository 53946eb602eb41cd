"""Test names of models: their meaning, no download without request, and errors that say what to do."""

import os
import re
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from refgemma.hub import ModelNameError, cache_folder, download_model, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VARIABLES = (
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a Hugging Face cache with huggingface_hub's layout: blobs, and links to them in snapshots."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--small"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "aa").write_text("{}")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(Path("../../blobs/aa"))
    (repository / "refs" / "pr").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "pr" / "1").write_text(f"{COMMIT}\n")
    return tmp_path


def test_names_of_this_package() -> None:
    assert (find_model("tiny") / "tokenizer.model").is_file()
    assert find_model("conformance").parent == find_model("tiny").parent


@pytest.mark.parametrize("revision", ["main", "pr/1", COMMIT])
def test_a_snapshot_in_the_cache_is_found(cache: Path, revision: str) -> None:
    assert find_model("org/small", revision) == cache / "models--org--small" / "snapshots" / COMMIT


def test_a_folder_goes_before_a_hub_id(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/small") == Path("org/small")


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HOME": "~/h"}, "~/h/hub"),
        ({"HF_HOME": "$XDG_CACHE_HOME/h", "XDG_CACHE_HOME": "/x"}, "/x/h/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HUB_CACHE": "", "HF_HOME": "", "XDG_CACHE_HOME": ""}, "~/.cache/huggingface/hub"),
    ],
)
def test_the_environment_says_where_the_cache_is(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder).expanduser()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "'': no such folder"),
        ("nowhere", r"nowhere: no such folder; a model is 'tiny', 'conformance', a folder"),
        ("/nowhere/at-all", "no such folder"),
        ("./org/small", "no such folder"),
        ("org/small/extra", "no such folder"),
        ("../small", "no such folder"),
        ("org/..", "no such folder"),
        ("org/a--b", "no such folder"),
        (Path("org/small"), "no such folder"),
        (
            "org/other",
            r"org/other: there is no such folder, and .* has no snapshot .*'main'; download it with",
        ),
    ],
)
def test_what_is_no_model(cache: Path, name: str | Path, reason: str) -> None:
    with pytest.raises(ModelNameError, match=reason):
        find_model(name)


@pytest.mark.parametrize("revision", ["../../..", "", "/etc", "a/../b"])
def test_a_revision_stays_in_the_cache(cache: Path, revision: str) -> None:
    with pytest.raises(ModelNameError, match=re.escape(f"{revision!r} is not a revision")):
        find_model("org/small", revision)


def test_a_reference_that_leads_out_of_the_cache_is_not_followed(cache: Path) -> None:
    (cache / "models--org--small" / "refs" / "main").write_text("../../..")
    with pytest.raises(ModelNameError, match="has no snapshot"):
        find_model("org/small")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelNameError, match=r"is a file, but not a \.gguf file; give the folder"):
        find_model(tmp_path / "model.safetensors")


def test_a_download_cut_short_is_named(cache: Path) -> None:
    snapshot = cache / "models--org--small" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").symlink_to("../../blobs/missing")
    with pytest.raises(ModelNameError, match=r"lacks model\.safetensors: the download is incomplete"):
        find_model("org/small")
    with pytest.raises(ModelNameError, match=r"lacks model\.safetensors, tokenizer\.model"):
        find_model("org/small", needed=["tokenizer.model"])


class Hub(types.ModuleType):
    """Stands in for huggingface_hub, which is not installed with the tests."""

    def __init__(self, answer: Path | Exception) -> None:
        super().__init__("huggingface_hub")
        self.asked: list[tuple[str, str, list[str]]] = []
        self.answer = answer
        self.errors = types.SimpleNamespace(
            GatedRepoError=type("GatedRepoError", (Exception,), {}),
            RevisionNotFoundError=type("RevisionNotFoundError", (Exception,), {}),
            RepositoryNotFoundError=type("RepositoryNotFoundError", (Exception,), {}),
            HfHubHTTPError=type("HfHubHTTPError", (Exception,), {}),
            LocalEntryNotFoundError=type("LocalEntryNotFoundError", (Exception,), {}),
        )
        self.utils = types.ModuleType("huggingface_hub.utils")
        self.bars_disabled = 0
        self.utils.disable_progress_bars = self.disable  # type: ignore[attr-defined]

    def disable(self) -> None:
        self.bars_disabled += 1

    def snapshot_download(self, hub_id: str, revision: str, cache_dir: Path, allow_patterns: list[str]) -> str:
        self.asked.append((hub_id, revision, allow_patterns))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Hub":
        monkeypatch.setitem(sys.modules, "huggingface_hub", self)
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", self.utils)
        return self


def test_a_download_happens_only_if_asked_for(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path).install(monkeypatch)
    find_model("org/small", download=True)  # is there already
    with pytest.raises(ModelNameError):
        find_model("org/other")
    assert hub.asked == []
    assert find_model("org/other", "v1", download=True) == tmp_path
    assert hub.asked == [("org/other", "v1", ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"])]
    assert hub.bars_disabled == (0 if sys.stderr.isatty() else 1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("GatedRepoError", r"accept the model's licence first.*hf auth login"),
        ("RepositoryNotFoundError", "the hub has no such model"),
        ("RevisionNotFoundError", "the hub has no revision 'main'"),
        ("HfHubHTTPError", "could not be downloaded: it broke; run the command again to continue"),
        ("LocalEntryNotFoundError", "could not be downloaded: it broke"),
    ],
)
def test_what_the_hub_refuses(error: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(Path()).install(monkeypatch)
    hub.answer = getattr(hub.errors, error)("it\nbroke")
    with pytest.raises(ModelNameError, match=f"org/other: .*{reason}"):
        download_model("org/other")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(OSError(28, "No space left on device")).install(monkeypatch)
    with pytest.raises(ModelNameError, match="No space left on device"):
        download_model("org/other")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNameError, match=r'pip install "refgemma\[hub\]"'):
        download_model("org/other")


def test_offline_means_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(tmp_path).install(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNameError, match="HF_HUB_OFFLINE forbids"):
        download_model("org/other")
    assert hub.asked == []
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_user_without_a_home_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens in a container that runs with an unknown user id."""

    def unknown(*_: Any) -> None:
        raise KeyError

    for name in ("HOME", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert cache_folder() == Path("~/.cache/huggingface/hub")
    with pytest.raises(ModelNameError, match="download it with"):
        find_model("google/gemma-2-9b")
