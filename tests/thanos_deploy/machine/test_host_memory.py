"""How much memory is left: the least of what the machine, its groups and its limits leave."""

import resource
from pathlib import Path

import pytest

from thanos_deploy.machine import host_memory


def test_no_more_is_free_than_the_machine_has() -> None:
    free = host_memory.free_bytes()
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = sum(
        int(line.split()[1]) for line in lines if line.startswith(("MemTotal", "SwapTotal"))
    )
    assert free is not None
    assert 0 < free <= 1024 * total


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    size = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmSize"))
    real = resource.getrlimit

    def limited(which: int) -> tuple[int, int]:
        return (size + 10**6, size) if which == resource.RLIMIT_AS else real(which)

    monkeypatch.setattr(resource, "getrlimit", limited)
    free = host_memory.free_bytes()
    assert free is not None
    assert free <= 10**6 + 10**8  # the process may have grown or shrunk since


@pytest.mark.parametrize(
    ("group", "files"),
    [
        (
            "0::/job/task",
            {
                "job/memory.max": "1000",
                "job/memory.current": "900",
                "job/memory.stat": "anon 5\ninactive_file 300\n",
                "job/task/memory.max": "max",
                "job/task/memory.current": "800",
            },
        ),
        (
            "4:cpu,memory:/job",
            {
                "memory/job/memory.limit_in_bytes": "1000",
                "memory/job/memory.usage_in_bytes": "900",
                "memory/job/memory.stat": "total_inactive_file 300\n",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "5",
            },
        ),
        # In a container, whose own files are at the root.
        ("0::/of/the/host", {"memory.max": "400", "memory.current": "0"}),
    ],
    ids=["version 2", "version 1", "container"],
)
def test_limits_of_control_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    real = host_memory._lines

    def lines(path: Path) -> list[str]:
        return [group, "3:cpu:/job"] if path == Path("/proc/self/cgroup") else real(path)

    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_lines", lines)
    assert host_memory.free_bytes() == 400
