"""Damage files of every kind: each damage is detected or harmless, and no other file is touched.

The files (`victims`) are made once. Then children are forked. Each child damages one kind of file
up to 200 times (`damage`) and reads it, with 2 GB of memory beyond what it begins with. The parent
kills a child that takes far longer than allowed for one file. If a child ends early, the next child
continues with the file after. Traps (`traps`) report accesses to other files.

Kind, number and seed determine the damage, so that any of them can be repeated in this process:
python -m benchmarks.reliability.mutations KIND NUMBER [--seed S]
"""

import argparse
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from benchmarks.reliability import damage
from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.traps import Traps
from benchmarks.reliability.works import settle
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.machine import environment

if TYPE_CHECKING:
    from benchmarks.reliability.victims import Victim

GOAL = 20_000
MOST_SECONDS = 30.0  # of processor time for one file
_SILENT_SECONDS = 120.0  # wall-clock time until a silent child is killed; the machine may be busy
MOST_GIGABYTES = 2.0
BATCH = 200  # damaged files of one kind before the next kind's turn

_MUTATIONS = "damaged files"
_READY, _FORKED_SECONDS = b"ready", 120.0


@dataclass(frozen=True, slots=True)
class Ended:
    """Outcome of reading one damaged file.

    Attributes:
        number: number of the damage.
        how: "detected", "harmless" or "fault".
        said: description of a fault.
        seconds: processor time of the read.
        gigabytes: growth of the child's memory up to its peak so far.
    """

    number: int
    how: str
    said: str = ""
    seconds: float = 0.0
    gigabytes: float = 0.0


