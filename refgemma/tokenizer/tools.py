"""Make JSON schemas from Python functions, for chats with tools. Checked against transformers' `get_json_schema`."""

import inspect
import json
import re
from collections.abc import Callable
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from refgemma.tokenizer.sentencepiece_model import TokenizerError

SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
TYPES = SCALARS | {list: "array", tuple: "array", dict: "object"}
# Patterns for the parts of a docstring in Google's style.
DESCRIPTION = re.compile(r"^(.*?)[\n\s]*(Args:|Returns:|Raises:|\Z)", re.DOTALL)
ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)[\n\s]*(Returns:|Raises:|\Z)", re.DOTALL)
ARGUMENT = re.compile(r"(?:^|\n)([ \t]*)(\w+):\s*(.*?)\s*(?=\n(?!\1[ \t])[ \t]*\w+:|\Z)", re.DOTALL)
RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)[\n\s]*(Raises:|\Z)", re.DOTALL)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def make_json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a function, from its annotations and its Google-style docstring.

    Raises
    ------
    TokenizerError
        If an argument lacks a description or an annotation, or JSON has no type for its annotation.

    Examples
    --------
    >>> def double(x: int):
    ...     '''Double a number.
    ...
    ...     Args:
    ...         x: The number.
    ...     '''
    >>> make_json_schema(double)["function"]["parameters"]["properties"]
    {'x': {'type': 'integer', 'description': 'The number.'}}
    """
    name = getattr(function, "__name__", "operation")
    text = (inspect.getdoc(function) or "").strip()
    try:
        if not text:
            raise TokenizerError("has no docstring")
        parameters, result = _describe_parameters(function)
        descriptions = _read_arguments(text)
        for argument, schema in parameters["properties"].items():
            if argument not in descriptions:
                raise TokenizerError(f"has no description of {argument} in its docstring")
            description = descriptions[argument]
            if choices := CHOICES.search(description):
                schema["enum"] = [c.strip() if isinstance(c, str) else c for c in json.loads(choices[1])]
                description = description[: choices.start()].strip()
            schema["description"] = description
    except (TokenizerError, NameError, TypeError, ValueError) as error:
        raise TokenizerError(f"tools: the function {name} {error}; add it, or give the JSON schema as a dict") from None
    found = DESCRIPTION.search(text)
    schema = {"name": name, "description": found and found[1].strip(), "parameters": parameters}
    if result is not None:
        schema["return"] = result | (
            {"description": described[1].strip()} if (described := RETURNS.search(text)) else {}
        )
    return {"type": "function", "function": schema}


def _read_arguments(text: str) -> dict[str, str]:
    if (block := ARGUMENTS.search(text)) is None:
        return {}
    lines = "\n".join(line for line in block[1].split("\n") if line.strip())
    return {name: re.sub(r"\s*\n+\s*", " ", about.strip()) for _, name, about in ARGUMENT.findall(lines)}


def _describe_parameters(function: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the schema of the parameters, and the schema of the result or None if JSON has no type for it."""
    given, hints = inspect.signature(function).parameters, get_type_hints(function)
    names = list(given)
    if names and names[0] in ("self", "cls") and names[0] not in hints:
        del names[0]
    if bare := [name for name in names if name not in hints]:
        raise TokenizerError(f"has no type annotation for {bare[0]}")
    schema: dict[str, Any] = {"type": "object", "properties": {name: _describe_type(hints[name]) for name in names}}
    if required := [name for name in names if given[name].default is inspect.Parameter.empty]:
        schema["required"] = required
    try:
        return schema, _describe_type(hints["return"]) if "return" in hints else None
    except TokenizerError:
        return schema, None


def _describe_type(hint: Any) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, Enum) and len(hint):
        return _describe_values([member.value for member in hint])
    if hint in TYPES:
        return {"type": TYPES[hint]}
    if origin is Literal:
        return _describe_values(list(inner))
    if origin is list:
        return {"type": "array", "items": _describe_type(inner[0])}
    if origin is tuple and len(inner) > 1:
        return {"type": "array", "prefixItems": [_describe_type(one) for one in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _describe_type(inner[1])}
    if origin in (Union, UnionType):
        return _describe_union(inner)
    raise TokenizerError(f"has the type annotation {hint!r}, which has no JSON type")


def _describe_union(inner: tuple[Any, ...]) -> dict[str, Any]:
    kinds = [_describe_type(one) for one in inner if one is not type(None)]
    if len(kinds) == 1:
        schema = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": kinds}
    return schema | ({"nullable": True} if type(None) in inner else {})


def _describe_values(values: list[Any]) -> dict[str, Any]:
    if unknown := [value for value in values if type(value) not in SCALARS]:
        raise TokenizerError(f"allows the value {unknown[0]!r}, which JSON cannot represent")
    names = list(dict.fromkeys(SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
