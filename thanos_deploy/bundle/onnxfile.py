"""Check the names of the external data files of an ONNX file. Standard library only.

A tensor may keep its data in another file, whose name is stored in the ONNX file. Not every library
that reads ONNX files refuses names that lead out of the folder, so this module checks them first.

Sources: onnx.proto3 of ONNX 1.23 for the numbers of the fields, and the description of Protocol
Buffers' encoding.
"""

from collections.abc import Iterator
from pathlib import Path

from thanos_deploy.bundle import names
from thanos_deploy.errors import InputError

# For each message: field number -> message in that field, for all fields below which a tensor can
# occur.
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {},
}
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types of Protocol Buffers
_KEY, _VALUE = 1, 2  # fields of StringStringEntryProto
_DEEPEST = 64  # limit for the nesting of messages


def require_own_data(path: Path) -> None:
    """Refuse an ONNX file that reads data from outside its folder.

    Args:
        path: an existing file.

    Raises:
        InputError: the data of a tensor, or a link in the folder, lead elsewhere, or the file is
            damaged.
    """
    names.require_own(path.parent)
    try:
        found = set(locations(path.read_bytes()))
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{path}: not readable as an ONNX file ({error})", fix="export the model again"
        ) from error
    for name in sorted(found):
        names.plain(name, path)


def locations(content: bytes) -> Iterator[str]:
    """Yield the name of the external data file of each tensor that has one.

    Raises:
        ValueError, IndexError: the content is not an ONNX file.
    """
    for entry in _below(memoryview(content), "ModelProto", 0):
        fields = dict(_fields(entry))
        if bytes(fields.get(_KEY, b"")) == b"location":
            yield bytes(fields.get(_VALUE, b"")).decode("utf-8", "surrogateescape")


def _below(content: memoryview, message: str, depth: int) -> Iterator[memoryview]:
    """Yield the entries (key and value) about external data of all tensors below a message."""
    if message == "StringStringEntryProto":
        yield content
        return
    if depth > _DEEPEST:
        raise ValueError(f"messages are nested more than {_DEEPEST} deep")
    inside = _MESSAGES[message]
    for number, field in _fields(content):
        if number in inside:
            yield from _below(field, inside[number], depth + 1)


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and the content of each field of a message that holds bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, place = _varint(content, place)
            continue
        if kind == _BYTES:
            length, place = _varint(content, place)
        elif kind in (_EIGHT, _FOUR):
            length = 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"a field has the unknown wire type {kind}")
        if place + length > len(content):
            raise ValueError("it ends before its last field")
        if kind == _BYTES:
            yield number, content[place : place + length]
        place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """Decode a varint (groups of seven bits, lowest first); return it and the next position."""
    number = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a number has more than ten bytes")