def run(setting: Setting) -> Iterator[Slice]:
    """Damage files until every kind has enough or the time is over; the rarest kind is next."""
    from benchmarks.reliability.victims import KINDS

    made = {kind: victims(setting.folder, kind) for kind in KINDS}
    end, least = time.monotonic() + setting.seconds, -(-GOAL // len(KINDS))
    done = {kind: setting.so_far(_of(kind)) for kind in KINDS}
    while time.monotonic() < end and min(done.values()) < least:
        kind = min(done, key=lambda one: done[one])
        numbers = range(done[kind], done[kind] + BATCH)
        ended = list(batch(setting.seed, kind, made[kind], numbers, _own(setting.folder, kind)))
        done[kind] += len(ended)
        yield _found(kind, ended, least)


def _own(folder: Path, kind: str) -> Path:
    """Return the folder that readers of a kind may change."""
    return folder / kind / "inside"


def victims(folder: Path, kind: str) -> "list[Victim]":
    """Make the victims of a kind, with bait folders beside theirs."""
    from benchmarks.reliability.victims import KINDS

    own = _own(folder, kind)
    own.mkdir(parents=True)
    made = list(KINDS[kind](own))
    for bait in _baits(own):
        bait.mkdir(exist_ok=True)
        (bait / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return made


def _baits(own: Path) -> tuple[Path, ...]:
    return own / damage.OUTSIDE, own.parent / damage.OUTSIDE


def _of(kind: str) -> str:
    return f"damaged files: {kind}"


def _found(kind: str, ended: Sequence[Ended], least: int) -> Slice:
    faults = [f"{kind} {one.number}: {one.said}" for one in ended if one.how == "fault"]
    return Slice(
        [
            Figure(_MUTATIONS, len(ended), least=GOAL),
            Figure("detected", sum(one.how == "detected" for one in ended)),
            Figure("harmless", sum(one.how == "harmless" for one in ended)),
            Figure(
                "failures: accepted, crashed, too slow, too large, or touched another file",
                len(faults),
                most=0,
            ),
            Figure(
                "longest read, processor seconds",
                max((one.seconds for one in ended), default=0.0),
                most=MOST_SECONDS,
                joined="most",
            ),
            Figure(
                "largest memory, GB",
                max((one.gigabytes for one in ended), default=0.0),
                most=MOST_GIGABYTES,
                joined="most",
            ),
            Figure(_of(kind), len(ended), least=least),
        ],
        faults[:5],
    )


def batch(
    seed: int, kind: str, these: "Sequence[Victim]", numbers: range, own: Path
) -> Iterator[Ended]:
    """Damage files of one kind, by their numbers, in as many children as needed."""
    while numbers:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _child(seed, kind, these, numbers, own, writing)
        os.close(writing)
        last, why = numbers.start - 1, ""
        with os.fdopen(reading, "rb", buffering=0) as told:
            for line in _lines(told):
                if not line:
                    why = f"took more than {_SILENT_SECONDS:g} s"
                    break
                ended = decode(Ended, json.loads(line))
                last = ended.number
                yield ended
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if last < numbers.stop - 1:
            last += 1
            code = os.waitstatus_to_exitcode(status)
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            yield Ended(last, "fault", why or f"its process ended {how}")
        numbers = range(last + 1, numbers.stop)


def _lines(told: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines that a child writes, and an empty line if it is silent for too long."""
    rest, seconds = b"", _FORKED_SECONDS
    while True:
        ready, _, _ = select.select([told], [], [], seconds)
        if not ready:
            yield b""
            return
        part = os.read(told.fileno(), 1 << 16)
        if not part:
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from (line for line in lines if line != _READY)
        seconds = _SILENT_SECONDS


def _child(
    seed: int, kind: str, these: "Sequence[Victim]", numbers: range, own: Path, writing: int
) -> None:
    """Damage and read the files in a child process; never return."""
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        traps = Traps(own, [*_baits(own), Path("/etc/passwd")])
        begun = environment.resident_memory_bytes() or 0
        _limit_memory()
        os.write(writing, _READY + b"\n")
        for number in numbers:
            ended = one(seed, kind, these, number, traps)
            grown = (environment.peak_memory_bytes() - begun) / 1e9
            said = Ended(number, ended.how, ended.said, ended.seconds, max(0.0, round(grown, 3)))
            os.write(writing, json.dumps(encode(said)).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = taken + int(MOST_GIGABYTES * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def one(
    seed: int, kind: str, these: "Sequence[Victim]", number: int, traps: Traps | None = None
) -> Ended:
    """Damage a file, read it, and restore it."""
    draw = random.Random(f"{seed} {kind} {number}")
    victim = draw.choice(these)
    is_file = victim.path is not None
    done = damage.damaged(victim.content, victim.form, draw, is_file=is_file)
    while done.content == victim.content:
        done = damage.damaged(victim.content, victim.form, draw, is_file=is_file)
    _switch(traps, on=False)
    if victim.path is not None:
        damage.place(done, victim.path)
    name = victim.path.name if victim.path is not None else victim.form
    begin, how, said = time.process_time(), "harmless", ""
    _switch(traps, on=True)
    try:
        victim.open(done.content or b"")
        if victim.always or (done.leads_out and (done.content is None or victim.names)):
            how, said = "fault", "accepted"
    except victim.refuses:
        how = "detected"
    except AssertionError:
        how, said = "fault", "accepted as something else"
    except BaseException as error:
        how, said = "fault", _said(error)
    seconds = time.process_time() - begin
    if seconds > MOST_SECONDS:
        how, said = "fault", f"took {seconds:.0f} s"
    _switch(traps, on=False)
    if traps is not None and (touched := traps.taken()):
        how, said = "fault", f"{said} touched {touched[:3]}"
    if victim.path is not None:
        victim.path.unlink(missing_ok=True)
        victim.path.parent.mkdir(parents=True, exist_ok=True)
        victim.path.write_bytes(victim.content)
    where = f" ({done.kind} in {name})" if said else ""
    return Ended(number, how, said + where, round(seconds, 3))


def _switch(traps: Traps | None, *, on: bool) -> None:
    if traps is not None:
        traps.switch(on=on)


def _said(error: BaseException) -> str:
    """Describe an unexpected exception, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [frame for frame in frames if "thanos_deploy" in frame.filename] or frames
    at = f"{Path(where[-1].filename).name}:{where[-1].lineno}"
    return f"{type(error).__name__} at {at}: {str(error)[:120]}"


def main() -> None:
    """Repeat one damage in this process, and print the whole traceback of a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind")
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settle(Path(folder))
        these = victims(Path(folder), given.kind)
        for victim in these:
            victim.open(victim.content)
        globals()["_said"] = lambda error: "".join(traceback.format_exception(error))
        print(one(given.seed, given.kind, these, given.number).said or "no fault", file=sys.stderr)


PART = Part(
    "mutations",
    "Damage to any file that is read is detected or harmless, within 30 s and 2 GB, and no other "
    "file is touched.",
    run,
)

if __name__ == "__main__":
    main()
