import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from thanos_deploy.bundle import files, manifest
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Nothing, Source, Stage
from thanos_deploy.errors import InputError, IntegrityError, PlatformError, UsageError

SOURCE = Source("folder", "model", "", "0" * 64)


def write(content: str):  # type: ignore[no-untyped-def]
    def produce(folder: Path) -> Json:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(content)
        (folder / "layers.json").write_text("[]")
        return {"length": len(content)}

    return produce


def never(folder: Path) -> Json:
    raise AssertionError("this stage was to be kept")


def run(bundle: Bundle, content: str = "abc", **changes: object) -> manifest.StageRecord:
    arguments = {"options": {"pattern": "2:4"}, "inputs": {"model": "x"}, **changes}
    return bundle.run("prune", write(content), **arguments)  # type: ignore[call-overload, no-any-return]


def test_a_finished_stage_is_on_disk_hashed_and_read_back(tmp_path: Path) -> None:
    with manifest.claim(tmp_path / "out", SOURCE) as bundle:
        record = run(bundle)
    reread = Bundle.open(tmp_path / "out")
    assert reread.stages == {"prune": record}
    assert record.result == {"length": 3}
    assert set(record.files) == {"layers.json", "model/weights"}
    reread.verify()


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
    with manifest.claim(tmp_path, SOURCE) as bundle:
        bundle.run("prune", never, options={"pattern": "2:4"}, inputs={"model": "x"})


def test_a_stage_with_changed_inputs_is_done_again(tmp_path: Path) -> None:
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
        run(bundle, "changed", inputs={"model": "y"})
    assert (tmp_path / "model" / "weights").read_text() == "changed"


def test_other_options_are_refused_with_both_values_named(tmp_path: Path) -> None:
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
        with pytest.raises(UsageError, match="pattern was '2:4' and is now '4:8'"):
            run(bundle, options={"pattern": "4:8"})
        assert (tmp_path / "model" / "weights").read_text() == "abc"
        run(bundle, "new", options={"pattern": "4:8"}, overwrite=True)
    assert (tmp_path / "model" / "weights").read_text() == "new"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_changed_file_is_an_integrity_error_and_can_be_made_again(
    tmp_path: Path, damage: str
) -> None:
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
        path = tmp_path / "model" / "weights"
        match damage:
            case "flip":
                path.write_text("abd")
            case "truncate":
                path.write_text("ab")
            case "delete":
                path.unlink()
        with pytest.raises(IntegrityError, match="weights"):
            run(bundle)
        run(bundle, overwrite=True)
        bundle.verify()


@pytest.mark.parametrize("name", ["model/more", "model/deep/more", "engines/a/more"])
def test_a_file_that_no_stage_wrote_is_refused_where_it_would_be_read(
    tmp_path: Path, name: str
) -> None:
    def produce(folder: Path) -> Json:
        for written in ("model/weights", "engines/a/model.engine", "bench/run.json", "card"):
            (folder / written).parent.mkdir(parents=True, exist_ok=True)
            (folder / written).write_text("written")
        return {}

    with manifest.claim(tmp_path, SOURCE) as bundle:
        bundle.run("prune", produce, options={}, inputs={})
        for beside in ("bench/interrupted.json", "notes", "engines/b/notes", "model/.DS_Store"):
            (tmp_path / beside).parent.mkdir(exist_ok=True)
            (tmp_path / beside).write_text("somebody's own")
        bundle.verify()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("unrecorded")
        assert bundle.unrecorded(name.rpartition("/")[0]) == [name]
        with pytest.raises(IntegrityError, match=f"{name}: no stage"):
            bundle.verify("prune")


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> Json:
        (folder / "half").write_text("written")
        raise RuntimeError("midway")

    with manifest.claim(tmp_path, SOURCE) as bundle:
        with pytest.raises(RuntimeError, match="midway"):
            bundle.run("prune", fail, options={}, inputs={})
        assert not bundle.stages
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("call", range(1, 20))
def test_whatever_step_a_run_dies_at_the_manifest_names_complete_stages_only(
    tmp_path: Path, call: int
) -> None:
    """Redo a stage in a child process that is killed at its n-th change of the file system."""
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle, "old")
    child = multiprocessing.get_context("fork").Process(target=_redo_and_die, args=(tmp_path, call))
    child.start()
    child.join()
    survivors = Bundle.open(tmp_path)
    survivors.verify()
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle, "new", options={"pattern": "4:8"}, overwrite=True)
        bundle.verify()
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert not list(tmp_path.glob(".partial*"))


