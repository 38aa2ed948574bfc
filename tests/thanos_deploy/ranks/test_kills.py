"""A rank that is killed ends all, is named, and the same command resumes to the same bytes."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import write_model
from tests.ranks import RunningRanks, command, write_text

# How long a rank may take to notice, and a run of a small model on a busy machine.
LIMIT, PATIENCE = 60.0, 240.0

OPTIONS = (
    *("--pattern", "2:4", "--nsamples", "9", "--seqlen", "64", "--device", "cpu"),
    *("--tune-steps", "5", "--tune-nsamples", "22", "--recover", "40", "--quantize", "int8"),
)


def start(model: Path, out: Path, ranks: int, errors: Path) -> RunningRanks:
    text = ("--calib", str(model.parent / "text.txt"))
    return RunningRanks(
        ranks, command, "prune", str(model), "-o", str(out), *OPTIONS, *text, errors=errors
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_text(folder / "text.txt")
    write_model(folder / "model", "llama", num_hidden_layers=3)
    return folder / "model"


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    """The weights that a run by itself makes, and the seconds that it works."""
    out = tmp_path_factory.mktemp("whole")
    running = start(model, out / "out", 1, out / "errors")
    begun = wait_for_work(running, out / "out")
    assert running.wait(PATIENCE) == [0]
    return weights_in(out / "out"), time.monotonic() - begun


def weights_in(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def wait_for_work(running: RunningRanks, out: Path) -> float:
    """Wait until the ranks have met and work; the time."""
    until = time.monotonic() + PATIENCE
    while not (out / ".journal-prune" / "blocks").exists():
        assert time.monotonic() < until
        if running.processes[0].exitcode is not None:
            break
        time.sleep(0.01)
    return time.monotonic()


def kill_one(model: Path, folder: Path, whole: tuple[bytes, float], number: int) -> bool:
    """Kill a rank at some moment, and go on with another number of ranks; whether it hit one."""
    chance = random.Random(number)
    ranks, then = chance.sample((2, 3, 4), 1)[0], chance.sample((1, 2, 3), 1)[0]
    victim, moment = chance.randrange(ranks), chance.random()
    out, errors = folder / "out", folder / "errors"
    running = start(model, out, ranks, errors)
    wait_for_work(running, out)
    time.sleep(moment * whole[1])
    running.processes[victim].kill()
    killed = time.monotonic()
    codes = running.wait(LIMIT)
    assert time.monotonic() - killed < LIMIT, codes
    hit = codes[victim] == -signal.SIGKILL
    others = [code for rank, code in enumerate(codes) if rank != victim]
    if hit and any(others):  # else it was killed when all was done
        assert others == [5] * (ranks - 1), (codes, (errors / "0").read_text())
        said = "".join((errors / str(rank)).read_text() for rank in range(ranks))
        assert len(re.findall(rf"Error: rank {victim} \(process \d+\) of {ranks} ended", said)) == 1
        assert "Traceback" not in said
    running = start(model, out, then, errors)
    assert running.wait(PATIENCE) == [0] * then, (errors / "0").read_text()
    assert weights_in(out) == whole[0]
    shutil.rmtree(folder)
    return hit and any(others)


@pytest.mark.slow
def test_a_kill_at_any_moment_ends_all_ranks_and_loses_nothing(
    model: Path, tmp_path: Path, whole: tuple[bytes, float]
) -> None:
    hits = [kill_one(model, tmp_path / str(number), whole, number) for number in range(6)]
    assert sum(hits) >= 3


@pytest.mark.thorough
def test_forty_kills(model: Path, tmp_path: Path, whole: tuple[bytes, float]) -> None:
    hits = [kill_one(model, tmp_path / str(number), whole, number) for number in range(100, 140)]
    assert sum(hits) >= 20
