from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import VOCABULARY, MakeModel, stock_model
from tests.thanos_deploy.pruning.test_layers import SEGMENTS, inputs_of
from thanos_deploy.errors import HessianError, UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pruning import owl
from thanos_deploy.pruning.recipe import Owl
from thanos_deploy.solver.mask import removed_count

BLOCKS = st.lists(
    st.tuples(st.floats(0.0, 1.0), st.lists(st.integers(1, 10**7), min_size=0, max_size=5)),
    min_size=1,
    max_size=8,
).filter(lambda blocks: any(sizes for _, sizes in blocks))


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(blocks=BLOCKS, sparsity=st.floats(0.0, 1.0), share=st.floats(0.0, 1.0))
def test_counts_are_exact_and_no_block_is_further_away_than_the_spread(
    blocks: list[tuple[float, list[int]]], sparsity: float, share: float
) -> None:
    spread = share * min(sparsity, 1.0 - sparsity)
    layers = [
        {f"{block}.{layer}": size for layer, size in enumerate(sizes)}
        for block, (_, sizes) in enumerate(blocks)
    ]
    patterns = owl.allocate([ratio for ratio, _ in blocks], layers, sparsity, Owl(spread=spread))
    entries = {name: size for block in layers for name, size in block.items()}
    assert patterns.keys() == entries.keys()
    removed = {name: removed_count(patterns[name].sparsity, entries[name]) for name in entries}
    assert sum(removed.values()) == removed_count(sparsity, sum(entries.values()))
    for name, size in entries.items():
        assert abs(removed[name] - sparsity * size) <= spread * size + 1.0 + 1e-6 * size


def test_the_more_outliers_the_less_goes_and_the_mean_is_kept() -> None:
    layers = [{str(block): 1000} for block in range(4)]
    patterns = owl.allocate([0.01, 0.02, 0.02, 0.07], layers, 0.7, Owl())
    # The mean ratio is 0.03, the block furthest from it 0.04 away.
    assert [pattern.sparsity for pattern in patterns.values()] == [0.74, 0.72, 0.72, 0.62]
    alike = owl.allocate([0.02] * 4, layers, 0.7, Owl())
    assert {pattern.sparsity for pattern in alike.values()} == {0.7}


def test_outliers_are_counted_in_the_dense_model(make_model: MakeModel) -> None:
    folder = make_model("llama")
    checkpoint = Checkpoint.open(folder)
    layers = [name for name in checkpoint.linears if "k_proj" not in name]
    counted = owl.survey(checkpoint, SEGMENTS, layers, Owl(threshold=3.0))
    model = stock_model(folder, dtype=torch.float32)
    with torch.no_grad():
        for block, outliers in zip(model.model.layers, counted, strict=True):
            scores = torch.cat(
                [
                    (
                        block.get_submodule(name).weight.abs()
                        * inputs_of(model, block, name).square().sum(dim=0).sqrt()
                    ).flatten()
                    for name in checkpoint.blocks[0].linears
                    if "k_proj" not in name
                ]
            )
            expected = (scores > 3.0 * scores.mean()).float().mean().item()
            assert 0.0 < outliers.ratio < 0.1
            assert outliers.ratio == pytest.approx(expected, abs=2.0 / len(scores))


def test_activations_that_are_not_finite_cannot_be_counted(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama")
    model = stock_model(folder)
    for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
        linear.weight.data *= 1e12
    model.save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    segments = torch.zeros(1, 8, dtype=torch.int64) % VOCABULARY
    with pytest.raises(HessianError, match=r"model\.layers\.1: .* not finite"):
        owl.survey(checkpoint, segments, checkpoint.linears, Owl())


@pytest.mark.parametrize(
    ("sparsity", "threshold", "spread", "message"),
    [
        (0.95, 5.0, 0.08, "from 0 to 0.05"),
        (0.0, 5.0, 0.08, "from 0 to 0"),
        (0.5, 5.0, -0.1, "--owl-spread -0.1"),
        (0.5, 0.0, 0.08, "--owl-threshold 0"),
        (0.5, float("nan"), 0.08, "--owl-threshold nan"),
    ],
)
def test_what_no_block_could_lose_is_refused(
    sparsity: float, threshold: float, spread: float, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Owl(threshold, spread).check(sparsity)
    assert message in str(caught.value)
