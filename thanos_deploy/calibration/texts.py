"""Texts for calibration and evaluation: the built-in text, and files.

The suffix of a file, in upper or lower case, selects the reader; a further `.gz` means that the
file is compressed. Formats other than plain text and rows are refused, so that no model is
calibrated on the syntax of a file format. `rows` describes what a row may contain.
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

# Separates two rows in the joined text.
_JOIN = "\n\n"

# One in this many topics of the built-in text is held out for evaluation.
_HELD_OUT_EVERY = 4


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it came from, for messages and for the manifest.

    Attributes:
        origin: name of the file, data set or built-in text.
        content: the whole text; rows are joined by blank lines.
        rows: the texts of its rows; empty for a text without rows.
    """

    origin: str
    content: str
    rows: tuple[str, ...] = ()

    @classmethod
    def of_rows(cls, origin: str, rows: Iterable[str]) -> "Text":
        """Join the rows of a data set to a text.

        Raises:
            CalibrationError: all rows are blank.
        """
        rows = tuple(rows)
        content = _JOIN.join(rows)
        if not content.strip():
            raise CalibrationError(f"{origin}: has no text", fix="give a file with text in it")
        return cls(origin, content, rows)

    def sample(self, count: int, seed: int) -> "Text":
        """Return a text of `count` of its rows, chosen and ordered by the seed.

        Raises:
            CalibrationError: it has fewer rows.
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
        """SHA-256 of the content, as hexadecimal digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def builtin_text(*, held_out: bool = False) -> Text:
    """Return the Python language reference that comes with CPython, so that nothing is downloaded.

    Its topics overlap, so every paragraph is used once, in the first topic (by name) that has it.
    One topic in four is held out for evaluation. The calibration part and the held-out part have no
    paragraph in common.

    Source: `pydoc_data.topics` of the Python standard library.

    Args:
        held_out: whether to return the held-out part; if not, the calibration part.
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


# Suffixes of plain text, of one JSON object per line, of a JSON list of objects, and of tables.
_PLAIN = ("", ".txt", ".text", ".md", ".rst", ".raw")
_LINES = (".jsonl", ".ndjson")
_LIST = (".json",)
_TABLES = (".parquet",)
_READ = (*_PLAIN, *_LINES, *_LIST)

_TABLE = "write its texts to a .jsonl, one JSON object per line with the text in a field"
_ARCHIVE = "unpack it; a .txt or .jsonl may be compressed with gzip"
_DOCUMENT = "write the text alone to a .txt"

# Suffixes that are refused: what such a file is, and what the user can do.
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

# First bytes of files that are not UTF-8 text: what such a file is, and what the user can do.
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
    """Read a plain text file as it is, or the rows of a data set, joined by blank lines.

    Rows are read from JSON Lines, from a JSON list, or from Parquet; see `rows` for their fields. A
    byte order mark at the beginning is not part of the text.

    Args:
        path: the file.
        text_field: name of the field of a row that holds its text.
        template: the model's chat template, for conversations; None if it has none.

    Raises:
        CalibrationError: the file is missing, empty or not UTF-8, its format is not supported, or
            a row has no text.
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
    """Yield the text of every row.

    Args:
        found: for each row its place, as text for messages, and its decoded content.
        text_field, template: see `read_text`.

    Raises:
        CalibrationError: a row has no text.
    """
    for place, row in found:
        try:
            yield text_of(row, text_field, template)
        except RowError as error:
            raise CalibrationError(f"{place}: {error.said}", fix=error.fix) from error


def _kind(path: Path) -> str:
    """Return the suffix that selects the reader, in lower case and without a final `.gz`."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix == ".gz" else name.suffix


def _bytes(path: Path) -> bytes:
    """Return the content of a file in a supported format, decompressed.

    Raises:
        CalibrationError: the file is missing or in another format, or is called `.gz` and is not
            gzip data.
    """
    try:
        path.stat()  # first, so that a missing file is reported as missing
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
    """Decode UTF-8 text, without its byte order mark.

    Raises:
        CalibrationError: the content is not UTF-8 text.
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
    # Not splitlines: it also splits at U+2028, U+0085 and others, which texts may contain.
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
