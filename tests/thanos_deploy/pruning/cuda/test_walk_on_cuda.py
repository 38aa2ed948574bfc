"""Pruning and shrinking whole models on a GPU, beside the CPU; needs no more than a bare image has.

The models have random weights and no tokenizer, so nothing here needs the other tests' fixtures.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos_deploy import methods
from thanos_deploy.calibration.activations import Place
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.errors import ResourceError
from thanos_deploy.forecast import memory
from thanos_deploy.gpu_check import models, walks
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.pruning import owl
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.recipe import Owl, Recipe
from thanos_deploy.pruning.recover import recover
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Fit, Sizing
from thanos_deploy.shrink.survey import survey
from thanos_deploy.solver import mask as masks
from thanos_deploy.solver.threshold import kth_smallest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CUDA = torch.device("cuda", 0)
SMALL = models.Sizes(
    hidden=128,
    channels=352,
    heads=4,
    kv_heads=2,
    head_size=32,
    blocks=2,
    vocabulary=300,
    dtype="fp32",
)
SEGMENTS = walks.random_segments(24, 64, SMALL.vocabulary)
PATTERNS: tuple[Pattern, ...] = (
    SemiStructured(2, 4),
    SemiStructured(4, 8),
    Unstructured(0.5),
    Structured(0.25),
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small model of random weights. Not to be changed."""
    folder = tmp_path_factory.mktemp("dense")
    walks.make(folder, SMALL, "cpu")
    return Checkpoint.open(folder)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def pruned(
    dense: Checkpoint, out: Path, recipe: Recipe, device: torch.device, place: Place = "auto"
) -> tuple[Checkpoint, list[PrunedBlock]]:
    blocks = prune(dense, SEGMENTS, made(out), recipe, device=device, hold=place)
    return Checkpoint.open(out), blocks


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", methods.names())
def test_a_gpu_prunes_as_the_cpu_does(
    dense: Checkpoint, tmp_path: Path, method: str, pattern: Pattern
) -> None:
    recipe = Recipe.of(pattern, method=method, preset="best", calib_forward="fp32")
    one, expected = pruned(dense, tmp_path / "cpu", recipe, CPU)
    other, found = pruned(dense, tmp_path / "cuda", recipe, CUDA)
    walks.make_rounded(tmp_path / "rounded", SMALL)
    usual = pruned(Checkpoint.open(tmp_path / "rounded"), tmp_path / "usual", recipe, CPU)
    most = walks.limits(walks.difference(one, expected, *usual))
    differing, error = walks.difference(one, expected, other, found)
    assert differing <= most[0]
    assert error <= most[1]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_blocks_in_bfloat16_are_pruned(tmp_path: Path, pattern: Pattern, dense: Checkpoint) -> None:
    recipe = Recipe.of(pattern, preset="best", calib_forward="bf16")
    blocks = prune(
        dense, SEGMENTS, made(tmp_path / "out"), recipe, dtype=torch.bfloat16, device=CUDA
    )
    layers = [layer for block in blocks for layer in block.layers]
    assert all(layer.pattern_holds for layer in layers)
    assert all(0.0 < layer.relative_error < 1.0 for layer in layers)


@pytest.mark.parametrize("part", ["heads", "ffn", "both"])
def test_a_gpu_cuts_as_the_cpu_does(dense: Checkpoint, tmp_path: Path, part: str) -> None:
    how = Sizing(part=part, multiple=16)  # type: ignore[arg-type]
    expected, found = (
        survey(dense, SEGMENTS, multiple=16, device=device) for device in (CPU, CUDA)
    )
    for one, other in zip(expected, found, strict=True):
        assert other.channels == pytest.approx(one.channels, rel=1e-2)
        assert other.heads == pytest.approx(one.heads, rel=1e-2)
    plan = sizing.plan(dense, expected, 0.1, how)
    cut = []
    for name, device in (("on the cpu", CPU), ("there", CUDA)):
        out = made(tmp_path / name)
        cut.append(shrink(dense, SEGMENTS, out, plan, Fit(dense_target=0.4), device=device))
    for mine, its in zip(*cut, strict=True):
        assert (its.after, its.heads, its.channels) == (mine.after, mine.heads, mine.channels)
        assert its.heads_error == pytest.approx(mine.heads_error, rel=1e-2)
        assert its.channels_error == pytest.approx(mine.channels_error, rel=1e-2)


