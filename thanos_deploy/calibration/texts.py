"""Texts to calibrate and to judge on: the built-in one, and files.

The suffix of a file says how it is read, in capital letters or not, and `.gz` behind it that it is
compressed. What has no text to be read as it stands is refused, so that nothing is calibrated on
the syntax of a format. What rows may hold, `rows` says.
"""

import gzip
import hashlib
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.bundle.codec import loads
from thanos_deploy.calibration.rows import RowError, Template, text_of
from thanos_deploy.errors import CalibrationError, PlatformError, boundary

BUILTIN = "builtin"

# Between two rows.
_JOIN = "\n\n"

# Every so many-th topic of the built-in text is kept for evaluation.
_HELD_OUT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it came from, for messages and for the manifest.

    Attributes:
        origin: where it came from.
        content: all of it; rows are joined by blank lines.
        rows: those of a data set; none where the text has none.
    """

    origin: str
    content: str
    rows: tuple[str, ...] = ()

    @classmethod
    def of_rows(cls, origin: str, rows: Iterable[str]) -> "Text":
        """The text of a data set.

        Raises:
            CalibrationError: there is nothing in it.
        """
        rows = tuple(rows)
        content = _JOIN.join(rows)
        if not content.strip():
            raise CalibrationError(f"{origin}: has no text", fix="give a file with text in it")
        return cls(origin, content, rows)

    def sample(self, count: int, seed: int) -> "Text":
        """Some of its rows, in an order that the seed decides.

        Raises:
            CalibrationError: it has fewer.
        """
        if len(self.rows) < count:
            raise CalibrationError(
                f"{self.origin}: {count} rows were asked for with --calib-rows, and the "
                f"text has {len(self.rows) or 'none'}",
                fix="ask for fewer rows, or leave --calib-rows out to take all of the text",
            )
        return Text.of_rows(self.origin, random.Random(seed).sample(self.rows, count))

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


# Files that are nothing but text; with one JSON object in every line; with a list of them; tables.
_PLAIN = ("", ".txt", ".text", ".md", ".rst", ".raw")
_LINES = (".jsonl", ".ndjson")
_LIST = (".json",)
_TABLES = (".parquet",)
_READ = (*_PLAIN, *_LINES, *_LIST)

_TABLE = "write its texts to a .jsonl, one JSON object per line with the text in a field"
_ARCHIVE = "unpack it; a .txt or .jsonl may be compressed with gzip"
_DOCUMENT = "write the text alone to a .txt"

# Other suffixes: what such a file is, and what to do.
_OTHERS = {
    **dict.fromkeys((".csv", ".tsv", ".xlsx"), ("a table", _TABLE)),
    **dict.fromkeys((".arrow", ".feather"), ("a binary table", _TABLE)),
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
    (b"PAR1", "a Parquet table", "let its name end with .parquet"),
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


def read_text(path: Path, *, text_field: str = "text", template: Template | None = None) -> Text:
    """A text file as it is, or the rows of a data set, joined by blank lines.

    Rows are those of JSON Lines, of a list in JSON, or of Parquet; see `rows` for what they hold. A
    byte order mark at the beginning is not part of the text.

    Args:
        path: the file.
        text_field: of a row, that holds its text.
        template: of the model, for conversations; None if it has none.

    Raises:
        CalibrationError: the file is missing or empty, of a kind that is not read, not UTF-8, or
            has a row without a text.
        PlatformError: the package that reads Parquet is not installed.
    """
    kind = _kind(path)
    if kind in _TABLES and path.is_file():
        found: Iterator[tuple[str, object]] = _table(path)
    else:
        content = _decoded(path, _bytes(path))
        if kind in _LINES:
            found = _lines(path, content)
        elif kind in _LIST:
            found = _list(path, content)
        elif content.strip():
            return Text(path.name, content)
        else:
            raise CalibrationError(f"{path}: has no text", fix="give a file with text in it")
    return Text.of_rows(path.name, texts_of(found, text_field, template))


def texts_of(
    found: Iterable[tuple[str, object]], text_field: str, template: Template | None
) -> Iterator[str]:
    """The text of every row.

    Args:
        found: where each row is, in words, and what it holds.
        text_field, template: see `read_text`.

    Raises:
        CalibrationError: a row has none.
    """
    for place, row in found:
        try:
            yield text_of(row, text_field, template)
        except RowError as error:
            raise CalibrationError(f"{place}: {error.said}", fix=error.fix) from error


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
        if kind not in _READ and not path.is_dir():
            what, fix = _OTHERS.get(
                kind, ("not a supported kind of text", "rename it to .txt if it is plain text")
            )
            raise CalibrationError(
                f"{path}: {kind} is {what}; supported are "
                f"{', '.join(filter(None, _READ))}, each also with .gz, and .parquet",
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
            fix="fetch or compress the file again, or remove .gz from the name if the file is "
            "not compressed",
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


def _lines(path: Path, content: str) -> Iterator[tuple[str, object]]:
    # Not splitlines: texts may hold U+2028, U+0085 and others that it takes for ends of lines.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip(" \t\r"):
            continue
        try:
            yield f"{path}, line {number}", loads(line)
        except ValueError as error:
            raise CalibrationError(
                f"{path}, line {number}: not JSON ({error})", fix="give one JSON object per line"
            ) from error


def _list(path: Path, content: str) -> Iterator[tuple[str, object]]:
    try:
        rows = loads(content)
    except ValueError as error:
        raise CalibrationError(
            f"{path}: not JSON ({error})",
            fix="give a list of objects; name the file .jsonl if it has one object on each line",
        ) from error
    if not isinstance(rows, list):
        raise CalibrationError(
            f"{path}: is a single JSON value, not a list of rows",
            fix="give a list of objects, each with a text or a conversation",
        )
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _table(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise PlatformError(
            f"{path}: reading Parquet needs the package pyarrow",
            fix="pip install 'thanos-deploy[data]'",
        ) from error
    with boundary(
        CalibrationError, f"{path}: not a readable Parquet table", fix="fetch the file again"
    ):
        rows = parquet.read_table(path).to_pylist()
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
