"""Write the turns of a chat as Gemma 2's template does. Checked against an equivalent template rendered by Jinja."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from refgemma.files import quote
from refgemma.tokenizer.sentencepiece_model import TokenizerError
from refgemma.tokenizer.templates import as_plain, inspect_template, render_template

START, END = "<start_of_turn>", "<end_of_turn>"

# Role of a message -> role name in the model's training data.
ROLES = {"user": "user", "assistant": "model", "model": "model"}

# The template of the released folders, written for other programs; `render_chat` gives the same text.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# These two characters enclose special tokens in messages while a chat is rendered, as in transformers.
MARK, UNMARK = "\U000f0000", "\U000f0001"
CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers; the text after this tag is cut off
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # keys of a message's reasoning; templates read the first key


def _normalize(template: str) -> list[str] | None:
    """Return the tags of a template without spaces, or ``None`` if there is text between the tags."""
    tags = re.findall(r"\{[{%].*?[%}]\}", template, flags=re.DOTALL)
    if "".join(tags) != template:
        return None
    parts = [re.split(r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", tag, flags=re.DOTALL) for tag in tags]
    return [
        "".join(part.replace("\\n", "\n") if n % 2 else re.sub(r"\s", "", part) for n, part in enumerate(tag))
        for tag in parts
    ]


def is_gemma_template(chat_template: object) -> bool:
    """Return True if a `chat_template` equals Gemma 2's, ignoring spaces inside tags.

    Examples
    --------
    >>> is_gemma_template(CHAT_TEMPLATE)
    True
    >>> is_gemma_template(CHAT_TEMPLATE.replace("| trim", ""))
    False
    """
    return isinstance(chat_template, str) and _normalize(chat_template) == _normalize(CHAT_TEMPLATE)


def choose_template(templates: Any, asked: str | None, tools: object) -> str:
    """Return the template with the name `asked`, or `asked` itself if it is a template, or the default.

    Raises
    ------
    TokenizerError
        If there is no template, or several without a default.

    Examples
    --------
    >>> choose_template({"default": "a", "tool_use": "b"}, None, tools=[{}])
    'b'
    """
    if isinstance(templates, Mapping):
        named: Mapping[str, str] = templates
        name = asked or ("tool_use" if tools is not None and "tool_use" in named else "default")
        if asked is None and name not in named:
            raise TokenizerError(
                "there are several chat templates and no default; set chat_template to one of "
                f"{', '.join(sorted(named))}"
            )
        chosen: Any = named.get(name, asked)
    else:
        chosen = templates if asked is None else asked
    if not isinstance(chosen, str):
        raise TokenizerError(f"chat_template is {quote(chosen)}; it must be a Jinja template")
    return chosen


def check_variables(template: str, given: Mapping[str, Any]) -> None:
    """Raise an error if the template does not use one of the `given` variables.

    Raises
    ------
    TokenizerError
        If a variable is unknown; the message names the variable.
    """
    known = {"messages", "bos_token"} if is_gemma_template(template) else inspect_template(template)[0]
    if unknown := [name for name in given if name not in known]:
        raise TokenizerError(
            f"unexpected argument {unknown[0]}={quote(given[unknown[0]])}: the chat template has no such variable"
        )


def mark(value: Any, pattern: "re.Pattern[str]") -> Any:
    """Return `value` with marks around each match of the pattern in any string inside."""
    if isinstance(value, str):
        return pattern.sub(f"{MARK}\\g<0>{UNMARK}", value.replace(MARK, "").replace(UNMARK, ""))
    if isinstance(value, Mapping):
        return {key: mark(entry, pattern) for key, entry in value.items()}
    return [mark(entry, pattern) for entry in value] if isinstance(value, list | tuple) else value


def check_chat(messages: Any) -> None:
    """Raise an error unless `messages` is a list of messages.

    Raises
    ------
    TokenizerError
        If `messages` is anything else; the message describes it.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TokenizerError(f"messages is a {type(messages).__name__}; it must be a list of messages")
    if not messages:
        raise TokenizerError("messages is empty; a chat begins with a user's turn")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TokenizerError(
                f"messages[{n}] is a {type(message).__name__}; it must be a dict with 'role' and 'content'"
            )


