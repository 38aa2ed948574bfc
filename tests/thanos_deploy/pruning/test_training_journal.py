"""A training that was ended goes on from its journal, to the same bytes."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import thanos_deploy as td
from tests.thanos_deploy.pruning.test_recover import SEGMENTS, TOKENS_A_STEP, two_four
from tests.thanos_deploy.pruning.test_train_scales import quantised
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning import training_journal
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.recover import recover
from thanos_deploy.pruning.result import Recovery
from thanos_deploy.pruning.train_scales import train_scales
from thanos_deploy.pruning.training_journal import TrainingJournal

pytestmark = pytest.mark.slow

STEPS, ENDED = 12, 7
COUNT = STEPS * (TOKENS_A_STEP // SEGMENTS.shape[1])
OWNER = {"seed": 0}

# Trains into a folder.
Train = Callable[[Path, TrainingJournal | None, OnProgress], Recovery]


class EndedError(Exception):
    """As if it were killed."""


@pytest.fixture(autouse=True)
def _a_state_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos_deploy.pruning.recover._TOKENS_A_STEP", TOKENS_A_STEP)
    monkeypatch.setattr(training_journal, "_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(training_journal, "_EVERY_WRITES", 0)


@pytest.fixture(params=["weights", "updates", "scales"])
def train(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Train:
    """Everything that can learn."""
    dense = Checkpoint.open(tiny_llama)
    if request.param == "scales":
        model, codes = quantised(tiny_llama, tmp_path / "quantised", "int4:16")

        def of_scales(out: Path, journal: TrainingJournal | None, told: OnProgress) -> Recovery:
            return scales(model, codes, dense, out, journal, told)

        return of_scales
    pruned = two_four(tiny_llama, tmp_path / "pruned")
    rank = 3 if request.param == "updates" else 0

    def of_weights(out: Path, journal: TrainingJournal | None, told: OnProgress) -> Recovery:
        out.mkdir()
        return recover(
            pruned,
            dense,
            SEGMENTS,
            out,
            count=COUNT,
            update_rank=rank,
            journal=journal,
            on_progress=told,
        )

    return of_weights


def scales(
    model: Checkpoint,
    codes: Codes,
    dense: Checkpoint,
    out: Path,
    journal: TrainingJournal | None,
    told: OnProgress,
) -> Recovery:
    for name in ("model", "codes"):
        (out / name).mkdir(parents=True)
    return train_scales(
        model,
        codes,
        dense,
        SEGMENTS,
        out / "model",
        out / "codes",
        count=COUNT,
        journal=journal,
        on_progress=told,
    )


def journal_in(folder: Path, owner: dict[str, int] = OWNER, room: int = 0) -> TrainingJournal:
    return TrainingJournal(folder, dict(owner), room=room)


def end(train: Train, tmp_path: Path) -> None:
    """Train until a step after the last state."""

    def told(done: int, steps: int) -> None:
        assert steps == STEPS
        if done == ENDED + 1:
            raise EndedError

    with pytest.raises(EndedError):
        train(tmp_path / "ended", journal_in(tmp_path / "journal"), told)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def steps_of(
    train: Train, tmp_path: Path, owner: dict[str, int] = OWNER
) -> tuple[list[int], Recovery]:
    """Train as the ended training should have; the steps that were taken."""
    seen: list[int] = []
    done = train(
        tmp_path / "again",
        journal_in(tmp_path / "journal", owner),
        lambda step, _: seen.append(step),
    )
    whole = train(tmp_path / "whole", None, silent)
    assert bytes_in(tmp_path / "again") == bytes_in(tmp_path / "whole") != {}
    assert done.divergence == whole.divergence
    assert done.tokens == whole.tokens
    return seen, done


def test_it_goes_on_to_the_same_bytes(train: Train, tmp_path: Path) -> None:
    end(train, tmp_path)
    earlier = journal_in(tmp_path / "journal").reached
    assert (earlier.step, len(earlier.nats)) == (ENDED, ENDED)
    assert {path.name for path in (tmp_path / "journal").iterdir()} == {
        *("journal.json", "state.json", f"step-{ENDED:06d}.safetensors")
    }
    seen, done = steps_of(train, tmp_path)
    assert seen == list(range(ENDED, STEPS + 1))
    assert done.seconds > earlier.seconds > 0


@pytest.mark.parametrize("train", ["weights"], indirect=True)
@pytest.mark.parametrize("what", ["tensors", "record", "missing", "owner"])
def test_what_is_damaged_or_of_another_run_is_not_gone_on_with(
    train: Train, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    end(train, tmp_path)
    caplog.set_level(logging.WARNING)
    state, tensors = (
        tmp_path / "journal" / name for name in ("state.json", f"step-{ENDED:06d}.safetensors")
    )
    match what:
        case "tensors":
            content = bytearray(tensors.read_bytes())
            content[-5] ^= 1
            tensors.write_bytes(content)
        case "record":
            state.write_text(state.read_text().replace(f'"step": {ENDED}', '"step": 3'))
        case "missing":
            tensors.unlink()
    seen, _ = steps_of(train, tmp_path, {"seed": 1} if what == "owner" else OWNER)
    assert seen == list(range(STEPS + 1))
    assert "starts over" in caplog.text


@pytest.mark.parametrize("train", ["updates"], indirect=True)
def test_a_disk_without_room_is_said_and_ends_nothing(
    train: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = shutil.disk_usage(tmp_path).free
    journal = journal_in(tmp_path / "journal", room=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    train(tmp_path / "one", journal, silent)
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["journal.json"]
    assert caplog.text.count("if this run is ended, the training goes on from step 0") == 1


def test_a_state_waits_for_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(training_journal, "_EVERY_SECONDS", 300.0)
    monkeypatch.setattr(training_journal, "_EVERY_WRITES", 20)
    journal = journal_in(tmp_path / "journal")
    clock = 299.0
    assert not journal.is_due()
    clock = 300.0
    assert journal.is_due()
    journal._since, journal._wrote = clock, 60.0  # a write of a minute
    clock += 20 * 60 - 1
    assert not journal.is_due()
    clock += 1
    assert journal.is_due()


def test_a_command_goes_on_with_the_text_and_the_training(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "signs.txt"
    text.write_text("#$%&*+/<=>@" * 200)  # a random model writes nothing else
    titles: list[str] = []

    def prune(name: str, progress: td.Progress | None = None) -> dict[str, bytes]:
        bundle = td.prune(
            tiny_llama,
            pattern="2:4",
            preset="fast",
            calib=text,
            nsamples=4,
            seqlen=40,
            recover=4 * (TOKENS_A_STEP // 40),
            recover_text="own",
            quantize="int8",
            out=tmp_path / name,
            progress=progress,
        )
        return bytes_in(bundle.path)

    def until(title: str) -> td.Progress:
        def progress(said: str, done: int, steps: int) -> None:
            titles.append(said)
            if said.startswith(title) and (done, steps) == (3, 4):
                raise EndedError

        return progress

    with pytest.raises(EndedError):
        prune("out", until("Train the remaining weights"))
    assert any(title.startswith("Generate") for title in titles)
    titles.clear()
    with pytest.raises(EndedError):
        prune("out", until("Train the scales"))
    assert sum(title.startswith("Train the remaining") for title in titles) == 3  # 2, 3, 4 of 4
    assert not any(title.startswith("Generate") for title in titles)
    assert prune("out") == prune("whole")
    assert not (tmp_path / "out" / ".journal-prune").exists()
