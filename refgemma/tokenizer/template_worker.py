"""Render chat templates in a separate process, which `refgemma.tokenizer.templates` starts. Checked against
`apply_chat_template` of transformers 5.23.

A template is an untrusted program. Jinja's sandbox allows only harmless operations, and this process limits memory and
time. The process imports nothing from refgemma, so that it starts fast.
"""

import json
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

MEMORY = 700_000_000  # bytes of address space; Python and Jinja alone take a tenth of this
TEXT = 10_000_000  # characters of a chat; forty times a model's maximum


def limit_memory() -> None:
    """Limit the memory of this process, if the system supports limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def make_environment() -> Any:
    """Return Jinja's sandbox, with the functions and tags that transformers adds."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The block ``{% generation %}``; records the position of its text."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's convention)

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            environment.extend(written=[], spans=[])

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            text = caller()
            kept: Any = self.environment
            start = sum(len(part) for part in kept.written)
            kept.spans.append((start, start + len(text)))
            return text

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class TemplateNamespace(Namespace):
        """A namespace that raises an error for a name with a leading underscore."""

        def __init__(*args: Any, **values: Any) -> None:
            for name in dict(*args[1:], **values):
                _check_name(name)
            Namespace.__init__(*args, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}; leave out the leading underscore")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "namespace": TemplateNamespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return environment


def answer(environment: Any, compile_template: Callable[[str], Any], request: dict[str, Any]) -> dict[str, Any]:
    """Handle one request: render a template, or list its variables and constant texts."""
    from jinja2 import meta, nodes

    template = request["template"]
    if "values" not in request:
        tree = environment.parse(template)
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return {"variables": sorted(meta.find_undeclared_variables(tree)), "literals": texts}
    environment.written.clear()
    environment.spans.clear()
    length = 0
    for part in compile_template(template).generate(request["values"]):
        environment.written.append(part)
        length += len(part)
        if length > TEXT:
            raise ValueError(f"the template writes more than {TEXT} characters")
    return {"text": "".join(environment.written), "spans": list(environment.spans)}


def main() -> None:
    """Answer requests, one JSON object per line, until the input ends."""
    limit_memory()
    try:
        environment = make_environment()
    except ImportError as error:
        environment, missing = None, str(error)
    compile_template = lru_cache(maxsize=32)(lambda template: environment.from_string(template))
    for line in sys.stdin.buffer:
        reply: dict[str, Any]
        try:
            if environment is None:
                raise RuntimeError(
                    f'Jinja cannot be imported ({missing}); install it with: pip install "jinja2>=3.1.6"'
                )
            reply = answer(environment, compile_template, json.loads(line))
        except MemoryError:
            reply = {"error": f"the template needs more than {MEMORY // 10**6} MB of memory"}
        except Exception as error:
            reply = {"error": " ".join(f"{error}".split())[:300] or type(error).__name__}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