def _redo_and_die(path: Path, call: int) -> None:
    left = call

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open"):
            left -= 1
            if left == 0:
                os._exit(9)

    import sys

    with manifest.claim(path, SOURCE) as bundle:
        sys.addaudithook(count)
        run(bundle, "new", options={"pattern": "4:8"}, overwrite=True)
    os._exit(0)


def test_a_bundle_can_be_moved(tmp_path: Path) -> None:
    with manifest.claim(tmp_path / "here", SOURCE) as bundle:
        run(bundle)
    shutil.move(tmp_path / "here", tmp_path / "there")
    Bundle.open(tmp_path / "there").verify()
    assert str(tmp_path) not in (tmp_path / "there" / "manifest.json").read_text()


def test_a_second_process_is_refused_at_once(tmp_path: Path) -> None:
    with (
        manifest.claim(tmp_path, SOURCE),
        pytest.raises(PlatformError, match="another process"),
        manifest.claim(tmp_path, SOURCE),
    ):
        pass


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(UsageError, match="not a bundle"),
        manifest.claim(tmp_path, SOURCE, overwrite=True),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bundle_of_another_model_is_refused(tmp_path: Path) -> None:
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
    other = replace(SOURCE, name="other", sha256="1" * 64)
    with pytest.raises(UsageError, match="made from model"), manifest.claim(tmp_path, other):
        pass
    with manifest.claim(tmp_path, other, overwrite=True) as bundle:
        assert not bundle.stages


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"format": 1, "stages": 3}']
)
def test_a_damaged_manifest_is_bad_input(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match="manifest"):
        Bundle.open(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT + 1}))
    with pytest.raises(InputError, match="format 2"):
        Bundle.open(tmp_path)


@dataclass(frozen=True, slots=True)
class Cut:
    depth: int
    names: tuple[str, ...] = ()


CUT: Stage[Cut, Nothing, Cut] = Stage("cut", Cut, Nothing, Cut)


def test_a_stage_is_read_as_what_it_was_written_from(tmp_path: Path) -> None:
    def produce(folder: Path) -> Cut:
        (folder / "file").touch()
        return Cut(4, ("a", "b"))

    with manifest.claim(tmp_path, SOURCE) as bundle:
        assert not bundle.has(CUT)
        bundle.run(CUT, produce, options=Cut(3), inputs=Nothing())
    reread = Bundle.open(tmp_path)
    assert reread.has(CUT)
    assert (reread.options(CUT), reread.inputs(CUT)) == (Cut(3), Nothing())
    assert reread.result(CUT) == Cut(4, ("a", "b"))


def test_a_result_that_does_not_fit_is_refused_with_its_place(tmp_path: Path) -> None:
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
        bundle.run("cut", write("x"), options={"depth": 1}, inputs={})
    place = r"manifest\.json: result of stage 'cut': length is not a known field"
    with pytest.raises(InputError, match=place):
        Bundle.open(tmp_path).result(CUT)


@pytest.mark.parametrize("which", [0, 1])
def test_a_full_disk_at_any_manifest_of_the_first_stage_leaves_a_bundle(
    which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a disk that was full at every size: files were there, and nothing named them."""
    written: list[Path] = []
    replace_json = files.replace_json

    def full(path: Path, value: object) -> None:
        written.append(path)
        if len(written) == which + 1:
            raise OSError(errno.ENOSPC, "full", str(path))
        replace_json(path, value)

    monkeypatch.setattr(manifest, "replace_json", full)
    with pytest.raises(OSError, match="full"), manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
    monkeypatch.undo()
    with manifest.claim(tmp_path, SOURCE) as bundle:
        run(bundle)
    Bundle.open(tmp_path).verify()
