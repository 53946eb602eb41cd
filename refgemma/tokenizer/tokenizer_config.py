"""What the files beside a tokenizer's model say about it. Checked against those that transformers 5.23 writes."""

from pathlib import Path
from typing import Any

from refgemma.files import read_object
from refgemma.tokenizer.chat import END, START
from refgemma.tokenizer.vocabulary import TokenizerError

MODEL_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"
TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Special where a file has them, whatever has the four roles; as the released configurations and transformers say.
ALWAYS_SPECIAL = ("<bos>", "<eos>", "<unk>", "<pad>", "<mask>", START, END)
# The parameters of `Tokenizer` that a tokenizer_config.json may give.
SETTINGS = (
    *TOKEN_ROLES, "extra_special_tokens", "add_bos_token", "add_eos_token", "padding_side", "truncation_side",
    "model_max_length", "split_special_tokens", "chat_template",
)  # fmt: skip


def _unwrap(token: Any) -> Any:
    """Return the piece itself, where a configuration writes it with its properties."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings that ``tokenizer_config.json`` and ``chat_template.jinja``, if there, give."""
    config = read_object(folder / CONFIG_FILE, TokenizerError) if (folder / CONFIG_FILE).exists() else {}
    settings = {name: _unwrap(config[name]) for name in SETTINGS if config.get(name) is not None}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(extra, list) or not isinstance(added, dict):
        raise TokenizerError(f"{folder / CONFIG_FILE}: its special tokens are no lists: {extra!r} and {added!r}")
    extra = [_unwrap(token) for token in extra]
    extra += [_unwrap(token) for token in added.values() if isinstance(token, dict) and token.get("special")]
    # Saving a tokenizer made of the bare file, transformers lists the pieces of white space among them: taken at its
    # word, decoding without special tokens would drop the spaces and lines of the text.
    settings["extra_special_tokens"] = [t for t in extra if not (isinstance(t, str) and not t.strip(" \t\n\u2581"))]
    if (folder / TEMPLATE_FILE).exists():
        settings["chat_template"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return settings
