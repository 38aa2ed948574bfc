"""The forecast of pruning on several GPUs, against sums done by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from thanos_deploy.forecast.pruning import LayerCost, Setting, of_walk
from thanos_deploy.gpu.figures import LayerTime
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pruning.layers import linear_shapes

# Seconds of a layer that takes nothing but rows cols^2, or nothing but cols^3.
ROWS, FACTOR = LayerCost((0.0, 1e-6, 0.0, 0.0)), LayerCost((1e-6, 0.0, 0.0, 0.0))


def run(folder: Path, gpus: int, cost: LayerCost, walk: Walk | None = None) -> dict[str, float]:
    setting = Setting(gpus, nsamples=8, seqlen=2048, cost=cost, gram=1e-9, peak=1e12)
    return of_walk(Checkpoint.open(folder), walk or Walk(true_sequential=True), setting)


def test_a_fit_finds_the_factors_that_times_were_made_with() -> None:
    wanted = LayerCost((1e-12, 3e-12, 0.0, 1e-6))
    rows = [
        LayerTime("fast", outputs, inputs, wanted.layer(outputs, inputs))
        for outputs, inputs in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 1024))
    ]
    assert LayerCost.fit(rows).factors == pytest.approx(wanted.factors, rel=1e-6, abs=1e-18)


def test_one_gpu_takes_the_sum_of_the_layers(tiny_llama: Path) -> None:
    shapes = linear_shapes(Checkpoint.open(tiny_llama)).values()
    alone = run(tiny_llama, 1, ROWS)
    assert alone["solver"] == pytest.approx(sum(1e-6 * rows * cols**2 for rows, cols in shapes))
    assert alone["exchange"] == 0.0


def test_a_hessian_is_factored_once_for_the_layers_that_read_it(tiny_llama: Path) -> None:
    shapes = linear_shapes(Checkpoint.open(tiny_llama))
    read = [name for name in shapes if not name.endswith(("k_proj", "v_proj", "up_proj"))]
    alone = run(tiny_llama, 1, FACTOR)
    assert alone["solver"] == pytest.approx(sum(1e-6 * shapes[name][1] ** 3 for name in read))


def test_more_gpus_share_the_data_and_exchange_what_they_summed(tiny_llama: Path) -> None:
    alone, eight = (run(tiny_llama, gpus, ROWS) for gpus in (1, 8))
    assert eight["statistics"] == pytest.approx(alone["statistics"] / 8)
    assert eight["passes"] == pytest.approx(alone["passes"] / 8)
    assert eight["solver"] <= alone["solver"]
    assert eight["exchange"] > 0.0


def test_the_dense_model_costs_its_passes_and_its_gram_matrices(tiny_llama: Path) -> None:
    walk = Walk(true_sequential=True, dense_target=0.4, tune_steps=16)
    plain, best = run(tiny_llama, 1, ROWS), run(tiny_llama, 1, ROWS, walk)
    assert best["passes"] == pytest.approx(2 * plain["passes"])
    assert best["statistics"] == pytest.approx(3 * plain["statistics"])
    more = run(tiny_llama, 1, ROWS, replace(walk, tune_nsamples=32))
    assert more["statistics"] == pytest.approx(best["statistics"])
    # Three passes of 8 segments, and one of 24 more.
    assert more["passes"] == pytest.approx(2 * best["passes"])
    assert plain["tuning"] == 0.0 < best["tuning"]
