"""How much more host memory this process can take.

Limits are the machine's memory, the memory limits of the control groups (containers), and the
process's own resource limits. Linux only; on other systems the answer is "unknown". Standard
library only.
"""

import resource
from collections.abc import Iterator
from pathlib import Path

# A control group's limit above this counts as none: the number that the kernel writes for
# "unlimited" differs by version.
_UNLIMITED = 1 << 60

_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Bytes that can be allocated before allocation fails or the process is killed, or None.

    None means that the number is unknown.
    """
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    meminfo = _table(Path("/proc/meminfo"), scale=1024)
    if "MemAvailable" in meminfo:
        yield meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)
    yield from _of_groups()
    status = _table(Path("/proc/self/status"), scale=1024)
    for which, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY and name in status:
            yield max(0, soft - status[name])


def _of_groups() -> Iterator[int]:
    """Free bytes of every control group of the process; inactive file cache counts as free."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, used, file = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, file = _CGROUPS / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        place = root / name.lstrip("/")
        # In a container the name is often the host's, and the container's files are at the root.
        for folder in (place, *place.parents) if place.is_dir() else (root,):
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None and most < _UNLIMITED:
                yield max(0, most - taken + _table(folder / "memory.stat").get(file, 0))
            if folder == root:
                break


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or where there is no such file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path, *, scale: int = 1) -> dict[str, int]:
    """The numbers of a file by name, from lines that have a name and a number."""
    rows = (line.replace(":", " ").split() for line in _lines(path))
    return {row[0]: scale * int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
