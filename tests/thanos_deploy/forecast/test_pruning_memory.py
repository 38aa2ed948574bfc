import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from thanos_deploy.calibration.activations import Place
from thanos_deploy.errors import ResourceError
from thanos_deploy.forecast import memory, memory_check
from thanos_deploy.gpu_check import models, walks
from thanos_deploy.machine import devices, host_memory
from thanos_deploy.methods import load
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pruning.layers import short_names
from thanos_deploy.shrink.options import Fit

CUDA = torch.device("cuda", 0)

# 128 segments of 2048 tokens, of which only the shape counts.
SEGMENTS = torch.empty(128, 2048, dtype=torch.int64, device="meta")

# The sizes of Llama 3, as its config.json has them.
EIGHT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
SEVENTY = {
    **EIGHT,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}


@pytest.fixture(autouse=True)
def _a_large_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda device: 80 * 10**9)


def outline(folder: Path, config: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.outline(folder)


def counted(
    checkpoint: Checkpoint, preset: str, place: Place = "disk", device: torch.device = CUDA
) -> memory.Memory:
    return memory.of_pruning(
        checkpoint,
        SEGMENTS,
        short_names(checkpoint, checkpoint.linears),
        load("thanos").preset(preset).walk,
        forward=torch.bfloat16,
        dtype=None,
        device=device,
        place=place,
    )


@pytest.mark.parametrize("place", ["auto", "disk"])
@pytest.mark.parametrize(
    ("config", "preset", "most"),
    [(EIGHT, "fast", 12), (EIGHT, "best", 24), (SEVENTY, "fast", 40), (SEVENTY, "best", 40)],
    ids=["8B-fast", "8B-best", "70B-fast", "70B-best"],
)
def test_large_models_fit_into_the_memory_that_they_are_promised_to_need(
    tmp_path: Path, config: dict[str, Any], preset: str, most: int, place: Place
) -> None:
    found = counted(outline(tmp_path, config), preset, place)
    assert found.device_bytes <= most * 10**9, found
    # Python, PyTorch and CUDA take some 2 GB beside it.
    assert found.host_bytes <= 6 * 10**9, found


def test_each_term_is_what_its_name_says(tmp_path: Path) -> None:
    weights = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    terms = {term.name: term.bytes for term in counted(outline(tmp_path, EIGHT), "best").device}
    assert terms["the block"] == terms["the dense block"] == 2 * weights  # bfloat16
    assert terms["the next block, read ahead"] == 2 * weights
    assert terms["statistics of inputs"] == 2 * 4 * 14336**2  # with those of the dense model
    assert terms["the factored Hessian"] == 1.5 * 8 * 14336**2
    assert sum(terms.values()) == counted(outline(tmp_path, EIGHT), "best").device_bytes


# In a process of its own, since the most that is resident is a process's.
_PEAK = """
import sys, torch
from pathlib import Path
from thanos_deploy.forecast import memory, memory_check
from thanos_deploy.gpu_check import models, walks
from thanos_deploy.machine import environment
from thanos_deploy.methods import NO_TUNING
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import parse
from thanos_deploy.pruning.layers import prune, short_names
from thanos_deploy.pruning.quantise import quantise_model
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.solver.grid import Grid
folder, hidden, channels = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
checkpoint = Checkpoint.open(folder / "dense")
segments = walks.random_segments(8, 256, 300)
where = {"forward": torch.float32, "device": torch.device("cpu"), "place": "auto"}
if sys.argv[4] == "quantise":
    found = memory.of_quantising(checkpoint, segments, NO_TUNING, **where)
    def work(source, out):
        codes = out / "codes"
        codes.mkdir()
        quantise_model(source, segments, out, codes, Grid(4))
else:
    recipe = Recipe.of(parse("2:4"), preset=sys.argv[4], calib_forward="fp32")
    names = short_names(checkpoint, checkpoint.linears)
    found = memory.of_pruning(checkpoint, segments, names, recipe.walk, dtype=None, **where)
    def work(source, out):
        prune(source, segments, out, recipe)
for name in ("small", "dense"):  # the first one loads the code
    before = environment.resident_memory_bytes()
    out = folder / f"{name} pruned"
    out.mkdir()
    work(Checkpoint.open(folder / name), out)
print(environment.peak_memory_bytes() - before, found.host_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "hidden", "channels"), [("fast", 512, 2048), ("quantise", 256, 4096)]
)
def test_on_a_cpu_what_is_counted_becomes_resident(
    tmp_path: Path, work: str, hidden: int, channels: int
) -> None:
    sizes = models.Sizes(
        hidden=hidden, channels=channels, heads=8, kv_heads=4, head_size=hidden // 8, blocks=2,
        vocabulary=300, dtype="fp32",
    )  # fmt: skip
    walks.make(tmp_path / "dense", sizes, "cpu")
    walks.make(tmp_path / "small", replace(sizes, hidden=64, channels=96, head_size=8), "cpu")
    words = [sys.executable, "-c", _PEAK, str(tmp_path), str(hidden), str(channels), work]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    held, counted_bytes = map(int, done.stdout.split())
    # Holes of the heap, and what the libraries keep.
    assert counted_bytes / 1.5 <= held <= counted_bytes + 64 * 2**20, (held, counted_bytes)


@pytest.mark.parametrize(("place", "where"), [("device", "device"), ("host", "host")])
def test_the_data_between_two_blocks_counts_where_it_is_held(
    tmp_path: Path, place: Place, where: str
) -> None:
    checkpoint = outline(tmp_path, EIGHT)
    on_disk, held = counted(checkpoint, "fast"), counted(checkpoint, "fast", place)
    data = 2 * SEGMENTS.numel() * 4096 * 2  # what enters a block and what leaves it
    more = {
        "device": held.device_bytes - on_disk.device_bytes,
        "host": held.host_bytes - on_disk.host_bytes,
    }
    assert more.pop(where) == data
    assert set(more.values()) == {0}


def test_segments_that_are_only_tuned_on_are_held_between_blocks_alone(tmp_path: Path) -> None:
    checkpoint = outline(tmp_path, EIGHT)
    walk = load("thanos").preset("best").walk
    held = [
        memory.of_pruning(
            checkpoint,
            SEGMENTS,
            short_names(checkpoint, checkpoint.linears),
            walk,
            further=further,
            forward=torch.bfloat16,
            dtype=None,
            device=CUDA,
            place=place,
        ).host_bytes
        for place in ("host", "disk")
        for further in (0, 100)
    ]
    data = 2 * 2 * 100 * 2048 * 4096 * 2  # of both models, what enters a block and what leaves it
    assert held[1] - held[0] == data
    assert held[2] == held[3]


def test_on_a_cpu_the_host_holds_it_all(tmp_path: Path) -> None:
    found = counted(outline(tmp_path, EIGHT), "fast", device=torch.device("cpu"))
    assert found.device == ()
    assert {"the block", "statistics of inputs"} <= {term.name for term in found.host}


def test_cutting_is_counted(tmp_path: Path) -> None:
    found = memory.of_cutting(outline(tmp_path, EIGHT), SEGMENTS, Fit(), device=CUDA, place="disk")
    terms = {term.name: term.bytes for term in found.device}
    assert terms["matrices for removing inputs"] == 6 * 8 * 14336**2


def test_too_small_a_gpu_is_refused_with_what_is_needed_and_what_lowers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = counted(outline(tmp_path, EIGHT), "best", "device")
    monkeypatch.setattr(host_memory, "free_bytes", lambda: None)  # of this machine
    memory_check.require(found, CUDA)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 8 * 10**9)
    with pytest.raises(
        ResourceError, match=r"cuda:0: \d+\.\d GB .* needed, and 8\.0 GB are free"
    ) as caught:
        memory_check.require(found, CUDA)
    assert caught.value.exit_code == 5
    assert "the factored Hessian 2.5" in caught.value.message
    assert "--activations disk" in caught.value.fix
    assert "--preset fast" in caught.value.fix
    memory_check.require(found, torch.device("cpu"))


def test_too_small_a_machine_is_refused_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = counted(outline(tmp_path, EIGHT), "best", device=torch.device("cpu"))
    for free in (None, found.host_bytes + memory_check._TEXTS):
        monkeypatch.setattr(host_memory, "free_bytes", lambda free=free: free)
        memory_check.require(found, torch.device("cpu"))
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 10**9)
    with pytest.raises(
        ResourceError, match=r"this machine: \d+\.\d GB of memory are needed, and 1\.0 GB are free"
    ) as caught:
        memory_check.require(found, torch.device("cpu"))
    assert "--preset fast" in caught.value.fix


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=repr,
)
def test_an_allocation_that_fails_says_what_all_of_it_needs(
    tmp_path: Path, error: Exception
) -> None:
    found = counted(outline(tmp_path, EIGHT), "fast", device=torch.device("cpu"))
    with (
        pytest.raises(ResourceError, match=r"out of memory \(.*, \d+\.\d GB are needed"),
        memory_check.explained(found),
    ):
        raise error
    for other in (KeyError("x"), ResourceError("the disk is full", fix="free some")):
        with pytest.raises(type(other), match=str(other.args[0])), memory_check.explained(found):
            raise other
