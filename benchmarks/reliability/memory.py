"""Prune under memory limits, in steps from enough to far too little.

`prune` runs on a model with wide layers, with a limit on the memory that it may take in addition to
what its process begins with. The limit is RLIMIT_AS, and a control group where this process may
make one. The command has to end with exit code 0 and the bytes of a run without a limit, or with
exit code 5 and the number of GB that are needed; never by a signal, and never with a traceback.
Without a limit, peak memory is compared with the estimate of `--dry-run`.
"""

import itertools
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.undisturbed import Undisturbed, undisturbed
from benchmarks.reliability.works import Work
from tests.commands import Command
from tests.conftest import write_model
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.forecast.memory import BEFORE

_GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
_LIMIT = ("memory.limit_in_bytes", "memory.max")
_PEAK = ("memory.max_usage_in_bytes", "memory.peak")

# Limits, relative to the memory that is needed according to the dry run.
STEPS = (2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.1, 0.05, 0.0)
_OFF = 0.2
_MOST_SECONDS = 600.0

_TEXT = ("--nsamples", "16", "--seqlen", "128")
_BY = ("prune", "{model}", "--pattern", "2:4", *_TEXT)
WORKS = (
    Work("wanda", (*_BY, "--method", "wanda", "-o", "{out}")),
    Work("fast", (*_BY, "--preset", "fast", "-o", "{out}")),
    Work("structured", ("prune", "{model}", "--pattern", "structured:0.25", *_TEXT, "-o", "{out}")),
)

_LIMITS = "memory limits"
_FAULTS = "runs with another exit code, or with 5 without the memory that is needed"


@dataclass(frozen=True, slots=True)
class Limited:
    """One run of a command under a memory limit.

    Attributes:
        work: name of the command.
        by: kind of limit.
        share: the limit, relative to the memory that is needed.
        code: exit code of the command.
        fault: what went wrong; empty if nothing did.
    """

    work: str
    by: str
    share: float
    code: int | None
    fault: str


