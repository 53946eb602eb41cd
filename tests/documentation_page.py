"""The names that the Transformers documentation page of Gemma 2 documents, taken from its text: parameters with their
defaults, returned fields, and what its examples call, by section.

`documentation_page.json` is what this makes of the page: ``python tests/documentation_page.py PAGE > FILE``.
"""

import json
import re
import sys
from pathlib import Path

RECORDED = Path(__file__).with_suffix(".json")

SIGNATURE = re.compile(r"(\*\*\w+|\w+)(?:: \w+)?(?: = (\S+))?")  # name: Type = default
BULLET = re.compile(r"(?:- |Args — )(\w+) \($")  # the description of a parameter
RETURNED = re.compile(r"^(\w+) \($")  # the description of a returned field
CALLED = re.compile(r"import (.+)|(\w+)(?=\(|=[^=])")  # in a line of an example


def names_of(page: str) -> dict[str, dict[str, str | None]]:
    """Section of the page -> name -> its documented default, if there is one."""
    found: dict[str, dict[str, str | None]] = {"examples": {}}
    section = ""
    for line in map(str.strip, page.splitlines()):
        if re.fullmatch(r"Gemma2\w+", line):
            section = line
        elif line in ("forward", "Returns"):
            section = f"{section.split('.')[0]}.{line.lower()}"
        if section:
            names = found.setdefault(section, {})
            if line.startswith("< source >("):
                signature = line.removeprefix("< source >(").split(") →")[0].rstrip(" )")
                names |= {name: default or None for name, default in SIGNATURE.findall(signature)}
            elif bullet := (RETURNED if section.endswith(".returns") else BULLET).search(line):
                names.setdefault(bullet[1], None)
        if line.startswith(">>> ") and not line.startswith(">>> #"):
            for imported, called in CALLED.findall(line.split('"')[0]):
                found["examples"] |= dict.fromkeys([called] if called else imported.split(", "))
            found["examples"] |= dict.fromkeys(re.findall(r"(\w+)=", line))
    return found


if __name__ == "__main__":
    print(json.dumps(names_of(Path(sys.argv[1]).read_text(encoding="utf-8")), indent=1))