def render(
    template: str, messages: Any, values: Mapping[str, Any], continue_final_message: bool | str = False
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and the spans of text that the template marks as the model's.

    Parameters
    ----------
    template : str
        A Jinja template.
    messages : sequence of mapping
        The chat.
    values : mapping
        The other variables of the template.
    continue_final_message : bool or str
        If true, the text ends within the last message; a string names the entry of that message to continue.

    Raises
    ------
    TokenizerError
        If the template cannot be rendered, or leaves out the message to continue.
    """
    check_chat(messages)
    chat = [{key: value for key, value in as_plain(message).items() if value is not None} for message in messages]
    for n, message in enumerate(chat):
        if reasoning := next((message[key] for key in REASONING if key in message), None):
            chat[n] = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
    if continue_final_message:
        name = continue_final_message if isinstance(continue_final_message, str) else "content"
        last: Any = chat[-1].get(name)
        blocks = (
            [block for block in last if isinstance(block, dict) and "text" in block] if isinstance(last, list) else []
        )
        if not (isinstance(last, str) or blocks):
            raise TokenizerError(f"messages[{len(chat) - 1}] has no {name!r} to continue")
        if blocks:
            blocks[-1]["text"] += CONTINUE
        else:
            chat[-1] |= {key: last + CONTINUE for key in {name, *REASONING} if chat[-1].get(key) == last}
    text, spans = render_template(template, {"tools": None, "documents": None} | dict(values) | {"messages": chat})
    if not continue_final_message:
        return text, spans
    place = text.rfind(CONTINUE.strip())
    final = blocks[-1]["text"] if blocks else last
    if place < 0 or final.removesuffix(CONTINUE).strip() not in text:
        raise TokenizerError(
            "the chat template leaves out the final message; continue_final_message needs a template that writes it"
        )
    whole = text[place:].startswith(CONTINUE)
    return text[:place] if whole else text[:place].rstrip(), spans


def render_chat(
    messages: Any, bos_token: str, add_generation_prompt: bool, continue_final_message: bool | str = False
) -> list[str]:
    r"""Check `messages` and write the chat: between markers, each turn has its role, a newline and the trimmed content.

    The result, a list of pieces of text, equals that of Gemma 2's template without using Jinja.

    Raises
    ------
    TokenizerError
        If there is no message, a role or content is not a string, or the roles do not alternate from ``user``.

    Examples
    --------
    >>> render_chat([{"role": "user", "content": "Hi "}], "<bos>", add_generation_prompt=True)
    ['<bos>', '<start_of_turn>', 'user\nHi', '<end_of_turn>', '\n', '<start_of_turn>', 'model\n']
    """
    check_chat(messages)
    pieces = [bos_token]
    for n, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"is {message[key]!r}; it must be a string" if key in message else "is missing"
                raise TokenizerError(f"messages[{n}]: {key!r} {problem}")
        role, content = message["role"], message["content"]
        if role == "system":
            raise TokenizerError(f"messages[{n}]: System role not supported; put the text into a user message")
        if role not in ROLES:
            raise TokenizerError(f"messages[{n}]: unknown role {role!r}; it must be one of {', '.join(ROLES)}")
        if ROLES[role] != ("model" if n % 2 else "user"):
            raise TokenizerError(
                f"messages[{n}]: Conversation roles must alternate user/assistant/user/assistant/... but this is {role}"
            )
        pieces += [START, f"{ROLES[role]}\n{content.strip()}", END, "\n"]
    if continue_final_message:
        if isinstance(continue_final_message, str) and continue_final_message != "content":
            raise TokenizerError(
                f"continue_final_message is {continue_final_message!r}; this template can continue only 'content'"
            )
        return [*pieces[:-3], pieces[-3].rstrip()]
    return [*pieces, START, "model\n"] if add_generation_prompt else pieces