def write_wide_model(folder: Path) -> Path:
    """Write a LLaMA of two blocks whose layers take some hundred MB while they are pruned."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(
            folder,
            "llama",
            hidden_size=512,
            intermediate_size=2560,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=256,
        )
    return folder


def run(setting: Setting) -> Iterator[Slice]:
    """Run every command with every kind of limit and every step, as far as time allows."""
    end, limits = time.monotonic() + setting.seconds, list(itertools.product(_kinds(), STEPS))
    # Earlier calls have tried the first limits.
    done = setting.so_far(_LIMITS)
    for number, alone in enumerate(undisturbed(WORKS, setting, write_wide_model)):
        if number and (number + 1) * len(limits) <= done:
            continue
        needed, ratio = compared(alone, setting.folder / "out")
        yield Slice(
            [
                Figure(f"{alone.work.name}: memory needed according to the dry run, GB",
                       needed / 1e9, joined="last"),
                Figure(f"{alone.work.name}: peak memory, relative to that", ratio,
                       least=1 - _OFF, most=1 + _OFF, joined="last"),
            ]
        )  # fmt: skip
        if alone.work == WORKS[0]:  # all commands begin in the same way
            held = held_before(alone, setting.folder / "out")
            begun = begun_with(alone, setting.folder / "out") if _root() else 0
        for by, share in limits[max(0, done - number * len(limits)) :]:
            if time.monotonic() > end:
                return
            one = limited(alone, setting.folder / "out", by, share, needed - held, begun)
            yield Slice(
                [
                    Figure(_LIMITS, 1, least=len(WORKS) * len(limits)),
                    Figure("of these, large enough: exit code 0", int(one.code == 0)),
                    Figure("of these, too small: exit code 5", int(one.code == 5)),
                    Figure(_FAULTS, int(bool(one.fault)), most=0),
                ],
                [str(one)] if one.fault else [],
            )


def _kinds() -> list[str]:
    return ["RLIMIT_AS", *(["control group"] if _root() else [])]


def _root() -> Path | None:
    """Return the folder in which this process may make memory control groups; None without one."""
    for root in _GROUPS:
        probe = root / f"thanos-deploy-{os.getpid()}"
        with suppress(OSError):
            probe.mkdir()
            has = any((probe / name).exists() for name in _LIMIT)
            probe.rmdir()
            if has:
                return root
    return None


def _planned(alone: Undisturbed, out: Path) -> dict[str, object]:
    """Return the estimate of the dry run."""
    command = alone.work.begin(alone.model, out, "--dry-run", "--json")
    output, errors = command.communicate()
    if command.returncode != 0:
        raise RuntimeError(f"{alone.work.name} --dry-run: {errors.decode(errors='replace')[-500:]}")
    planned: dict[str, object] = json.loads(output)["estimate"]
    return planned


def compared(alone: Undisturbed, out: Path) -> tuple[int, float]:
    """Return the bytes needed according to the dry run, and the peak memory relative to them."""
    estimate = _planned(alone, out)
    alone.copy(out)
    alone.work.finish(alone.model, out)
    held = Bundle.open(out).stages["prune"].result["peak_memory_bytes"]
    needed = int(str(estimate["memory_bytes"]))
    return needed, held / needed


def held_before(alone: Undisturbed, out: Path) -> int:
    """Return the bytes that the dry run counts for the process before pruning begins."""
    memory = _planned(alone, out)["memory"]
    assert isinstance(memory, dict)
    (held,) = (term["bytes"] for term in memory["host"] if term["name"] == BEFORE)
    return int(held)


def begun_with(alone: Undisturbed, out: Path) -> int:
    """Return the peak memory of a control group in a dry run, which begins as the command does.

    Most of it are copies of pages that the process shares with its parent after the fork.
    """
    with group() as folder:
        command = alone.work.begin(
            alone.model, out, "--dry-run", before=partial(join, folder, sys.maxsize)
        )
        _waited(command)
        return next(int((folder / name).read_text()) for name in _PEAK if (folder / name).exists())


def limited(
    alone: Undisturbed, out: Path, by: str, share: float, needed: int, begun: int = 0
) -> Limited:
    """Run a command with a share of the memory that it needs.

    Args:
        alone: the command.
        out: folder for the bundle.
        by: "RLIMIT_AS" or "control group".
        share: the limit, relative to `needed`.
        needed: bytes that the command needs beyond what its process begins with.
        begun: bytes that the process begins with, which a control group has to allow as well.
    """
    alone.copy(out)
    allowed = int(share * needed)
    if by == "RLIMIT_AS":
        command = alone.work.begin(alone.model, out, before=partial(limit_addresses, allowed))
        errors = _waited(command)
    else:
        with group() as folder:
            before = partial(join, folder, begun + allowed)
            command = alone.work.begin(alone.model, out, before=before)
            errors = _waited(command)
    return Limited(alone.work.name, by, share, command.returncode, _fault(alone, out, command,
                   errors.decode(errors="replace")))  # fmt: skip


def _waited(command: Command) -> bytes:
    """Return the command's standard error; after ten minutes kill it, which counts as a fault."""
    timer = threading.Timer(_MOST_SECONDS, command.kill)
    timer.start()
    _, errors = command.communicate()
    timer.cancel()
    return errors


def _fault(alone: Undisturbed, out: Path, command: Command, said: str) -> str:
    if command.returncode == 0:
        return alone.fault_in(out)
    if command.returncode != 5:
        return f"exit code {command.returncode}: {said[-1000:]}"
    if "Traceback" in said:
        return f"a traceback: {said[-1000:]}"
    return "" if "are needed" in said else f"no number: {said[-500:]}"


def limit_addresses(allowed: int) -> None:
    """Limit the address space of this process to its present size plus some bytes."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + allowed, taken + allowed))


@contextmanager
def group() -> Iterator[Path]:
    """Make an empty control group, and remove it once its processes have ended."""
    root = _root()
    assert root
    folder = root / f"thanos-deploy-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        for _ in range(100):
            with suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def join(folder: Path, allowed: int) -> None:
    """Move this process into a control group, and limit the memory of that group.

    Memory that the process has already stays charged to its former group.
    """
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    for name in _LIMIT:
        if (folder / name).exists():
            (folder / name).write_text(str(allowed))


PART = Part(
    "memory",
    "With too little memory, a command ends with exit code 5 and says how much it needs; the dry "
    "run predicts that amount.",
    run,
)
