"""Texts to calibrate and to judge on: the built-in one, and files.

The suffix of a file says how it is read, in capital letters or not, and `.gz` behind it that it is
compressed. What has no text to be read as it stands is refused, so that nothing is calibrated on
the syntax of a format.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.errors import CalibrationError

BUILTIN = "builtin"

# Every so many-th topic of the built-in text is kept for evaluation.
_HELD_OUT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it came from, for messages and for the manifest."""

    origin: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the text itself."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def builtin_text(*, held_out: bool = False) -> Text:
    """The language reference that every CPython carries, so that nothing has to be downloaded.

    Its topics overlap, so every paragraph is used once, in the first topic (by name) that has it;
    one topic in four is held out for evaluation. The calibration part and the held-out part
    have no paragraph in common.

    Source: `pydoc_data.topics` of the Python standard library.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: list[str] = []
    for number, (_, topic) in enumerate(sorted(topics.items())):
        paragraphs = [p.strip("\n") for p in topic.split("\n\n") if p.strip()]
        fresh = [p for p in dict.fromkeys(paragraphs) if p not in seen]
        seen.update(fresh)
        if fresh and (number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == held_out:
            parts.append("\n\n".join(fresh))
    return Text(f"{BUILTIN} ({'held-out' if held_out else 'calibration'} part)", "\n\n".join(parts))


# Files that are nothing but text, and files with one JSON object in every line.
_PLAIN = ("", ".txt", ".text", ".md", ".rst", ".raw")
_ROWS = (".jsonl", ".ndjson")

_TABLE = "write its texts to a .jsonl, one JSON object per line with the text in a field"
_ARCHIVE = "unpack it; a .txt or .jsonl may be compressed with gzip"
_DOCUMENT = "write the text alone to a .txt"

# Other suffixes: what such a file is, and what to do.
_OTHERS = {
    ".json": ("one JSON value, not one in every line", _TABLE),
    **dict.fromkeys((".csv", ".tsv", ".xlsx"), ("a table", _TABLE)),
    **dict.fromkeys((".parquet", ".arrow", ".feather"), ("a binary table", _TABLE)),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"), ("an archive", _ARCHIVE)
    ),
    **dict.fromkeys(
        (".html", ".htm", ".xml", ".pdf", ".docx"), ("a document with markup", _DOCUMENT)
    ),
}

# What a file begins with that is no UTF-8 text, whatever its name says.
_BEGINNINGS = (
    (b"\x1f\x8b", "gzip data", "let its name end with .gz"),
    (b"PAR1", "a Parquet table", _TABLE),
    (b"ARROW1", "an Arrow table", _TABLE),
    (b"PK\x03\x04", "a zip archive", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", _ARCHIVE),
    (b"BZh", "bzip2 data", _ARCHIVE),
    (b"\xfd7zXZ\x00", "xz data", _ARCHIVE),
    (b"%PDF-", "a PDF document", _DOCUMENT),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert the file to UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert the file to UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert the file to UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert the file to UTF-8"),
)

_JSON_TYPES = {bool: "a truth value", int: "a number", float: "a number", list: "a list"}


def read_text(path: Path, *, text_field: str = "text") -> Text:
    """A text file as it is, or the named field of every row of JSON Lines, joined by blank lines.

    A byte order mark at the beginning is not part of the text.

    Raises:
        CalibrationError: the file is missing or empty, of a kind that is not read, not UTF-8, or
            not JSON Lines with a text in the field of every row.
    """
    content = _decoded(path, _bytes(path))
    if _kind(path) in _ROWS:
        content = "\n\n".join(_rows(path, content, text_field))
    if not content.strip():
        raise CalibrationError(f"{path}: has no text", fix="give a file with text in it")
    return Text(path.name, content)


def _kind(path: Path) -> str:
    """The suffix that says how to read a file; that before `.gz` if it is compressed."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix == ".gz" else name.suffix


def _bytes(path: Path) -> bytes:
    """The content of a file of a kind that is read, decompressed.

    Raises:
        CalibrationError: it is missing, of another kind, or not the gzip data it is called.
    """
    try:
        path.stat()  # a file that is missing is that above all
        kind = _kind(path)
        if kind not in (*_PLAIN, *_ROWS) and not path.is_dir():
            what, fix = _OTHERS.get(
                kind, ("no kind of text that is known", "rename it to .txt if it is plain text")
            )
            raise CalibrationError(
                f"{path}: {kind} is {what}; supported are "
                f"{', '.join(filter(None, _PLAIN + _ROWS))}, each also with .gz",
                fix=fix,
            )
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"{path}: cannot be read ({error.strerror})", fix="check the path"
        ) from error
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{path}: not readable gzip data ({error})",
            fix="fetch or compress the file again, or take .gz off its name if it is not "
            "compressed",
        ) from error


def _decoded(path: Path, content: bytes) -> str:
    """UTF-8 text, without its byte order mark.

    Raises:
        CalibrationError: it is something else.
    """
    for beginning, what, fix in _BEGINNINGS:
        if content.startswith(beginning):
            raise CalibrationError(f"{path}: is {what}, not UTF-8 text", fix=fix)
    if (zero := content.find(0)) >= 0:
        raise CalibrationError(
            f"{path}: byte {zero} is 0, so it is binary data or UTF-16, not UTF-8 text",
            fix="give a text file, in UTF-8",
        )
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8",
            fix="convert the file to UTF-8",
        ) from error


def _rows(path: Path, content: str, text_field: str) -> Iterator[str]:
    # Not splitlines: texts may hold U+2028, U+0085 and others that it takes for ends of lines.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip(" \t\r"):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"{path}, line {number}: not JSON ({error})", fix="give one JSON object per line"
            ) from error
        if not isinstance(row, dict) or text_field not in row:
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise CalibrationError(
                f"{path}, line {number}: no text field {text_field!r}; found {fields or 'none'}",
                fix="name the field that holds the text with --text-field",
            )
        if problem := _no_text(row[text_field]):
            raise CalibrationError(
                f"{path}, line {number}: the field {text_field!r} {problem}",
                fix="remove or mend such rows, or name another field with --text-field",
            )
        yield row[text_field]


def _no_text(value: object) -> str:
    """What a field holds instead of a text, in words; empty if it is one."""
    if value is None:
        return "is null, not a text"
    if not isinstance(value, str):
        what, shown = _JSON_TYPES.get(type(value), "an object"), json.dumps(value)
        return f"is {what}, not a text: {shown if len(shown) <= 60 else f'{shown[:60]}...'}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"has half of a surrogate pair, {value[error.start]!a}, which is no character"
    return ""
