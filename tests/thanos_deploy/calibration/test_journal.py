"""A killed run goes on where it was, and its result is the one of a run that was left alone.

The tests share the walks that they kill, so they are in one long file.
"""

import errno
import json
import logging
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import FORKS
from tests.conftest import Invoke, MakeModel
from tests.recipes import plain
from thanos_deploy.bundle import manifest
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.visit import Visit
from thanos_deploy.calibration.walk import visit_blocks
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import parse
from thanos_deploy.progress import OnProgress
from thanos_deploy.pruning import layers as walk
from thanos_deploy.pruning.owl import Outliers
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.stages import prune as stage
from thanos_deploy.stages import prune_work
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest

pytestmark = pytest.mark.slow

BLOCKS = 5


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("llama", num_hidden_layers=BLOCKS)


class Stop(Exception):  # noqa: N818 - it is thrown where a test wants a run to end
    pass


# Pattern, and what else is asked for; what each walks before it prunes has a journal of its own.
HOW: dict[str, dict[str, Any]] = {
    "2:4": {"tune_steps": 6, "tune_nsamples": 12},
    "structured:0.2": {"tune_steps": 6, "tune_nsamples": 12},
    "unstructured:0.5": {"allocation": "owl"},
}


def prune(
    model: Path, out: Path, on_progress: OnProgress, pattern: str = "2:4", seed: int = 0
) -> None:
    dense = Dense(str(model))
    with manifest.claim(out, dense.source) as bundle:
        request = PruneRequest.of(parse(pattern), nsamples=8, seqlen=64, seed=seed, **HOW[pattern])
        stage.prune(bundle, dense, request, announce=lambda _: on_progress)


def prune_until(
    model: Path, out: Path, when: Callable[[int], None], pattern: str = "2:4"
) -> list[int]:
    """The progress of a run, which calls `when` with every step of it."""
    steps: list[int] = []

    def on_progress(done: int, _: int) -> None:
        steps.append(done)
        when(done)

    prune(model, out, on_progress, pattern)
    return steps


def go_on(done: int) -> None:
    pass


def stop_at(step: int) -> Callable[[int], None]:
    def when(done: int) -> None:
        if done == step:
            raise Stop

    return when


def result(out: Path) -> tuple[dict[str, bytes], list[Any]]:
    """The files of the model, and what layers.json says besides times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(one) for name, one in value.items() if name != "seconds"}
        return [timeless(one) for one in value] if isinstance(value, list) else value

    files = {path.name: path.read_bytes() for path in sorted((out / "model").iterdir())}
    return files, timeless(json.loads((out / "layers.json").read_text()))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    """The result of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune_until(model, out, go_on)
    return result(out)


@pytest.fixture(scope="module")
def stopped_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in the fourth block, so that three are finished. Not to be changed."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Stop):
        prune_until(model, out, stop_at(4))
    return out


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(stopped_run, tmp_path / "out"))


def log_progress(log: Path, model: Path, out: Path, pattern: str) -> None:
    torch.set_num_threads(1)

    def on_progress(done: int, total: int) -> None:
        with log.open("a") as file:
            file.write(f"{done}/{total} ")

    prune(model, out, on_progress, pattern)


@pytest.mark.parametrize("pattern", HOW)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, pattern: str
) -> None:
    log, moments = tmp_path / "log", random.Random(0)

    def run(out: str, *, kill: bool) -> tuple[int | None, list[tuple[int, int]]]:
        log.write_text("")
        child = FORKS.Process(target=log_progress, args=(log, model, tmp_path / out, pattern))
        child.start()
        if kill:
            steps, delay = moments.randint(1, 3), moments.uniform(0.0, 0.01)
            while len(log.read_text().split()) < steps and child.is_alive():
                time.sleep(0.001)
            time.sleep(delay)
            child.kill()
        child.join()
        steps_done = [step.partition("/") for step in log.read_text().split()]
        return child.exitcode, [(int(done), int(total)) for done, _, total in steps_done]

    assert run("whole", kill=False)[0] == 0
    kills, code, before = 0, *run("killed", kill=True)
    while code != 0:
        assert code == -signal.SIGKILL
        kills += 1
        code, now = run("killed", kill=kills < 6)
        # A step is told before its entry is written.
        if pattern == "2:4" and before and now:
            assert now[0][0] >= before[-1][0] - 1
        before = now or before
    assert kills
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".journal*"))


