"""Detect that another rank has ended, so that no rank waits for it for ever.

A process on the same machine is watched through the operating system; a process on another machine
sends a heartbeat every few seconds. A rank that can still do so puts its exit code into the shared
store before it ends.
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

_EVERY = 0.2  # seconds between two checks
_SIGN_EVERY = 5.0  # seconds between two heartbeats
_SILENCE = 40.0  # seconds without a heartbeat after which a rank counts as ended

# Seconds that a rank with an error waits, to see whether another rank's end was the cause, and that
# rank 0 waits for the others to read its exit code.
_EXPLAINED_WITHIN = 3.0


@dataclass(frozen=True, slots=True)
class _Place:
    """The process of a rank; for `machine` see `_machine`."""

    machine: str
    pid: int


class Watch:
    """A thread that watches the other ranks, and ends this process when one of them has failed.

    The thread ends the process itself, because the main thread may be inside a collective of
    PyTorch, waiting for the rank that is gone.
    """

    def __init__(self, ranks: Ranks, store: Store) -> None:
        """Exchange the machines and process ids of all ranks; called by all of them together.

        Args:
            ranks: the group of all ranks.
            store: where ranks put their exit codes and heartbeats; not used by anything else in
                this process.
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
        """Stop watching, and record that this rank has finished without an error."""
        self._leave(0)
        self._pause()

    def explain(self, error: BaseException, code: int) -> None:
        """Record this rank's exit code for the others, and find out whether another was the cause.

        Args:
            error: the error that ends this rank.
            code: the exit code for it.

        Raises:
            ResourceError: another rank was killed, and this rank is the one to report it.
            SystemExit: another rank was the cause, and this rank is not the one to report it.
        """
        self._pause()
        if isinstance(error, RuntimeError | KeyboardInterrupt):
            # PyTorch or the launcher may have raised it because another rank has ended.
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
        """Let the others read this rank's exit code: the store ends with rank 0."""
        until = time.monotonic() + _EXPLAINED_WITHIN
        while self._ranks.rank == 0 and time.monotonic() < until and not self._all_ended():
            time.sleep(_EVERY)

    def _all_ended(self) -> bool:
        """Whether every other rank has ended, or has recorded an exit code."""
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
        """Return the exit codes of the other ranks that have ended without finishing.

        The code is None if the rank recorded none, as when it was killed. A rank that has recorded
        an error counts as ended.
        """
        gone = [rank for rank, alive in self._alive.items() if not alive() or self._left(rank)]
        left = {rank: self._left(rank) for rank in gone}
        return {rank: code for rank, code in left.items() if code != 0}

    def _cause(self, ended: dict[int, int | None]) -> tuple[int, ResourceError | None]:
        """Return the common exit code, and the error to report if ranks were killed."""
        killed = [rank for rank, code in ended.items() if code is None]
        if not killed:
            return next(code for code in ended.values() if code is not None), None
        if 0 in killed:
            # Rank 0 keeps the store, so the exit codes of the others are no longer known.
            killed = [0]
        who = " and ".join(self._names[rank] for rank in killed)
        return ResourceError.exit_code, ResourceError(
            f"{who} of {self._ranks.size} ended without an error message: the system "
            "killed the process for lack of memory, or somebody killed it",
            fix="repeat the command, with any number of processes: finished work is kept. If "
            "memory was lacking, use fewer processes on this machine",
        )

    def _speaks(self, ended: dict[int, int | None]) -> bool:
        """Whether this is the first rank that was not killed, which reports the error for all."""
        if 0 in ended and ended[0] is None:
            return self._ranks.rank == 1
        return all(rank in ended and ended[rank] is None for rank in range(self._ranks.rank))

    def _leave(self, code: int) -> None:
        with suppress(RuntimeError):  # rank 0, which keeps the store, may be gone
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
        """Return a check by heartbeat of whether a rank on another machine is alive."""
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
    """Return a check of whether a process on this machine is alive."""
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
    """Return an id of this machine and its PID namespace; the host name if that is unreadable."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename
