"""Connect to the other ranks, as torchrun's environment variables say, and disconnect from them.

    with connected():
        ...  # `group.current()` is the group of all ranks

A process that torchrun did not start works alone.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from thanos_deploy.errors import DeployError, PlatformError, UsageError, translate_system_error
from thanos_deploy.ranks import group
from thanos_deploy.ranks.group import Ranks
from thanos_deploy.ranks.watch import Watch

# Timeout for connecting, in seconds, and the environment variable that overrides it.
_SECONDS = "THANOS_DEPLOY_CONNECT_SECONDS"
_CONNECT = 60.0

# Environment variable with the number of threads that `launch` has divided among the ranks of this
# machine; unset if the user had set OMP_NUM_THREADS.
ALL_THREADS = "THANOS_DEPLOY_ALL_THREADS"

# This process's watch while it works with other ranks; empty otherwise.
_watches: list[Watch] = []

# The rendezvous store for each address, and how often this process has connected. Each connection
# uses another prefix in the store.
_stores: dict[str, Store] = {}
_meetings = 0


@dataclass(frozen=True, slots=True)
class Place:
    """This process's position among the processes that torchrun has started.

    Attributes:
        rank: its number.
        size: number of processes.
        local_rank: its number on this machine, which selects its GPU.
        address: address of the rendezvous, HOST:PORT.
    """

    rank: int
    size: int
    local_rank: int
    address: str


def place() -> Place | None:
    """Read this process's place from torchrun's environment variables.

    Returns:
        the place; None if torchrun did not start this process, or started it alone.

    Raises:
        UsageError: a variable is missing or is not a number.
    """
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        found = Place(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", "0")),
            f"{environment['MASTER_ADDR']}:{int(environment['MASTER_PORT'])}",
        )
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"RANK is set, so this is one of several processes, but the rest of the environment is "
            f"not what torchrun sets: {error}",
            fix="start the processes with torchrun, or with --processes; or unset RANK",
        ) from error
    return found if found.size > 1 else None


def is_follower() -> bool:
    """Whether this process is a rank other than 0, which prints no messages and writes no files."""
    found = place()
    return found is not None and found.rank != 0


@contextmanager
def connected() -> Iterator[Ranks]:
    """Work together with the other ranks, if torchrun has started any, until `disconnect`.

    If the work of a rank fails or is interrupted, all other ranks end too, with its exit code. If a
    rank is killed, another rank reports it, and the others end with exit code 5.

    Raises:
        PlatformError: the other ranks cannot be reached.
        UsageError: the environment is not torchrun's, or the program has initialised
            `torch.distributed` itself.
        ResourceError: a rank was killed.
    """
    found = place()
    if found is None or _watches:
        yield group.current()
        return
    if dist.is_initialized():
        raise UsageError(
            "torch.distributed is in use by this program already",
            fix="call torch.distributed.destroy_process_group() before this call",
        )
    ranks = Ranks(found.rank, found.size)
    with _meet(found, ranks) as watch:
        group.enter(ranks)
        _watches.append(watch)
        try:
            yield ranks
            disconnect()
        except BaseException as error:
            if _watches:
                watch.explain(error, _exit_code(error))
            raise
        finally:
            if _watches:
                _watches.clear()
                group.leave()


def disconnect() -> None:
    """Disconnect the ranks, after a barrier; from here on each of them works alone."""
    if not _watches:
        return
    group.current().barrier()
    _watches.pop().close()
    group.leave()
    dist.destroy_process_group()
    if own := os.environ.pop(ALL_THREADS, None):
        torch.set_num_threads(int(own))
        del os.environ["OMP_NUM_THREADS"]


def _meet(found: Place, ranks: Ranks) -> Watch:
    """Connect all ranks with each other, and return a watch over the others."""
    global _meetings
    _meetings += 1
    seconds = float(os.environ.get(_SECONDS, _CONNECT))
    limit = timedelta(seconds=seconds)
    try:
        if found.address not in _stores:
            met = rendezvous("env://", found.rank, found.size, timeout=limit)
            _stores[found.address], *_ = next(iter(met))
        store = _stores[found.address]
        named = PrefixStore(f"thanos-deploy-{_meetings}", store)
        if torch.cuda.is_available():
            torch.cuda.set_device(found.local_rank % torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("group", named),
            rank=found.rank,
            world_size=found.size,
            timeout=limit,
        )
        dist.distributed_c10d._set_pg_timeout(group.WORK)
        return Watch(ranks, named.clone())  # type: ignore[attr-defined]  # missing in the stubs
    except (dist.DistError, RuntimeError, OSError) as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise PlatformError(
            f"rank {found.rank} of {found.size}: the other ranks were not reached within "
            f"{seconds:g} s through {found.address} ({_first_line(error)})",
            fix="check that all of them were started, that this address can be reached from every "
            "machine, and that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if they are set, name "
            f"the right network; {_SECONDS} sets another limit",
        ) from error


@dataclass(frozen=True, slots=True)
class _Depends:
    """One rank's message: everything that results depend on, in JSON types."""

    values: Mapping[str, Any]


def same_everywhere(values: Mapping[str, Any]) -> None:
    """Refuse ranks that differ in something on which results depend.

    Args:
        values: everything on which results depend, by name, as this rank has it.

    Raises:
        UsageError: a value differs; the message names it and the rank.
    """
    first, *others = (one.values for one in group.current().gather(_Depends(values)))
    for rank, other in enumerate(others, start=1):
        if other != first:
            differences = [
                f"{name} is {first.get(name)} and {other.get(name)}"
                for name in sorted(first.keys() | other.keys())
                if first.get(name) != other.get(name)
            ]
            raise UsageError(
                f"rank 0 and rank {rank} differ: {'; '.join(differences)}",
                fix="start all ranks with the same options, the same model and text, and the same "
                "versions, on machines of one kind",
            )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).strip()


def _exit_code(error: BaseException) -> int:
    """Return the exit code with which this process will end because of an error."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    known = error if isinstance(error, DeployError) else None
    if known is None and isinstance(error, Exception):
        known = translate_system_error(error)
    return 1 if known is None else known.exit_code