def test_at_most_one_block_is_done_again_and_the_reports_come_back(
    model: Path, stopped: Path, whole: tuple[dict[str, bytes], Any]
) -> None:
    kept = stopped / ".journal-prune" / "blocks"
    entry = json.loads((kept / "block-0001.json").read_text())["entry"]
    assert prune_until(model, stopped, go_on) == [3, 4, 5]
    assert result(stopped) == whole
    layers = json.loads((stopped / "layers.json").read_text())
    assert layers[1] == entry["report"]
    assert not (stopped / ".journal-prune").exists()


@pytest.mark.parametrize("pattern", ["structured:0.2", "unstructured:0.5"])
def test_finished_blocks_of_a_survey_are_not_surveyed_again(
    model: Path, tmp_path: Path, pattern: str
) -> None:
    whole = tmp_path / "whole"
    both = list(range(BLOCKS + 1))
    assert prune_until(model, whole, go_on, pattern) == both * 2
    out, before = tmp_path / "out", list[bytes]()
    for step in (2, 4, BLOCKS):
        with pytest.raises(Stop):
            prune_until(model, out, stop_at(step), pattern)
        kept = sorted((out / ".journal-prune" / "survey").glob("block-*.json"))
        entries = [path.read_bytes() for path in kept]
        assert len(entries) == step - 1  # a step is told before its entry is written
        assert entries[: len(before)] == before  # the times as well
        before = entries
    # The survey's last block again, then all that comes after it.
    assert prune_until(model, out, go_on, pattern) == [BLOCKS - 1, BLOCKS, *both]
    assert result(out) == result(whole)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change_report(path: Path) -> None:
    path.write_text(path.read_text().replace('"rows": 32', '"rows": 33', 1))


@pytest.mark.parametrize(
    ("name", "damage", "left"),
    [
        ("block-0002.safetensors", flip, 2),
        ("block-0002.safetensors", truncate, 2),
        ("block-0002.safetensors", Path.unlink, 2),
        ("block-0002.json", truncate, 2),
        ("block-0002.json", change_report, 2),
        ("inputs-0003-00.safetensors", flip, 2),
        ("inputs-0003-00.safetensors", truncate, 2),
        ("inputs-0003-00.safetensors", Path.unlink, 2),
        # What enters these blocks is not kept any more.
        ("block-0001.safetensors", flip, 0),
        ("block-0000.json", truncate, 0),
        ("block-0000.json", Path.unlink, 0),
        ("journal.json", truncate, 0),
    ],
)
def test_a_damaged_entry_is_found_and_done_again(
    model: Path,
    stopped: Path,
    whole: tuple[dict[str, bytes], Any],
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    left: int,
) -> None:
    damage(stopped / ".journal-prune" / "blocks" / name)
    assert prune_until(model, stopped, go_on)[0] == left
    assert "damaged" in caplog.text or "done again" in caplog.text
    assert result(stopped) == whole


