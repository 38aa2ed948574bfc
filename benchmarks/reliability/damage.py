"""Damage files at random, as accidents or attackers might.

`damaged` draws one kind of damage that fits the form of a file. Structured files are damaged in
their structure: JSON in a random entry, a safetensors file in the JSON of its header.
"""

import copy
import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Form = Literal["bytes", "json", "lines", "safetensors", "template", "text", "gzip"]

# Limits of integer types, and these limits plus one.
_NUMBERS = (0, 1, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)

_DEPTH = 100_000
_MANY = 200_000

# A folder beside the folders of the files, which must not be touched.
OUTSIDE = "outside"

_PATHS = (
    f"../{OUTSIDE}/model.safetensors",
    f"../../{OUTSIDE}/model.safetensors",
    "../" * 12 + "etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "",
    "..\\..\\model.safetensors",
    "C:\\model.safetensors",
    "model.safetensors\x00.txt",
    "nul",
    "a" * 300,
    "model\u202e.safetensors",
    "~/model.safetensors",
    "file:///etc/passwd",
    f"model.safetensors/../../{OUTSIDE}/model.safetensors",
    "\ud800",
)

_SCALARS: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "0", "a", "\ud800", "\x00", "a" * 100_000, [], {}),
    *([None], [[]], {"": ""}, [0] * 50, "auto", "../x", "{{ 7 * 7 }}", "<script>"),
)


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage of a file.

    Attributes:
        kind: kind of damage, in a word or two.
        content: new content of the file; None if the file becomes a symbolic link.
        link: target of that link.
        leads_out: whether the damaged file names, or links to, a place outside its folder.
    """

    kind: str
    content: bytes | None = None
    link: str = ""
    leads_out: bool = False


def damaged(content: bytes, form: Form, draw: random.Random, *, is_file: bool) -> Damage:
    """Draw one damage of a file.

    Args:
        content: content of the file.
        form: format of the content.
        draw: random numbers.
        is_file: whether the content is in a file, which may become a symbolic link.
    """
    if is_file and draw.random() < 0.04:
        return _link(draw)
    structures: dict[Form, Callable[[bytes, random.Random], Damage]] = {
        "json": _of_json,
        "lines": _of_lines,
        "safetensors": _of_safetensors,
        "template": _of_template,
        "text": _of_text,
        "gzip": _of_gzip,
    }
    if form in structures and draw.random() < 0.6:
        return structures[form](content, draw)
    return _of_bytes(content, draw)


def _link(draw: random.Random) -> Damage:
    target = draw.choice([*_PATHS[:3], "/etc/passwd", "/dev/zero", "/", "../..", "nothing"])
    return Damage("link out of the folder", link=target, leads_out=True)


def _of_bytes(content: bytes, draw: random.Random) -> Damage:
    """Damage bytes as disks, transfers and editors do, or write false lengths."""
    found = bytearray(content)
    # Half of the damage hits the beginning, where headers are.
    end = max(1, len(found) if draw.random() < 0.5 else min(len(found), 2000))
    place, length = draw.randrange(end), draw.randint(1, 20)
    part = found[place : place + length]
    match draw.randrange(8):
        case 0:
            for _ in range(draw.choice((1, 1, 3, 50))):
                if found:
                    found[draw.randrange(end)] ^= 1 << draw.randrange(8)
            return Damage("flipped bits", bytes(found))
        case 1:
            found[place : place + length] = draw.randbytes(len(part))
            return Damage("other bytes", bytes(found))
        case 2:
            return Damage("cut off", bytes(found[:place]))
        case 3:
            del found[place : place + length]
            return Damage("missing bytes", bytes(found))
        case 4:
            found[place:place] = part
            return Damage("doubled bytes", bytes(found))
        case 5:
            found[place : place + length] = bytes(len(part))
            return Damage("zeros", bytes(found))
        case 6:
            number = draw.choice((*_NUMBERS, len(found), len(found) + 1))
            form = draw.choice(("<Q", "<I", ">Q", ">I"))
            size = struct.calcsize(form)
            place = 8 * (place // 8) if draw.random() < 0.5 else place
            found[place : place + size] = struct.pack(form, number % (1 << 8 * size))
            return Damage("a length that lies", bytes(found))
        case _:
            return Damage("longer", bytes(found) + draw.randbytes(draw.choice((1, 4096))))


def _of_json(content: bytes, draw: random.Random) -> Damage:
    """Change the type, name, count or depth of one entry of a JSON value."""
    try:
        value = json.loads(content)
    except ValueError:
        return _of_bytes(content, draw)
    kind, text, out = _changed(value, draw)
    return Damage(kind, text.encode("utf-8", "surrogatepass"), leads_out=out)


def _of_lines(content: bytes, draw: random.Random) -> Damage:
    """Damage one line of JSON Lines as JSON."""
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    done = _of_json(lines[place], draw)
    lines[place] = (done.content or b"").replace(b"\n", b" ")
    return Damage(done.kind, b"\n".join(lines), leads_out=done.leads_out)


def _of_safetensors(content: bytes, draw: random.Random) -> Damage:
    """Damage the header of a safetensors file as JSON, and correct its length."""
    (length,) = struct.unpack("<Q", content[:8])
    done = _of_json(content[8 : 8 + length], draw)
    head = done.content or b""
    return Damage(done.kind, struct.pack("<Q", len(head)) + head + content[8 + length :])


def _of_gzip(content: bytes, draw: random.Random) -> Damage:
    """Damage compressed JSON Lines, or make a decompression bomb."""
    if draw.random() < 0.02:
        return Damage("a bomb", gzip.compress(b" " * (64 << 20), compresslevel=9))
    done = _of_lines(gzip.decompress(content), draw)
    return Damage(done.kind, gzip.compress(done.content or b"", compresslevel=1))


def _changed(value: Any, draw: random.Random) -> tuple[str, str, bool]:
    """Change one entry; return the kind, the JSON, and whether a path now leads out."""
    mark = "\ufdd0here"
    holders = list(_holders(value))
    if not holders:
        return "other type", json.dumps(draw.choice(_SCALARS)), False
    number = draw.randrange(len(holders))
    value = copy.deepcopy(value)
    holder, key = list(_holders(value))[number]
    match draw.randrange(7):
        case 0:
            holder[key] = draw.choice(_SCALARS)
            return "other type", json.dumps(value), False
        case 1:
            text = isinstance(holder[key], str)
            holder[key] = draw.choice(_PATHS)
            return "a path", json.dumps(value), text and _leads_out(holder[key])
        case 2 if isinstance(holder, dict):
            name = draw.choice(_PATHS)
            holder[name] = holder.pop(key)
            return "a path as a name", json.dumps(value), False
        case 3:
            del holder[key]
            return "missing", json.dumps(value), False
        case 4:
            holder[key] = mark
            opening, closing = draw.choice((("[", "]"), ('{"a":', "}"), ("[", ""), ('{"a":', "")))
            deep = opening * _DEPTH + "0" + closing * _DEPTH
            return "deep", json.dumps(value).replace(json.dumps(mark), deep, 1), False
        case 5:
            own = holder[key]
            holder[key] = mark
            many = draw.choice((1000, _MANY if len(json.dumps(own)) < 20 else 1000))
            listed = ",".join([json.dumps(own)] * many)
            return "many", json.dumps(value).replace(json.dumps(mark), f"[{listed}]", 1), False
        case _:
            if isinstance(holder[key], int) and not isinstance(holder[key], bool):
                holder[key] = draw.choice((*_NUMBERS, -1, holder[key] + 1, -holder[key], 10**30))
                return "another number", json.dumps(value), False
            holder[key] = [holder[key]] if draw.random() < 0.5 else {"a": holder[key]}
            return "one deeper", json.dumps(value), False


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every entry of a value: the list or object that holds it, and its index or key."""
    if isinstance(value, dict | list):
        entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, inner in entries:
            yield value, key
            yield from _holders(inner)


