"""The turns of a chat as Gemma 2's template writes them. Checked against a template of the same effect under Jinja."""

from collections.abc import Mapping, Sequence
from typing import Any

from refgemma.tokenizer.vocabulary import TokenizerError

START, END = "<start_of_turn>", "<end_of_turn>"

# The role of a message -> the name that the model was trained to see.
ROLES = {"user": "user", "assistant": "model", "model": "model"}

# The text in the released folders, for other programs: `render_chat` does what it says.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Templates of the same effect are written in many ways: these phrases identify them.
TEMPLATE_SIGNS = (START, END, "System role not supported", "Conversation roles must alternate")


def is_gemma_template(chat_template: object) -> bool:
    """Tell whether a folder's `chat_template` is, by all signs, Gemma 2's.

    Examples
    --------
    >>> is_gemma_template(CHAT_TEMPLATE)
    True
    >>> is_gemma_template("{% for message in messages %}[INST]{{ message['content'] }}{% endfor %}")
    False
    """
    return isinstance(chat_template, str) and all(sign in chat_template for sign in TEMPLATE_SIGNS)


def render_chat(messages: Any, bos_token: str, add_generation_prompt: bool) -> list[str]:
    r"""Check `messages` and write the chat: markers, and between them role, newline and trimmed content of each turn.

    Raises
    ------
    TokenizerError
        If there is no message, one lacks a string, or the roles do not alternate, beginning with the user's.

    Examples
    --------
    >>> render_chat([{"role": "user", "content": "Hi "}], "<bos>", add_generation_prompt=True)
    ['<bos>', '<start_of_turn>', 'user\nHi', '<end_of_turn>', '\n', '<start_of_turn>', 'model\n']
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TokenizerError(f"messages is a {type(messages).__name__}, not a list of messages")
    if not messages:
        raise TokenizerError("messages is empty: a chat begins with a user's turn")
    pieces = [bos_token]
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TokenizerError(f"messages[{n}] is a {type(message).__name__}, not a dict with 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"is {message[key]!r}, not a string" if key in message else "is missing"
                raise TokenizerError(f"messages[{n}]: {key!r} {problem}")
        role, content = message["role"], message["content"]
        if role == "system":
            raise TokenizerError(f"messages[{n}]: System role not supported; put it into the first user's content")
        if role not in ROLES:
            raise TokenizerError(f"messages[{n}]: unknown role {role!r}; there are {', '.join(ROLES)}")
        if ROLES[role] != ("model" if n % 2 else "user"):
            raise TokenizerError(
                f"messages[{n}]: Conversation roles must alternate user/assistant/user/assistant/... but this is {role}"
            )
        pieces += [START, f"{ROLES[role]}\n{content.strip()}", END, "\n"]
    return [*pieces, START, "model\n"] if add_generation_prompt else pieces
