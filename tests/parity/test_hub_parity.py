"""Compare with huggingface_hub: find the same snapshot in its cache, and download a model from a local test hub."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from refgemma.hub import WANTED, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in find_model("conformance").iterdir()}
GATED = "org/gated"


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of a hub that a download needs: the list of files of a revision, and the files."""

    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{GATED}"):
            self.answer(b"{}", {"X-Error-Code": "GatedRepo"}, 403)
        elif self.path.startswith("/api/models/org/small/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()]
            tree += [{"type": "file", "path": "pytorch_model.bin", "size": 1, "oid": "b"}]
            self.answer(json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/api/models/org/small/"):
            siblings = [{"rfilename": name} for name in [*FILES, "pytorch_model.bin"]]
            about = {"id": "org/small", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif (name := self.path.rsplit("/", 1)[-1]) in FILES:
            self.answer(FILES[name], {"ETag": f'"{name}-1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        else:
            self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Yield environment variables for the hub above and an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in unset and "proxy" not in name.lower()}
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()


def info(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refgemma", "info", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_a_model_is_downloaded_when_asked_for_and_found_from_then_on(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unasked = info(environment, "org/small")
    assert unasked.returncode == 2
    assert "refgemma info org/small --download" in unasked.stderr
    asked = info(environment, "org/small", "--download", "--json")
    assert (asked.returncode, asked.stderr) == (0, ""), asked.stderr
    folder = Path(json.loads(asked.stdout)["folder"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES  # and no pytorch_model.bin
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in ("main", COMMIT):
        theirs = snapshot_download(
            "org/small", revision=revision, cache_dir=tmp_path / "hub", local_files_only=True, allow_patterns=WANTED
        )
        assert find_model("org/small", revision) == folder == Path(theirs)


@pytest.mark.parametrize(("name", "reason"), [(GATED, "accept the model's licence"), ("org/none", "no such model")])
def test_what_the_hub_refuses(environment: dict[str, str], name: str, reason: str) -> None:
    run = info(environment, name, "--download")
    assert run.returncode == 2
    assert reason in run.stderr
    assert run.stderr.count("\n") == 1
