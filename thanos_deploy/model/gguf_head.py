"""Check the header of a GGUF file before a library reads the file.

The format is ggml's (docs/gguf.md of ggml-org/ggml): the magic number, a version, the numbers of
tensors and of metadata values, the metadata values by name, the tensors by name. The package gguf
trusts the counts in the header, so a count of 2^60 in a damaged file would make it loop practically
for ever. transformers makes lists as long as the number of blocks that the header states.
"""

import os
import re
import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path

from thanos_deploy.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARCHITECTURE = b"general.architecture"
_BLOCKS = b".block_count"
_BLOCK = re.compile(rb"blk\.(\d{1,9})\.")  # `int` refuses a text of thousands of digits
_STRING, _ARRAY = 8, 9
# Format of an integer for `struct`, by the number of its GGUF type.
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
# Size of a value of fixed size in bytes, by the number of its GGUF type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# The format allows arrays of arrays of any depth; no usual file nests them deeply.
_DEPTH = 8


def architecture(path: Path) -> str:
    """Check the whole header and return the architecture that it names; empty if it names none.

    Raises:
        ModelError: the file is not GGUF of version 2 or 3, the header announces more bytes than the
            file has or holds a value of an unknown type, or the number of blocks that it states is
            not that of its tensors.
        OSError: the file cannot be read.
    """
    if os.path.getsize(path) < len(_MAGIC) + 20:
        raise _refusal(path, "it ends within its header")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        head = _Head(path, content)
        if head.take(len(_MAGIC)) != _MAGIC:
            raise _refusal(path, "it does not begin with GGUF")
        if (version := head.number("<I")) not in _VERSIONS:
            raise _refusal(path, f"it has version {version}, and only versions 2 and 3 can be read")
        tensors, values = head.number("<Q"), head.number("<Q")
        found, blocks, named = b"", None, set[int]()
        for _ in range(values):
            name, kind = head.text(), head.number("<I")
            if name == _ARCHITECTURE and kind == _STRING:
                found = head.text()
            elif name.endswith(_BLOCKS) and kind in _INTEGERS:
                blocks = head.number(_INTEGERS[kind])
            else:
                head.value(kind)
        for _ in range(tensors):
            if block := _BLOCK.match(head.text()):
                named.add(int(block[1]))
            dimensions = head.number("<I")
            head.skip(8 * dimensions + 4 + 8)
    if blocks is not None and (len(named), max(named, default=-1)) != (blocks, blocks - 1):
        raise _refusal(path, f"it has tensors of {len(named)} blocks, and claims to have {blocks}")
    return found.decode(errors="replace")


class _Head:
    """A read position in a file that moves forward and never beyond the end."""

    def __init__(self, path: Path, content: mmap) -> None:
        self._path, self._content, self._at = path, content, 0

    def skip(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise _refusal(
                self._path,
                f"at byte {self._at} it announces {count} more bytes, and it has "
                f"{len(self._content)} bytes",
            )
        self._at += count

    def take(self, count: int) -> bytes:
        begin = self._at
        self.skip(count)
        return self._content[begin : self._at]

    def number(self, form: str) -> int:
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(found)

    def string(self) -> None:
        self.skip(self.number("<Q"))

    def text(self) -> bytes:
        return self.take(self.number("<Q"))

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY and depth < _DEPTH:
            self._array(depth)
        else:
            raise _refusal(self._path, f"a value of the unknown type {kind} at byte {self._at}")

    def _array(self, depth: int) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SIZES:
            self.skip(_SIZES[kind] * count)
            return
        for _ in range(count):  # an element takes at least 8 bytes, so the loop ends with the file
            self.value(kind, depth + 1)


def _refusal(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path}: not a readable GGUF file ({why})",
        fix="download the file again and compare its hash",
    )
