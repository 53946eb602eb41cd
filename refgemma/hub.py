"""Find the folder of a model by its name: in this package, at a path, or in the Hugging Face cache. Checked against the
layout that huggingface_hub 1.x writes and the variables it reads.

Nothing here opens a connection unless the caller requests a download.
"""

import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from refgemma.errors import RefgemmaError

PACKAGE = Path(__file__).parent
CONFIG_JSON = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # the file that shows a folder is an adapter
GGUF = ".gguf"

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# Patterns of files to download; they leave out copies of the weights in other formats.
WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
# Endings of the files that refgemma reads in a model's folder; it reads all files of the subfolder.
READ = (".json", ".safetensors", ".model", ".jinja", GGUF, ".bin", ".pth", ".pt", ".ckpt", ".npz", ".msgpack")
TEMPLATE_FOLDER = "additional_chat_templates"
FOLLOW_LINKS = "REFGEMMA_FOLLOW_LINKS"


class ModelNameError(RefgemmaError):
    """Raised if no model of a given name is found; the message says where refgemma searched and what to do."""


def golden_folder() -> Path:
    """Return the folder of PyTorch's recordings: inside the installed package, or beside it in a checkout."""
    packaged = PACKAGE / "golden"
    return packaged if packaged.is_dir() else PACKAGE.parent / "golden"


def cache_folder() -> Path:
    """Return huggingface_hub's folder of downloads: from the environment, or ``~/.cache/huggingface/hub``.

    ``HF_HUB_CACHE``, the older ``HUGGINGFACE_HUB_CACHE``, ``HF_HOME`` and ``XDG_CACHE_HOME`` are read in this order; an
    empty variable counts as not set.
    """
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(variable):
            return _expand(folder)
    if home := os.environ.get("HF_HOME"):
        return _expand(home) / "hub"
    return _expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expand(folder: str) -> Path:
    """Replace ``~`` in a path by the home folder; keep it if the user has no home folder, as in a container."""
    return Path(os.path.expanduser(os.path.expandvars(folder)))  # Path.expanduser would raise an error


