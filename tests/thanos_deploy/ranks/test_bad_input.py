"""What can be wrong with several ranks is refused, and no rank is left waiting."""

import errno
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.ranks import RunningRanks, command
from thanos_deploy.stages import prune_work

OPTIONS = ("--pattern", "2:4", "--preset", "paper", "--seqlen", "64", "--device", "cpu", "-q")


def differing(command_name: str, model: str, *arguments: str) -> None:
    """Another seed, another text, another model and another version for rank 1."""
    rank = os.environ["RANK"]
    text = Path(model).parent / f"text-{rank}.txt"
    text.write_text(" ".join(str(number + int(rank)) for number in range(500)))
    if rank == "1":
        here, versions = Path(model).parent / "model", prune_work.versions
        shutil.copytree(model, here)
        weights = load_file(here / "model.safetensors")
        weights["model.norm.weight"] += 1.0
        save_file(weights, here / "model.safetensors", {"format": "pt"})
        model = str(here)
        prune_work.versions = lambda device: {**versions(device), "thanos-deploy": "0.0.1"}
    command(command_name, model, *arguments, "--calib", str(text), "--seed", rank)


def without_access(*arguments: str) -> None:
    """Rank 1 may write nowhere."""

    def refused(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    if os.environ["RANK"] == "1":
        Path.touch = refused  # type: ignore[method-assign]
    command(*arguments)


def with_a_full_disk(*arguments: str) -> None:
    """Rank 1 can write no file of more than a few bytes."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    command(*arguments)


def run(folder: Path, work: Any, model: Path, nsamples: int = 6) -> tuple[list[int | None], str]:
    """Two ranks: exit codes, and what both wrote to standard error."""
    arguments = ("prune", str(model), "-o", str(folder / "out"), "--nsamples", str(nsamples))
    errors = folder / "errors"
    running = RunningRanks(2, work, *arguments, *OPTIONS, errors=errors)
    codes = running.wait(120)
    return codes, "".join((errors / str(rank)).read_text() for rank in range(2))


@pytest.mark.slow
def test_ranks_with_other_options_files_or_versions_are_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "dense"))
    codes, errors = run(tmp_path, differing, model)
    assert codes == [2, 2]
    said = " ".join(errors.split())
    assert "rank 0 and rank 1 differ: " in said
    for what in (r"seed is 0 and 1", r"text is \w{64} and \w{64}", r"model is \w{64} and \w{64}"):
        assert re.search(what, said), said
    assert re.search(r"thanos-deploy is \S+ and 0\.0\.1", said)


@pytest.mark.slow
def test_fewer_segments_than_ranks_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    codes, errors = run(tmp_path, command, tiny_llama, nsamples=2)
    assert codes == [2, 2]
    assert "2 processes, but 2 calibration segments, in batches of up to 128 tokens" in errors


@pytest.mark.slow
def test_a_rank_without_write_access_ends_all(tiny_llama: Path, tmp_path: Path) -> None:
    codes, errors = run(tmp_path, without_access, tiny_llama)
    assert codes == [4, 4]
    assert errors.count("Error: ") == 1
    assert ".rank-1: Permission denied" in errors


@pytest.mark.slow
def test_a_full_disk_on_one_rank_ends_all(tiny_llama: Path, tmp_path: Path) -> None:
    codes, errors = run(tmp_path, with_a_full_disk, tiny_llama)
    assert codes == [5, 5]
    assert errors.count("Error: ") == 1
    assert "inputs-0000-01.safetensors: file too large" in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_are_waited_for_in_vain_for_a_while(
    tiny_llama: Path, tmp_path: Path, rank: int
) -> None:
    running = RunningRanks(
        2,
        command,
        *("prune", str(tiny_llama), "-o", str(tmp_path / "out"), *OPTIONS),
        errors=tmp_path,
        environment={"THANOS_DEPLOY_CONNECT_SECONDS": "2"},
        only=rank,
    )
    assert running.wait(120) == [4]
    errors = (tmp_path / str(rank)).read_text()
    assert f"rank {rank} of 2: the other ranks were not reached within 2 s" in errors
    assert running.address in errors
