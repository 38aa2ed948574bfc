"""benchmarks.reliability: damaged files and power cuts, each on things that go wrong on purpose."""

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reliability import mutations
from benchmarks.reliability.damage import Form, damaged
from benchmarks.reliability.disk_log import Log, record, torn
from benchmarks.reliability.mutations import Ended, batch
from benchmarks.reliability.part import Setting
from benchmarks.reliability.victims import KINDS, Victim
from tests.commands import FORKS
from thanos_deploy.errors import InputError

WHOLE: dict[Form, bytes] = {
    "bytes": bytes(range(256)),
    "json": b'{"a": [1, "b", {"c": null}], "d": true}',
    "lines": b'{"a": 1}\n{"b": [2]}\n',
    "safetensors": b'\x0a\0\0\0\0\0\0\0{"a": [1]}rest',
    "template": b"{% for m in messages %}{{ m }}{% endfor %}",
    "text": b"some words here",
}


@given(st.sampled_from(sorted(WHOLE)), st.integers(min_value=0))
def test_damage_is_drawn_from_its_seed_alone(form: Form, seed: int) -> None:
    one, other = (damaged(WHOLE[form], form, random.Random(seed), is_file=True) for _ in range(2))
    assert one == other
    assert (one.content is None) == bool(one.link)
    assert len(one.content or b"") < 1 << 24


def own(tmp_path: Path, open_: Callable[[bytes], object], *, always: bool = False) -> list[Ended]:
    """What becomes of two damages of a file that is read in some way."""
    folder = tmp_path / "kind" / "inside"
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / "kind" / "outside").mkdir(exist_ok=True)
    (tmp_path / "kind" / "outside" / "model.safetensors").write_text("bait")
    victim = Victim(b"content", "bytes", open_, always=always)
    return list(batch(0, "kind", [victim], range(2), folder))


def refuse(content: bytes) -> None:
    raise InputError("damaged", fix="mend it")


def end_here(content: bytes) -> None:
    os.kill(os.getpid(), 11)


@pytest.mark.parametrize(
    ("open_", "always", "said"),
    [
        (refuse, False, "detected"),
        (len, False, "harmless"),
        (len, True, "accepted"),
        (lambda content: int(content), False, "ValueError"),
        (end_here, False, "its process ended by signal 11"),
        (lambda content: bytearray(4 << 30), False, "MemoryError"),
        (lambda content: time.sleep(9), False, "took more than 2 s"),
        (lambda content: Path("../thing").write_text(""), False, "touched ['write "),
        (lambda content: os.mkdir("../thing"), False, "touched ['os.mkdir "),
        (lambda content: os.system("true"), False, "os.system"),
    ],
    ids=["detected", "harmless", "accepted", "raises", "crashes", "large", "long", "writes",
         "makes", "runs"],
)  # fmt: skip
def test_what_goes_wrong_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_: Callable[[bytes], object],
    always: bool,
    said: str,
) -> None:
    monkeypatch.setattr(mutations, "_SILENT_SECONDS", 2.0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ended = own(tmp_path, open_, always=always)
    assert [one.number for one in ended] == [0, 1]
    for one in ended[:1]:
        if one.how == "fault":
            assert said in one.said
        else:
            assert one.how == said


def test_a_bait_may_not_even_be_read(tmp_path: Path) -> None:
    bait = tmp_path / "kind" / "outside" / "model.safetensors"
    ended = own(tmp_path, lambda content: bait.read_bytes())
    assert all("touched ['read " in one.said for one in ended)


@pytest.mark.parametrize(
    "kind",
    [pytest.param("config", marks=pytest.mark.slow), "journal", "packed", "safetensors", "texts"],
)
def test_damage_is_detected_or_harmless(tmp_path: Path, kind: str) -> None:
    """As many of each as there is time for here; the campaign does thousands."""
    these = mutations.victims(tmp_path, kind)
    ended = batch(1, kind, these, range(40), mutations._own(tmp_path, kind))
    assert [one for one in ended if one.how == "fault"] == []


def test_of_each_kind_as_many_files_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(seed: int, kind: str, these: object, numbers: range, own: Path) -> Iterator[Ended]:
        return (Ended(number, "detected") for number in numbers)

    monkeypatch.setattr("benchmarks.reliability.victims.KINDS", {"slow": None, "quick": None})
    monkeypatch.setattr(mutations, "GOAL", 3 * 2 * mutations.BATCH)
    monkeypatch.setattr(mutations, "victims", lambda *_: [])
    monkeypatch.setattr(mutations, "batch", ended)
    done = {"damaged files: quick": 2.0 * mutations.BATCH}
    setting = Setting(lambda: tmp_path, tmp_path, 60.0, 0, done)
    found = [one.figures[-1] for one in mutations.run(setting)]
    assert {figure.least for figure in found} == {3 * mutations.BATCH}
    names = [figure.name.removeprefix("damaged files: ") for figure in found]
    assert names == ["slow", "slow", "slow", "quick"]


def test_every_kind_of_input_is_damaged() -> None:
    assert {"GGUF", "ONNX", "tokenizer", "manifest", "chat template", "bundle"} <= set(KINDS)


def write(folder: Path, log: Path) -> None:
    """Two files, of which one is flushed before it gets its name."""
    fsync = os.fsync
    record(folder, log)
    (folder / "loose").write_bytes(b"loose" * 2000)
    for name, content in (("kept", b"old" * 2000), ("kept", b"new" * 2000)):
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        for path in (partial, folder):
            if path == folder:
                partial.rename(folder / name)
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    (folder / "last").mkdir()
    assert os.fsync is not fsync


@pytest.mark.slow
def test_a_power_cut_leaves_what_was_flushed_and_no_more_than_was_written(tmp_path: Path) -> None:
    folder, kept = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    kept.mkdir()
    process = FORKS.Process(target=write, args=(folder, kept))
    process.start()
    process.join()
    assert process.exitcode == 0
    log = Log.read(kept)
    assert [moment.call for moment in log.moments] == [
        *("begin", "fsync", "rename", "fsync", "fsync", "rename", "fsync", "mkdir")
    ]
    draw, found = random.Random(0), set()
    for number in range(200):
        out = tmp_path / f"cut-{number}"
        at = number % len(log.moments)
        log.cut(at, draw, out)
        there = {path.name: path.read_bytes() for path in out.iterdir()}
        if "kept" in there:
            assert there["kept"] in (b"old" * 2000, b"new" * 2000)
            assert at >= 3
        else:
            assert at <= 3
        if at == 7:
            assert there["kept"] == b"new" * 2000
        if "loose" in there:
            found.add(len(there["loose"].strip(b"\0")))
    assert {0, 10_000} < found


@given(st.binary(max_size=20_000), st.binary(max_size=20_000), st.integers())
def test_what_is_torn_is_of_both(old: bytes, new: bytes, seed: int) -> None:
    found = torn(old, new, random.Random(seed))
    assert len(found) <= max(len(old), len(new))
    assert not found or found[0] in (0, *old[:1], *new[:1])
