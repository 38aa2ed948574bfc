"""benchmarks.reliability: a short run of what is done to commands.

Each test starts a few commands, which is what these parts do.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.reliability import disk_full, kills, memory, power_cuts, two_processes
from benchmarks.reliability.part import Setting
from benchmarks.reliability.undisturbed import Undisturbed, undisturbed
from benchmarks.reliability.works import WORKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The quickest command, and what it makes when it is left alone."""
    folder = tmp_path_factory.mktemp("alone")
    setting = Setting(lambda: folder, folder, 0.0, 0)
    (found,) = undisturbed([work for work in WORKS if work.name == "prune-fast"], setting)
    return found


def test_a_command_that_is_killed_goes_on(alone: Undisturbed, tmp_path: Path) -> None:
    assert kills.kill(alone, tmp_path / "out", random.Random(1)).fault == ""


def test_a_command_that_fails_before_it_is_killed_is_a_fault(
    alone: Undisturbed, tmp_path: Path
) -> None:
    work = replace(alone.work, arguments=("prune", "{model}", "--pattern", "none", "-o", "{out}"))
    alone = replace(alone, work=work, seconds=1e6)  # it is never killed
    one = kills.kill(alone, tmp_path / "out", random.Random(1))
    assert one.fault.startswith("exit code 2 before it was killed: ")


def test_a_command_goes_on_after_a_power_cut(alone: Undisturbed, tmp_path: Path) -> None:
    log = power_cuts.recorded(alone, tmp_path / "log", tmp_path / "out")
    # Blocks of the journal, and the stage itself.
    assert [moment.call for moment in log.moments].count("fsync") > 10
    draw = random.Random(0)
    for call in (len(log.moments) // 2, len(log.moments) - 3):
        one = power_cuts.restart(alone, log, call, draw, tmp_path / "cut")
        assert one.fault == ""


@pytest.mark.parametrize("kind", two_processes.KINDS, ids=lambda kind: kind[0])
def test_of_two_processes_one_finishes(
    alone: Undisturbed, tmp_path: Path, kind: two_processes.Kind
) -> None:
    one = two_processes.both(alone, tmp_path / "out", kind, random.Random(0))
    assert one.fault == ""
    assert one.seconds < 5  # while other tests run


@pytest.mark.parametrize("share", [100.0, 0.0])
def test_with_too_little_memory_a_command_says_how_much_is_needed(
    alone: Undisturbed, tmp_path: Path, share: float
) -> None:
    # The model is so small that a hundred times what it needs is no more than what libraries take.
    needed, _ = memory.compared(alone, tmp_path / "out")
    needed -= memory.held_before(alone, tmp_path / "out")
    one = memory.limited(alone, tmp_path / "out", "RLIMIT_AS", share * 100, needed)
    assert one.fault == ""
    assert one.code == (0 if share else 5)


def test_a_command_ends_where_the_disk_is_full(alone: Undisturbed, tmp_path: Path) -> None:
    if not disk_full._can_mount():
        pytest.skip("nobody but root may mount a disk")
    one = disk_full.fill(alone, tmp_path / "disk", 3 * disk_full.PAGE)
    assert one.fault == ""
    assert not one.enough