def test_a_journal_of_other_options_is_discarded_with_a_message(
    model: Path, tmp_path: Path, whole: tuple[dict[str, bytes], Any], caplog: Any
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        prune(model, out, lambda done, _: stop_at(3)(done), seed=1)
    assert prune_until(model, out, go_on)[0] == 0
    assert "seed was 1 and is now 0" in caplog.text
    assert result(out) == whole


def test_a_journal_of_another_version_is_discarded(
    model: Path, stopped: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_work, "versions", lambda device: {"libraries": {"torch": "0"}})
    assert prune_until(model, stopped, go_on)[0] == 0
    assert "libraries was" in caplog.text


def test_a_disk_that_is_full_while_journaling_loses_no_finished_block(
    model: Path, tmp_path: Path, whole: tuple[dict[str, bytes], Any]
) -> None:
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int) -> None:
        if done == 3:
            inputs = out / ".journal-prune" / "blocks" / "inputs-0002-00.safetensors"
            # The dense model's half is written already.
            resource.setrlimit(resource.RLIMIT_FSIZE, (inputs.stat().st_size // 4, limits[1]))

    try:
        with pytest.raises(OSError, match=r"inputs-0003") as caught:
            prune_until(model, out, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert prune_until(model, out, go_on) == [2, 3, 4, 5]
    assert result(out) == whole


def test_a_full_disk_while_journaling_exits_5_and_the_rerun_succeeds(
    model: Path, tmp_path: Path, invoke: Invoke
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = ("prune", model, "--pattern", "2:4", "-o", tmp_path, "--nsamples", 64, "--seqlen", 64)
    size = (model / "model.safetensors").stat().st_size
    # Enough for the model, and not for a shard of the calibration data.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))
    try:
        code, _, errors = invoke(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 5
    assert "inputs-0000-00.safetensors" in errors
    assert invoke(*command)[0] == 0


def test_a_stage_that_was_finished_before_its_journal_was_removed_is_kept(
    model: Path, stopped: Path
) -> None:
    kept = shutil.copytree(stopped / ".journal-prune", stopped.parent / "kept")
    prune_until(model, stopped, go_on)
    kept.rename(stopped / ".journal-prune")
    assert prune_until(model, stopped, go_on) == []
    assert not (stopped / ".journal-prune").exists()


def test_a_journal_of_all_blocks_leaves_nothing_to_do(model: Path, tmp_path: Path) -> None:
    segments = torch.arange(240).reshape(4, 60)
    written = []
    for name in ("one", "two"):
        steps: list[int] = []
        (tmp_path / name).mkdir()
        walk.prune(
            Checkpoint.open(model),
            segments,
            tmp_path / name,
            plain(parse("2:4"), "wanda"),
            journal=Journal(tmp_path / "journal", {}, PrunedBlock),
            on_progress=lambda done, _, steps=steps: steps.append(done),  # type: ignore[misc]
        )
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert steps == [BLOCKS]
    assert written[0] == written[1]


def test_every_report_is_kept_with_its_block_and_none_is_asked_for_twice(
    model: Path, tmp_path: Path
) -> None:
    checkpoint, segments = Checkpoint.open(model), torch.arange(240).reshape(4, 60)
    kept: list[list[Outliers]] = []
    stop_in = 2

    def look(visit: Visit) -> Outliers:
        journal.finish()
        kept.append(Journal(tmp_path / "journal", {}, Outliers).reports)
        if visit.index == stop_in:
            raise Stop
        return Outliers(float(visit.index), visit.clock.seconds)

    journal = Journal(tmp_path / "journal", {}, Outliers)
    with pytest.raises(Stop):
        visit_blocks(checkpoint, segments, look, journal=journal)
    stop_in = BLOCKS
    journal = Journal(tmp_path / "journal", {}, Outliers)
    reports = visit_blocks(checkpoint, segments, look, journal=journal)
    assert [one.ratio for one in reports] == list(range(BLOCKS))
    assert journal.reports == reports
    assert [len(one) for one in kept] == [0, 1, 2, 2, 3, 4]


def test_entries_are_written_beside_the_work_and_before_what_they_stand_for_is_removed(
    model: Path, tmp_path: Path
) -> None:
    beside: list[bool] = []
    begun_with: list[bool] = []

    class Slow(Journal[Outliers]):
        def _write(self, index: int, *files: Any) -> None:
            until = time.monotonic() + 30
            while len(beside) < min(index + 2, BLOCKS) and time.monotonic() < until:
                time.sleep(0.001)  # until the next block is worked on
            super()._write(index, *files)
            begun_with.append((self.folder / f"inputs-{index:04d}-00.safetensors").exists())

    def look(visit: Visit) -> Outliers:
        beside.append(not (journal.folder / f"block-{visit.index - 1:04d}.json").exists())
        return Outliers(0.0, visit.clock.seconds)

    checkpoint, segments = Checkpoint.open(model), torch.arange(240).reshape(4, 60)
    journal = Slow(tmp_path / "journal", {}, Outliers)
    visit_blocks(checkpoint, segments, look, journal=journal)
    assert beside == [True] * BLOCKS
    assert begun_with == [True] * BLOCKS
    assert len(list(journal.folder.glob("block-*.json"))) == BLOCKS


def test_an_entry_that_could_not_be_written_ends_the_walk(model: Path, tmp_path: Path) -> None:
    class Full(Journal[Outliers]):
        def _write(self, index: int, *files: Any) -> None:
            if index == 2:
                raise OSError(errno.ENOSPC, "No space left on device", "block-0002.json")
            super()._write(index, *files)

    def look(visit: Visit) -> Outliers:
        return Outliers(0.0, visit.clock.seconds)

    checkpoint, segments = Checkpoint.open(model), torch.arange(240).reshape(4, 60)
    with pytest.raises(OSError, match=r"block-0002"):
        visit_blocks(checkpoint, segments, look, journal=Full(tmp_path / "journal", {}, Outliers))
    again = Journal(tmp_path / "journal", {}, Outliers)
    assert len(again.reports) == 2
    assert len(visit_blocks(checkpoint, segments, look, journal=again)) == BLOCKS


def test_an_empty_journal_says_nothing(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    assert Journal(tmp_path / "new", {"seed": 0}, PrunedBlock).reports == []
    assert Journal(tmp_path / "new", {"seed": 0}, PrunedBlock).reports == []
    assert not caplog.text
