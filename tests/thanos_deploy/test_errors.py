"""What a library raises comes out as an error that says what to do, and nothing else is touched."""

import errno
import os
from pathlib import Path

import pytest

from thanos_deploy.errors import (
    InputError,
    ModelError,
    PlatformError,
    ResourceError,
    boundary,
    translate_system_error,
)


def test_an_exception_of_a_library_says_what_happened_and_what_to_do() -> None:
    with (
        pytest.raises(ModelError, match=r"^config.json: no model \(KeyError: 'spiral'\)") as raised,
        boundary(ModelError, "config.json: no model", fix="restore it"),
    ):
        raise KeyError("spiral")
    assert raised.value.fix == "restore it"
    assert isinstance(raised.value.__cause__, KeyError)


def test_pages_of_text_are_left_to_the_cause() -> None:
    with (
        pytest.raises(InputError) as raised,
        boundary(InputError, "it failed", fix="x"),
    ):
        raise ValueError("first\n\nsecond\n\nthird")
    assert raised.value.message == "it failed (ValueError: first)"


@pytest.mark.parametrize(
    "error",
    [
        ResourceError("full", fix="free some"),
        MemoryError(),
        OSError(errno.ENOSPC, "no space"),
        RuntimeError("CUDA out of memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_known_already_passes_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, boundary(ModelError, "what", fix="x"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("inner", ["", "file"])
def test_what_may_not_be_read_is_told_apart_from_what_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    place = tmp_path / inner
    error = PermissionError(errno.EACCES, "Permission denied", str(place))
    written = translate_system_error(error)
    assert isinstance(written, PlatformError)
    assert "-o" in written.fix
    # As for a user who is not root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    read = translate_system_error(error)
    assert isinstance(read, PlatformError)
    assert f"{place}: the current user is not allowed to read this file" in read.message
    assert "chmod" in read.fix
