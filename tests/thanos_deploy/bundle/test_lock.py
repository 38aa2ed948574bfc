"""One writer of a folder: on this machine, on another one, and where file locks are missing."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from thanos_deploy.bundle import lock
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.lock import EXPIRY_SECONDS, Owner, hold
from thanos_deploy.errors import PlatformError


@pytest.fixture(params=["held", "missing", "of no effect"])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File locks as a local disk has them, and as network file systems lack them."""

    def missing(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "missing":
        monkeypatch.setattr(fcntl, "flock", missing)
    elif request.param == "of no effect":
        monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)


def leave_note(folder: Path, owner: Owner, *, age: float = 0.0) -> Path:
    note = folder / ".lock-owner"
    note.write_text(json.dumps(encode(owner)))
    os.utime(note, (note.stat().st_atime - age, note.stat().st_mtime - age))
    return note


def elsewhere() -> Owner:
    return replace(Owner.here(), host="other", machine="another machine", process=7)


def ended() -> Owner:
    """A process of this machine that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return replace(Owner.here(), process=process.pid, started=1)


@pytest.mark.usefixtures("flock")
def test_the_second_one_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with hold(tmp_path):
        with (
            pytest.raises(PlatformError, match=rf"another process \({os.getpid()} on ") as refused,
            hold(tmp_path),
        ):
            pass
        assert refused.value.exit_code == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock-owner"]
    with hold(tmp_path):  # after the first one
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.usefixtures("flock")
def test_another_machine_is_refused_for_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    leave_note(tmp_path, elsewhere(), age=EXPIRY_SECONDS - 5)
    with pytest.raises(PlatformError, match=r"\(7 on other\)"), hold(tmp_path):
        pass
    leave_note(tmp_path, elsewhere(), age=EXPIRY_SECONDS + 5)
    with hold(tmp_path) as held:
        held.require()


@pytest.mark.usefixtures("flock")
def test_a_process_that_was_killed_here_holds_nothing(tmp_path: Path) -> None:
    leave_note(tmp_path, ended())
    with hold(tmp_path) as held:
        held.require()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"host": 7}'], ids=len)
def test_a_note_that_nobody_can_read_counts_for_a_minute(tmp_path: Path, content: bytes) -> None:
    note = leave_note(tmp_path, elsewhere())
    note.write_bytes(content)
    with pytest.raises(PlatformError, match="another process is writing there"), hold(tmp_path):
        pass
    os.utime(note, (0, 0))
    with hold(tmp_path):
        pass


@pytest.mark.usefixtures("flock")
def test_of_many_that_find_an_old_note_one_writes(tmp_path: Path) -> None:
    leave_note(tmp_path, elsewhere(), age=2 * EXPIRY_SECONDS)
    together, over = threading.Barrier(8), threading.Barrier(8)
    won: list[int] = []

    def claim(number: int) -> None:
        together.wait()
        try:
            with hold(tmp_path):
                won.append(number)
                over.wait()  # until all others were refused
        except PlatformError:
            over.wait()

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_whoever_waits_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.01)
    order = []

    def wait() -> None:
        with hold(tmp_path, wait=True):
            order.append("second")

    with hold(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_writer_whose_folder_was_taken_over_stops(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        leave_note(tmp_path, elsewhere())
        with pytest.raises(PlatformError, match=r"\(7 on other\) has taken the folder over"):
            held.require()
    assert (tmp_path / ".lock-owner").exists()  # it is not this one's to remove


def test_the_note_is_renewed_and_what_killed_processes_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    left = tmp_path / ".lock-0123"
    left.write_text("")
    os.utime(left, (0, 0))
    renewed = threading.Event()
    utime = os.utime

    def seen(path: Path, *times: tuple[float, float]) -> None:
        utime(path, *times)
        if path.name == ".lock-owner":
            renewed.set()

    monkeypatch.setattr(os, "utime", seen)
    with hold(tmp_path):
        assert not left.exists()
        assert renewed.wait(10)


def test_without_hard_links_the_note_comes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, destination: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with hold(tmp_path) as held:
        held.require()
        with pytest.raises(PlatformError), hold(tmp_path):
            pass