def _leads_out(path: str) -> bool:
    return path.startswith(("/", "..")) or "/../" in path


def _of_template(content: bytes, draw: random.Random) -> Damage:
    """Insert hostile code into a template."""
    text = content.decode()
    many = draw.choice((200, 3000, _DEPTH))
    extras = (
        ("deep", "(" * many + "1" + ")" * many, True),
        ("deep", "[" * many + "]" * many, True),
        ("deep", "not " * many + "1", True),
        ("deep", "1" + "+1" * many, True),
        ("deep", "a" + ".a" * many, True),
        ("deep", "{% if 1 %}" * many + "{% endif %}" * many, False),
        ("deep", "{% for a in [1] %}" * many, False),
        ("a way out", "''.__class__.__mro__[1].__subclasses__()", True),
        ("a way out", "cycler.__init__.__globals__.os.popen('touch here').read()", True),
        ("a way out", "messages.__reduce_ex__(2)", True),
        ("a way out", "lipsum.__globals__", True),
        ("a way out", "{% include '/etc/passwd' %}", False),
        ("a way out", "{% import 'os' as os %}", False),
        ("many", "range(100000)|list|string", True),
        ("many", "'x' * 10000000", True),
        ("other type", draw.choice(("messages", "1/0", "'%d' % 'a'", "{}[1]", "-messages")), True),
        ("other type", f"messages[0].content.{draw.choice(dir(str))}", True),
    )
    kind, source, is_expression = draw.choice(extras)
    place = draw.choice([0, len(text), *(i for i, one in enumerate(text) if one in "{}%")])
    made = "{{ " + source + " }}" if is_expression else source
    return Damage(kind, f"{text[:place]}{made}{text[place:]}".encode())


def _of_text(content: bytes, draw: random.Random) -> Damage:
    """Change the encoding of a text, or the length of its lines."""
    text = content.decode()
    kind, found = draw.choice(
        (
            ("other encoding", text.encode(draw.choice(("utf-16", "utf-32", "utf-16-le")))),
            ("other encoding", b"\xef\xbb\xbf" + content),
            ("other encoding", content.replace(b"e", b"\xff")),
            ("other encoding", content.replace(b" ", b"\x00", 1)),
            ("other encoding", content.replace(b"e", b"\xed\xa0\x80", 3)),
            ("many", content.replace(b" ", b"") * 20),
            ("many", b" " * 1_000_000),
            ("many", "\u202e\u200b\ufdd0".encode() * 3000),
            ("other bytes", b"PK\x03\x04" + content),
            ("other bytes", b"\x1f\x8b" + content),
            ("cut off", b""),
        )
    )
    return Damage(kind, found)


def place(damage: Damage, path: Path) -> None:
    """Apply a damage to a file."""
    if damage.content is None:
        path.unlink(missing_ok=True)
        path.symlink_to(damage.link)
    else:
        path.write_bytes(damage.content)
