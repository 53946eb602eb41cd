"""Damage files: bytes, JSON at any depth, headers, lines and numbers, all drawn from a seeded generator."""

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

SIZES = (0, 1, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    "", " ", "x" * 20_000, "\0", "a\0b", "\ud800", "\udfff\ud800", "../../etc/passwd", "/etc/passwd", "/dev/zero", "..",
    "\x1b[31mred\x1b[0m\n# a", "\u202e\u2028\r\n", "{{ 1 }}", "{layer:>300000000}", "{0.__class__}", "*a" * 12, "NaN",
    "-inf", "1e999", "0" * 5000, "9" * 5000, "true", "False", "<bos>", "os.system", "google/gemma-2-2b", "%s%n",
    "\U0010ffff",
)  # fmt: skip
NUMBERS = (
    "0", "-0.0", "-1", "1e-299", "1e-40", "5e-324", "1e299", "1e308", "1e999", "-1e999", "NaN", "Infinity", "0.5", "3",
    "2147483648", "9223372036854775807", "18446744073709551616", "1" + "0" * 4000, "true", "null",
)  # fmt: skip
DEPTHS = (10, 900, 5000, 100_000)


class Raw(str):
    """JSON text to insert unchanged where a value would be."""


def draw_value(draw: random.Random) -> Any:
    """Return a random value, which is rarely right."""
    match draw.randrange(6):
        case 0:
            return draw.choice(TEXTS)
        case 1 | 2:
            return Raw(draw.choice(NUMBERS))
        case 3:
            return draw.choice([None, True, False, [], {}, [[]] * 3, [0] * 1000, {"a": {"a": {}}}, [None], [1, "a"]])
        case 4:
            depth = draw.choice(DEPTHS)
            return Raw("[" * depth + "]" * depth if draw.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth)
        case _:
            return draw.choice([*SIZES, -5, 2, 3, 4, 7, 64, 1000, 1.5, -2.5])


def write_json(value: Any, draw: random.Random) -> bytes:
    """Return JSON with `Raw` texts inserted; sometimes a key occurs twice."""
    held: list[str] = []

    def hold(place: Any) -> Any:
        if isinstance(place, Raw):
            held.append(place)
            return f"@raw{len(held) - 1}@"
        if isinstance(place, dict):
            return {key: hold(item) for key, item in place.items()}
        return [hold(item) for item in place] if isinstance(place, list) else place

    text = json.dumps(hold(value), ensure_ascii=draw.random() < 0.8)
    text = re.sub(r'"@raw(\d+)@"', lambda found: held[int(found[1])], text)
    if draw.random() < 0.03 and isinstance(value, dict) and value:
        text = f"{text[:-1]}, {json.dumps(draw.choice(list(value)))}: 1}}"
    return text.encode("utf-8", "surrogatepass")


def damage_json(raw: bytes, draw: random.Random) -> bytes:
    """Replace, remove or add one to three values at any depth."""
    top = json.loads(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place, kept = top, []
        while isinstance(place, dict | list) and place and (not kept or draw.random() < 0.75):
            key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
            kept.append((place, key))
            place = place[key]
        if not kept:
            break
        into, key = kept[-1]
        match draw.randrange(8):
            case 0:
                del into[key]
            case 1 if isinstance(into, dict):
                into[draw.choice(TEXTS)] = into[key]
            case 2 if isinstance(into, list):
                into.extend(into[: draw.choice([1, 50])])
            case 3 if isinstance(place, int | float) and not isinstance(place, bool):
                into[key] = draw.choice([place + 1, place - 1, place * 2, -place, float(place), str(place)])
            case _:
                into[key] = draw_value(draw)
    return write_json(top, draw)


def damage_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Change, insert, remove or double bytes, or cut off the rest; most often near the start."""
    out = bytearray(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(min(len(out), draw.choice([16, 400, 10**9, 10**9])) or 1)
        length = draw.choice([1, 1, 3, 8, 40, 1000])
        match draw.randrange(12):
            case 0:
                out[at : at + length] = draw.randbytes(length)
            case 1:
                out[at:at] = draw.randbytes(length)
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length] * draw.choice([1, 2, 100])
            case 4:
                del out[at:]
            case 5:
                size = draw.choice(SIZES)
                form = draw.choice("<Q >Q <I >I <H".split())
                packed = struct.pack(form, size % 2 ** (8 * struct.calcsize(form)))
                out[at : at + len(packed)] = packed
            case 6:
                out[at : at + length] = bytes(length)
            case _ if out:
                out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def damage_text(raw: bytes, draw: random.Random) -> bytes:
    """Change numbers and words of a text, and repeat, swap, cut or remove lines."""
    lines = raw.decode().splitlines(keepends=True)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(lines)) if lines else 0
        match draw.randrange(7):
            case 0:
                del lines[at : at + draw.choice([1, 1, 3])]
            case 1:
                lines[at:at] = lines[at : at + draw.choice([1, 5])] * draw.choice([1, 2, 300])
            case 2 if lines:
                lines.insert(draw.randrange(len(lines)), lines.pop(at))
            case 3 if lines:
                lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
            case 4 | 5 if lines:
                numbers = list(re.finditer(r"\d+(\.\d+)?", lines[at]))
                if numbers:
                    found = draw.choice(numbers)
                    lines[at] = lines[at][: found.start()] + draw.choice(NUMBERS) + lines[at][found.end() :]
            case _ if lines:
                words = lines[at].split(" ")
                words[draw.randrange(len(words))] = draw.choice(TEXTS)
                lines[at] = " ".join(words)
    return "".join(lines).encode("utf-8", "surrogatepass")


def damage_header(raw: bytes, draw: random.Random) -> bytes:
    """Damage the JSON of a safetensors file; sometimes make its length wrong."""
    length = int.from_bytes(raw[:8], "little")
    header = damage_json(raw[8 : 8 + length], draw)
    said = draw.choice([*SIZES, len(header) + 1]) if draw.random() < 0.1 else len(header)
    return struct.pack("<Q", said) + header + raw[8 + length :]


def one_of(*damages: Damage) -> Damage:
    """Return a damage that chooses one of several at random."""
    return lambda raw, draw: draw.choice(damages)(raw, draw)


JSON_FILE, TENSOR_FILE = one_of(damage_json, damage_json, damage_bytes), one_of(damage_header, damage_bytes)
TEXT_FILE = one_of(damage_text, damage_text, damage_bytes)
