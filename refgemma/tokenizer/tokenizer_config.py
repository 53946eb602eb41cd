"""Read a tokenizer's settings from the files of its folder. Checked against files that transformers 5.23 writes and
reads."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refgemma.files import quote, read_file, read_object
from refgemma.hub import TEMPLATE_FOLDER
from refgemma.tokenizer.added_tokens import AddedToken, read_added_token
from refgemma.tokenizer.sentencepiece_model import TokenizerError

MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_LIMIT = 1_000_000
TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
RELEASED = ("<bos>", "<eos>", "<unk>", "<pad>")  # the names in Gemma's files
# transformers' generic tokenizer, which uses a tokenizer.json unchanged; Gemma's classes have their own settings.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
GEMMA_CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast")
# The parameters of `Tokenizer` that a tokenizer_config.json may give.
SETTINGS = (
    *TOKEN_ROLES, "mask_token", "extra_special_tokens", "model_input_names", "add_bos_token", "add_eos_token",
    "padding_side", "truncation_side", "model_max_length", "split_special_tokens", "chat_template",
)  # fmt: skip
# Arguments of transformers' `from_pretrained` that change no result here.
WITHOUT_EFFECT = (
    "use_fast", "trust_remote_code", "token", "use_auth_token", "force_download", "resume_download", "proxies",
    "local_files_only", "code_revision", "config", "device_map", "dtype", "torch_dtype", "tokenizer_type", "from_slow",
    "clean_up_tokenization_spaces", "spaces_between_special_tokens", "sp_model_kwargs", "use_default_system_prompt",
    "verbose", "max_length",
)  # fmt: skip


def _unwrap(token: Any) -> Any:
    """Return the text of a token that is given as an object with properties; return any other value unchanged."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path, TokenizerError) if path.exists() else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the parameters of `Tokenizer` from ``tokenizer_config.json`` and the chat template files, if present."""
    config = _read_if_there(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in config:
        config |= _read_if_there(folder / "special_tokens_map.json")
    settings = {name: _unwrap(config[name]) for name in SETTINGS if config.get(name) is not None}
    listed = [config.get(name) for name in ("extra_special_tokens", "additional_special_tokens")]
    extra: Any = next((found for found in listed if found not in (None, [], {})), [])
    if isinstance(extra, dict):
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise TokenizerError(f"{folder / CONFIG_FILE}: the special tokens are {quote(extra)}; they must be a list")
    named = [value for name, value in config.items() if name.endswith("_token") and name not in SETTINGS]
    extra = [_unwrap(token) for token in [*(value for value in named if isinstance(_unwrap(value), str)), *extra]]
    settings["extra_special_tokens"] = extra
    settings |= _read_added_tokens(folder, config)
    if (name := config.get("tokenizer_class")) not in (None, *PLAIN_CLASSES, *GEMMA_CLASSES):
        warnings.warn(
            f"{folder / CONFIG_FILE}: tokenizer_class is {quote(name)}; refgemma treats it as Gemma's tokenizer, but "
            "transformers may not; set it to GemmaTokenizer",
            stacklevel=4,
        )
    settings["is_plain"] = name in PLAIN_CLASSES
    if (templates := _read_templates(folder, settings.get("chat_template"))) is not None:
        settings["chat_template"] = templates
    return settings


def _read_added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[int, AddedToken]]:
    """Return the added tokens by id: those that the configuration declares or, without any, those in
    added_tokens.json."""
    where, kind = f"{folder / CONFIG_FILE}: its added tokens", "added_tokens"
    found = config.get("added_tokens_decoder")
    if found is None:
        where, kind = f"{folder / ADDED_FILE}: its added tokens", "listed_tokens"
        special = {str(_unwrap(value)) for name, value in config.items() if name.endswith("_token")}
        extra = config.get("extra_special_tokens") or []
        special |= {str(_unwrap(token)) for token in (extra.values() if isinstance(extra, dict) else extra)}
        listed = _read_if_there(folder / ADDED_FILE)
        found = {str(token): {"content": name, "special": name in special} for name, token in listed.items()}
    if not isinstance(found, dict):
        raise TokenizerError(f"{where} are {quote(found)}; they must be an object from ids to tokens")
    try:
        return {kind: {int(token): read_added_token(value) for token, value in found.items()}}
    except (ValueError, TypeError) as error:
        reason = str(error) if isinstance(error, TokenizerError) else "an id is not a whole number"
        raise TokenizerError(f"{where}: {reason}") from None


def _read_templates(folder: Path, configured: Any) -> Any:
    """Return the chat template, or several by name; a separate file has priority over the configuration."""
    named = {}
    if isinstance(configured, list):
        try:
            configured = {entry["name"]: entry["template"] for entry in configured}
        except (KeyError, TypeError):
            raise TokenizerError(
                f"{folder / CONFIG_FILE}: chat_template is {quote(configured)}; each entry needs a name and a template"
            ) from None
    files = [folder / TEMPLATE_FILE, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    for path in files:
        if path.exists():
            named["default" if path.name == TEMPLATE_FILE else path.stem] = _read_text(path)
    if not named:
        return configured
    return named["default"] if list(named) == ["default"] else named


def _read_text(path: Path) -> str:
    try:
        return read_file(path, TEMPLATE_LIMIT).decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: is not UTF-8 text: {error}") from None
