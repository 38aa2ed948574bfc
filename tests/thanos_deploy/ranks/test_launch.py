"""The command starts its own ranks, as torchrun would."""

from pathlib import Path

import pytest

from tests.commands import Command
from tests.conftest import Invoke
from tests.ranks import write_text

OPTIONS = ("--pattern", "2:4", "--preset", "paper", "--nsamples", 40, "--seqlen", 64)


@pytest.mark.slow
def test_processes_make_the_bytes_that_one_makes(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    text = ("--calib", write_text(tmp_path / "text.txt"), "--device", "cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    several = Command(
        *("prune", tiny_llama, "-o", two, *OPTIONS, *text, "--processes", 2, "--json"),
        environment={"OMP_NUM_THREADS": "1"},
    )
    assert invoke("prune", tiny_llama, "-o", one, *OPTIONS, *text)[0] == 0
    output, errors = several.communicate()
    assert several.returncode == 0, errors.decode()
    assert output.count(b'"pattern_holds": true') == 1  # said by one rank alone
    written = [(out / "model" / "model.safetensors").read_bytes() for out in (one, two)]
    assert written[0] == written[1]


def test_another_number_of_processes_than_torchrun_started_is_refused(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    command = ("prune", tiny_llama, "-o", tmp_path / "out", *OPTIONS)
    code, _, errors = invoke(*command, "--processes", 3)
    assert code == 2
    assert "the rest of the environment is not what torchrun sets: 'MASTER_PORT'" in errors
    monkeypatch.setenv("MASTER_PORT", "1")
    code, _, errors = invoke(*command, "--processes", 3)
    assert code == 2
    assert "--processes 3, but the number of processes that torchrun has started is 2" in errors
