"""Where an ONNX file says that the data of its tensors lie. Standard library only.

Tensors may keep their data in another file, whose name the ONNX file holds. Not every library
that reads such files refuses names that lead out of the folder, so they are looked at first.

Sources: onnx.proto3 of ONNX 1.23 for the numbers of the fields, and the description of Protocol
Buffers' encoding.
"""

from collections.abc import Iterator
from pathlib import Path

from thanos_deploy.bundle import names
from thanos_deploy.errors import InputError

# By message: field number -> message in that field, as far as tensors can be below it.
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
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # how a field is encoded
_KEY, _VALUE = 1, 2
_DEEPEST = 64  # messages in messages


def require_own_data(path: Path) -> None:
    """Refuse an ONNX file with data outside its folder.

    Args:
        path: one that is there.

    Raises:
        InputError: a tensor's data are to be read from elsewhere, or the file is damaged.
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
    """The names of the files with data, as often as a tensor names them.

    Raises:
        ValueError, IndexError: the content is no ONNX file.
    """
    for entry in _below(memoryview(content), "ModelProto", 0):
        fields = dict(_fields(entry))
        if bytes(fields.get(_KEY, b"")) == b"location":
            yield bytes(fields.get(_VALUE, b"")).decode("utf-8", "surrogateescape")


def _below(content: memoryview, message: str, depth: int) -> Iterator[memoryview]:
    """Every entry of every tensor in a message that says where its data are."""
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
    """Number and content of the fields of a message that hold bytes; the others are passed over."""
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
    """A number in groups of seven bits, the lowest first; and the place after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a number has more than ten bytes")