def _find_snapshot(hub_id: str, revision: str, cache: Path) -> Path | None:
    """Return the folder of a snapshot in the cache, or None; `revision` is a branch, a tag or a full commit hash."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if re.fullmatch(r"[0-9a-zA-Z]+", commit) and snapshot.is_dir() else None


def _list_missing(folder: Path, needed: Collection[str]) -> list[str]:
    """List the `needed` files that are missing, and the links whose target is missing."""
    needed = set(needed) - ({CONFIG_JSON} if (folder / ADAPTER_CONFIG).exists() else set())
    cut_short = [path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    return sorted({*cut_short, *(name for name in needed if not (folder / name).exists())})


def refuse_link(path: Path, folder: Path) -> None:
    """Raise `ModelNameError` if `path` is a link to a place outside `folder`.

    Otherwise an untrusted folder could make refgemma read any file of this machine. Links to blobs of the same
    repository, as in the Hugging Face cache, are allowed. The folder itself may be a link. Setting an environment
    variable allows all links.
    """
    home, place = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home  # not a link itself
    if path.is_symlink() and not any(map(place.is_relative_to, (home, blobs))) and os.environ.get(FOLLOW_LINKS) != "1":
        raise ModelNameError(
            f"{path}: is a link to a place outside its folder; replace it by the file itself or a hard link, or set "
            f"{FOLLOW_LINKS}=1 if you trust the author of the folder"
        )


def refuse_links(folder: Path, every: bool = False) -> None:
    """Call `refuse_link` for each file that refgemma reads in `folder`; if `every`, for each file at any depth."""
    try:
        found = [*folder.rglob("*")] if every else [*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*")]
    except OSError as error:
        raise ModelNameError(f"{folder}: cannot be read: {error.strerror}") from None
    for path in found:
        if every or path.name.endswith((*READ, TEMPLATE_FOLDER)):
            refuse_link(path, folder)


def find_model(
    name: str | Path, revision: str = "main", download: bool = False, needed: Collection[str] = (CONFIG_JSON,),
    cache_dir: str | Path | None = None, gguf_file: str | None = None,
) -> Path:  # fmt: skip
    """Return the folder of a model, or its GGUF file.

    Parameters
    ----------
    name : str or path
        One of: ``"tiny"``, the trained model in this package; ``"conformance"``, the small random model in this package
        that exposes known bugs; a folder; a ``.gguf`` file; a hub id such as ``"google/gemma-2-9b"``. A folder takes
        precedence over a hub id of the same name.
    revision : str
        For a hub id: a branch, a tag or a full commit hash.
    download : bool
        If true, a hub id that is not in the cache is downloaded with huggingface_hub (the extra ``hub``). If false,
        nothing here uses the network.
    needed : collection of str
        Files that the folder must contain.
    cache_dir : str or path, optional
        The download folder; by default `cache_folder`.
    gguf_file : str, optional
        A GGUF file in the folder, to be read in place of the folder's other files, as in transformers.

    Raises
    ------
    ModelNameError
        If the model is not found, lacks a file, or has a file that links to a place outside the folder.

    Notes
    -----
    Links are followed only within the folder and, in the Hugging Face cache, to blobs of the same repository.
    ``REFGEMMA_FOLLOW_LINKS=1`` allows all links. The named folder may be a link.

    Examples
    --------
    >>> find_model("tiny").name
    'tiny'
    """
    text = str(name)
    if gguf_file is not None:
        place = find_model(name, revision, download, (gguf_file,), cache_dir) / gguf_file
        if not place.is_file():
            raise ModelNameError(f"{place.parent}: the file {place.name} is missing")
        return place
    if text in ("tiny", "conformance"):
        return PACKAGE / "checkpoints" / text
    if text and Path(name).is_dir():
        refuse_links(Path(name))
        return Path(name)
    if text and Path(name).is_file() and Path(name).suffix == GGUF:
        return Path(name)
    if text and Path(name).exists():
        raise ModelNameError(
            f"{name}: is a file, but not a {GGUF} file; give the folder with {CONFIG_JSON} and the weights"
        )
    if isinstance(name, Path) or not HUB_ID.fullmatch(text) or ".." in text or "--" in text:
        raise ModelNameError(
            f"{text or repr('')}: no such folder; a model is 'tiny', 'conformance', a folder with {CONFIG_JSON} and "
            f"weights, a {GGUF} file, or a hub id like google/gemma-2-9b"
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", revision) or ".." in revision:
        raise ModelNameError(f"{text}: {revision!r} is not a revision; give a branch, a tag or a full commit hash")
    return _find_in_cache(text, revision, download, needed, Path(cache_dir) if cache_dir else cache_folder())


def _find_in_cache(hub_id: str, revision: str, download: bool, needed: Collection[str], cache: Path) -> Path:
    snapshot = _find_snapshot(hub_id, revision, cache)
    lacking = _list_missing(snapshot, needed) if snapshot else []
    if snapshot and not lacking:
        refuse_links(snapshot)
        return snapshot
    if download:
        wanted = [name for name in needed if name.endswith(GGUF)] or WANTED
        return download_model(hub_id, revision, cache, wanted)
    if snapshot:
        raise ModelNameError(
            f"{hub_id}: the snapshot {snapshot} lacks {', '.join(lacking)}: the download is incomplete; "
            f"{_explain_download(hub_id)}"
        )
    raise ModelNameError(
        f"{hub_id}: there is no such folder, and {cache} has no snapshot of its revision "
        f"{revision!r}; {_explain_download(hub_id)}"
    )


def _explain_download(hub_id: str) -> str:
    return f"download it with: refgemma info {hub_id} --download (refgemma downloads nothing without this option)"


def download_model(
    hub_id: str, revision: str = "main", cache: Path | None = None, wanted: Sequence[str] = WANTED
) -> Path:
    """Download the `wanted` files of a snapshot into the Hugging Face cache, with a progress bar on a terminal.

    Raises
    ------
    ModelNameError
        If the download fails: huggingface_hub is not installed, the model's licence has not been accepted, the model
        does not exist, or there is no connection.
    """
    if any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        raise ModelNameError(f"{hub_id}: HF_HUB_OFFLINE forbids the download; unset the variable to allow it")
    try:
        from huggingface_hub import errors, snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise ModelNameError(
            f'{hub_id}: the download needs huggingface_hub, which is not installed; pip install "refgemma[hub]"'
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        found = snapshot_download(hub_id, revision=revision, cache_dir=cache, allow_patterns=list(wanted))
        return Path(found)
    except errors.GatedRepoError:
        reason = (
            "accept the model's licence first: log in to the hub's website and accept it on the model's page; then "
            "log in here "
            "too, with hf auth login or the variable HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        reason = f"the hub has no revision {revision!r} of it"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such model, or shows it only after a login with: hf auth login"
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = f"could not be downloaded: {' '.join(str(error).split())[:300]}; run the command again to continue"
    raise ModelNameError(f"{hub_id}: {reason}")