def test_a_gpu_counts_the_outliers_that_the_cpu_counts(dense: Checkpoint) -> None:
    ratios = [
        [block.ratio for block in owl.survey(dense, SEGMENTS, dense.linears, Owl(), device=device)]
        for device in (CPU, CUDA)
    ]
    assert ratios[1] == pytest.approx(ratios[0], abs=1e-4)


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_no_byte_depends_on_where_the_data_waits(
    dense: Checkpoint, tmp_path: Path, preset: str
) -> None:
    recipe = Recipe.of(SemiStructured(2, 4), preset=preset)
    places: tuple[Place, ...] = ("device", "host", "disk")
    found = []
    for place in places:
        pruned(dense, tmp_path / place, recipe, CUDA, place)
        found.append(contents(tmp_path / place))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("place", ["device", "disk"])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    dense: Checkpoint, tmp_path: Path, place: Place
) -> None:
    recipe = Recipe.of(SemiStructured(2, 4), preset="best")

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    def run(out: str, journal: str, *, interrupted: bool = False) -> None:
        prune(
            dense,
            SEGMENTS,
            made(tmp_path / out),
            recipe,
            device=CUDA,
            hold=place,
            journal=Journal(tmp_path / journal, {}, PrunedBlock),
            on_progress=interrupt if interrupted else lambda done, total: None,
        )

    run("whole", "journal of the whole")
    with pytest.raises(KeyboardInterrupt):
        run("part", "journal", interrupted=True)
    run("again", "journal")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize(("hidden", "channels"), [(512, 2048), (1024, 2560), (1024, 6144)])
def test_the_memory_that_is_counted_holds_what_is_allocated(
    tmp_path: Path, preset: str, hidden: int, channels: int
) -> None:
    sizes = models.Sizes(
        hidden=hidden, channels=channels, heads=8, kv_heads=4, head_size=hidden // 8, blocks=2,
        vocabulary=300,
    )  # fmt: skip
    walks.make(tmp_path / "dense", sizes, "cuda")
    checkpoint = Checkpoint.open(tmp_path / "dense")
    segments = walks.random_segments(8, 1024, sizes.vocabulary)
    recipe = Recipe.of(SemiStructured(2, 4), preset=preset, calib_forward="bf16")
    counted = memory.of_pruning(
        checkpoint,
        segments,
        checkpoint.blocks[0].linears,
        recipe.walk,
        forward=torch.bfloat16,
        dtype=None,
        device=CUDA,
        place="disk",
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CUDA)
    prune(checkpoint, segments, made(tmp_path / "out"), recipe, device=CUDA, hold="disk")
    held = torch.cuda.max_memory_allocated(CUDA)
    # Of models as small as these the libraries may take more than the walk.
    of_the_walk = counted.device_bytes - memory.LIBRARIES
    assert held <= counted.device_bytes, counted
    assert of_the_walk <= 2.5 * held, counted


def test_a_gpu_without_memory_for_a_block_is_refused(tmp_path: Path) -> None:
    sizes = models.Sizes(
        hidden=1024, channels=4096, heads=8, kv_heads=8, head_size=128, blocks=1, vocabulary=300
    )
    walks.make(tmp_path / "dense", sizes, "cpu")
    checkpoint = Checkpoint.open(tmp_path / "dense")
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info(CUDA)
    torch.cuda.set_per_process_memory_fraction(96 * 2**20 / whole, CUDA)
    try:
        with pytest.raises(ResourceError, match="block 0") as caught:
            prune(
                checkpoint,
                walks.random_segments(2, 64, sizes.vocabulary),
                made(tmp_path / "out"),
                Recipe.of(SemiStructured(2, 4)),
                device=CUDA,
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert caught.value.exit_code == 5


def test_what_is_left_is_trained_there(dense: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe.of(SemiStructured(2, 4), preset="fast")
    sparse, _ = pruned(dense, tmp_path / "sparse", recipe, CUDA)
    divergence = []
    for name, device in (("trained on the cpu", CPU), ("trained there", CUDA)):
        done = recover(sparse, dense, SEGMENTS, made(tmp_path / name), count=64, device=device)
        divergence.append(done.divergence)
    assert divergence[1][0] == pytest.approx(divergence[0][0], rel=0.1)
    assert divergence[1][-1] < divergence[1][0]


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(
        st.one_of(
            st.floats(0.0, width=32, allow_infinity=False),
            st.sampled_from([0.0, 1.0, 2.0**-149, 2.0**-126, 1.5]),
        ),
        min_size=1,
        max_size=60,
    ),
    data=st.data(),
)
def test_a_threshold_found_there_is_that_of_numpy(values: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(values).abs()
    count = data.draw(st.integers(1, len(values)))
    found = kth_smallest(scores.to(CUDA), torch.tensor(count, device=CUDA))
    assert found.item() == np.partition(scores.numpy(), count - 1)[count - 1]
    matrix = scores[None]
    assert torch.equal(
        masks.smallest_in_matrix(matrix.to(CUDA), count).cpu(),
        masks.smallest_in_matrix(matrix, count),
    )
