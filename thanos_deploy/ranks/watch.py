"""Noticing that another rank has ended, so that nobody waits for it for ever.

The system tells when a process of the same machine ends; a process of another machine gives a sign
of life every few seconds. What a rank ended with it leaves with the others beforehand, if it can.
"""

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch._C._distributed_c10d import Store

from thanos_deploy.errors import ResourceError
from thanos_deploy.ranks.group import Ranks

_EVERY = 0.2  # seconds between two looks
_SIGN_EVERY = 5.0  # seconds between two signs of life
_SILENCE = 40.0  # seconds without one after which a rank counts as ended

# A rank that is told of an error waits so long for the end of whoever caused it to be seen.
_EXPLAINED_WITHIN = 3.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank is; see `_machine`."""

    machine: str
    pid: int


class Watch:
    """Looks after the other ranks from a thread of its own; ends this process when one has ended.

    Ending it cannot wait until the main thread is back from PyTorch, where it may wait for the
    rank that is gone.
    """

    def __init__(self, ranks: Ranks, store: Store) -> None:
        """Exchange where the ranks are; all of them do it at once.

        Args:
            ranks: this one among the others.
            store: where ranks leave what they ended with; used by nobody else in this process.
        """
        self._ranks, self._store = ranks, store
        own = _Place(_machine(), os.getpid())
        places = ranks.gather(own)
        self._names = [f"rank {rank} (process {one.pid})" for rank, one in enumerate(places)]
        self._alive: dict[int, Callable[[], bool]] = {}
        for rank, one in enumerate(places):
            if rank != ranks.rank:
                near = one.machine == own.machine
                self._alive[rank] = _process_lives(one.pid) if near else self._gives_signs(rank)
        self._signed = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pause()

    def close(self) -> None:
        """This rank is done, as all others are."""
        self._leave(0)
        self._pause()

    def explain(self, error: BaseException, code: int) -> None:
        """Leave with the others what this rank ends with, unless another one was the cause.

        Args:
            error: what ends it.
            code: its exit code.

        Raises:
            ResourceError: another rank was killed, which is why.
            SystemExit: another rank ended by an error, which it has told of.
        """
        self._pause()
        if isinstance(error, RuntimeError | KeyboardInterrupt):
            # Of PyTorch, or from whoever started the ranks: it may be by another one's end.
            until = time.monotonic() + _EXPLAINED_WITHIN
            while not (ended := self._ended()) and time.monotonic() < until:
                time.sleep(_EVERY)
            if ended:
                code, killed = self._cause(ended)
                self._leave(code)
                if killed is None or not self._speaks(ended):
                    raise SystemExit(code) from error
                raise killed from error
        self._leave(code)
        self._linger()

    def _linger(self) -> None:
        """Let the others read what this rank has left: the store goes with rank 0."""
        until = time.monotonic() + _EXPLAINED_WITHIN
        while self._ranks.rank == 0 and time.monotonic() < until and not self._all_ended():
            time.sleep(_EVERY)

    def _all_ended(self) -> bool:
        """Every other rank has ended, or has left what it is about to end with."""
        return all(
            not alive() or self._left(rank) is not None for rank, alive in self._alive.items()
        )

    def _pause(self) -> None:
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(_EVERY):
            self._sign()
            if ended := self._ended():
                code, killed = self._cause(ended)
                if killed is not None and self._speaks(ended):
                    print(f"Error: {killed}", file=sys.stderr, flush=True)
                self._leave(code)
                self._linger()
                os._exit(code)

    def _ended(self) -> dict[int, int | None]:
        """The ranks that have ended before this one, but for those that were done: exit codes.

        One that has left an error is as good as ended.
        """
        gone = [rank for rank, alive in self._alive.items() if not alive() or self._left(rank)]
        left = {rank: self._left(rank) for rank in gone}
        return {rank: code for rank, code in left.items() if code != 0}

    def _cause(self, ended: dict[int, int | None]) -> tuple[int, ResourceError | None]:
        """The exit code of all, and, if that was the cause, that ranks were killed."""
        killed = [rank for rank, code in ended.items() if code is None]
        if not killed:
            return next(code for code in ended.values() if code is not None), None
        if 0 in killed:
            # It keeps the store, so what the others end with is no longer known.
            killed = [0]
        who = " and ".join(self._names[rank] for rank in killed)
        return ResourceError.exit_code, ResourceError(
            f"{who} of {self._ranks.size} ended without an error message: the system "
            "killed the process for lack of memory, or somebody killed it",
            fix="repeat the command, with any number of processes: finished work is kept. If "
            "memory was lacking, use fewer processes on this machine",
        )

    def _speaks(self, ended: dict[int, int | None]) -> bool:
        """This is the first rank of those that are left, so that it is said once."""
        if 0 in ended and ended[0] is None:
            return self._ranks.rank == 1
        return all(rank in ended and ended[rank] is None for rank in range(self._ranks.rank))

    def _leave(self, code: int) -> None:
        with suppress(RuntimeError):  # whoever keeps it may be gone
            self._store.set(f"ended-{self._ranks.rank}", str(code))

    def _left(self, rank: int) -> int | None:
        name = f"ended-{rank}"
        try:
            return int(self._store.get(name)) if self._store.check([name]) else None
        except RuntimeError:
            return None

    def _sign(self) -> None:
        now = time.monotonic()
        if now - self._signed >= _SIGN_EVERY:
            self._signed = now
            with suppress(RuntimeError):
                self._store.set(f"alive-{self._ranks.rank}", f"{now}")

    def _gives_signs(self, rank: int) -> Callable[[], bool]:
        """Whether a rank of another machine lives, by its signs of life."""
        name, last, heard, asked = f"alive-{rank}", b"", time.monotonic(), 0.0

        def alive() -> bool:
            nonlocal last, heard, asked
            now = time.monotonic()
            if now - asked < _SIGN_EVERY:
                return now - heard < _SILENCE
            asked = now
            with suppress(RuntimeError):
                if self._store.check([f"ended-{rank}"]):
                    return False
                if self._store.check([name]) and (sign := self._store.get(name)) != last:
                    last, heard = sign, now
            return now - heard < _SILENCE

        return alive


def _process_lives(pid: int) -> Callable[[], bool]:
    """Whether a process of this machine lives."""
    if hasattr(os, "pidfd_open"):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return lambda: False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return lambda: not poll.poll(0)

    def alive() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    return alive


def _machine() -> str:
    """Which machine this is, and which processes on it can see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename
