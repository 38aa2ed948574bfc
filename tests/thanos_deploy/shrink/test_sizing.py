import itertools
from pathlib import Path

import pytest

from tests.conftest import MODEL_TYPES, MakeModel
from thanos_deploy.errors import UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.widths import Widths
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.options import Allocation, Part, Sizing
from thanos_deploy.shrink.sizing import Losses, candidates, cost, layouts, plan
from thanos_deploy.shrink.steps import channel_steps


def parameters(checkpoint: Checkpoint, width: Widths) -> int:
    """Of the first block, counted one by one in a model that is really that wide."""
    model = checkpoint.skeleton([width] * len(checkpoint.widths))
    block = model.get_submodule(f"{checkpoint.family.blocks}.0")
    return sum(parameter.numel() for parameter in block.parameters())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_cost_of_heads_and_channels_is_what_their_absence_saves(
    make_model: MakeModel, model_type: str
) -> None:
    checkpoint = Checkpoint.open(make_model(model_type))
    before, price = checkpoint.widths[0], cost(checkpoint, 0)
    assert price.block == parameters(checkpoint, before)
    for (heads, kv_heads), channels in itertools.product(layouts(before), (48, 32, 7)):
        after = Widths(heads, kv_heads, channels)
        saved = price.block - parameters(checkpoint, after)
        assert price.removed(before, after) == saved, after


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (Widths(9, 3, 1), [(9, 3), (6, 3), (6, 2), (3, 3), (3, 1)]),
        (Widths(4, 4, 1), [(4, 4), (3, 3), (2, 2), (1, 1)]),
        (Widths(4, 1, 1), [(4, 1), (3, 1), (2, 1), (1, 1)]),
    ],
)
def test_layouts_leave_every_key_the_same_number_of_queries(
    width: Widths, expected: list[tuple[int, int]]
) -> None:
    assert layouts(width) == expected


def test_steps_are_friendly_multiples_below_the_model_s_own() -> None:
    assert list(channel_steps(256, None)) == [192, 128, 64]
    assert list(channel_steps(48, None)) == [32, 16]
    assert list(channel_steps(48, 10)) == [40, 30, 20, 10]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.4])
def test_candidates_remove_the_fraction_and_no_step_more(tiny_llama: Path, fraction: float) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    before, price = checkpoint.widths[0], cost(checkpoint, 0)
    found = candidates(checkpoint, fraction, Sizing(multiple=8))
    assert found
    for after in found:
        assert price.removed(before, after) >= fraction * price.block
        wider = Widths(after.heads, after.kv_heads, min(48, after.channels + 8))
        assert wider == after or price.removed(before, wider) < fraction * price.block


def flat_losses(checkpoint: Checkpoint, per_head: float, per_channel: float) -> list[Losses]:
    """Losses that grow with the square of what is removed, more in later blocks."""
    full = checkpoint.widths[0]
    return [
        Losses(
            {
                kv_heads: {
                    heads: factor * per_head * (full.heads - heads) ** 2
                    + factor * per_head * (full.kv_heads - kv_heads) ** 2
                    for heads, same in layouts(full)
                    if same == kv_heads
                }
                for _, kv_heads in layouts(full)
            },
            {
                left: factor * per_channel * (full.channels - left) ** 2
                for left in (full.channels, *channel_steps(full.channels, 8))
            },
            {},
        )
        for factor in (1.0, 4.0)
    ]


def test_the_uniform_plan_is_the_candidate_with_the_smallest_loss(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    for prices in ((1.0, 1e-6), (1e-6, 1.0)):
        losses = flat_losses(checkpoint, *prices)
        chosen = plan(checkpoint, losses, 0.2, Sizing(multiple=8))
        totals = {
            width: sum(loss.of(width) for loss in losses)
            for width in candidates(checkpoint, 0.2, Sizing(multiple=8))
        }
        assert chosen.widths == (min(totals, key=totals.__getitem__),) * 2
        assert chosen.stock
        assert chosen.removed >= 0.2
    assert plan(checkpoint, losses, 0.1, Sizing("heads", 8)).widths[0].channels == 48
    assert plan(checkpoint, losses, 0.2, Sizing("ffn", 8)).widths[0].heads == 4


def test_a_plan_by_loss_spends_the_same_parameters_where_they_cost_less(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    losses = flat_losses(checkpoint, 1.0, 1e-4)
    uniform = plan(checkpoint, losses, 0.2, Sizing("ffn", 8, "uniform"))
    own = plan(checkpoint, losses, 0.2, Sizing("ffn", 8, "loss"))
    assert own.removed >= 0.2
    assert own.widths[0].channels < own.widths[1].channels
    assert not own.stock
    predicted = [sum(block.predicted_loss for block in p.blocks) for p in (uniform, own)]
    assert predicted[1] < predicted[0]


@pytest.mark.parametrize("part", ["heads", "both"])
@pytest.mark.parametrize("spared", ["query heads", "key-value heads", "channels"])
def test_a_plan_by_loss_removes_the_most_that_is_possible(
    make_model: MakeModel, part: Part, spared: str
) -> None:
    # From (7, 1) no layout is left, and more can be removed by way of (4, 2) to (2, 2).
    checkpoint = Checkpoint.open(
        make_model("llama", hidden_size=56, num_attention_heads=14, num_key_value_heads=2)
    )
    before = checkpoint.widths[0]
    losses = [
        Losses(
            {
                kept: {
                    heads: (spared == "query heads") * (before.heads - heads)
                    + (spared == "key-value heads") * (before.kv_heads - kept)
                    for heads, same in layouts(before)
                    if same == kept
                }
                for _, kept in layouts(before)
            },
            {
                left: float((spared == "channels") * (before.channels - left))
                for left in (before.channels, *channel_steps(before.channels, 8))
            },
            {},
        )
        for _ in checkpoint.widths
    ]
    with pytest.raises(UsageError) as caught:
        sizing.check(checkpoint, 0.999, Sizing(part, 8, "loss"))
    most = float(caught.value.fix.split("structured:")[1].split(",")[0])
    for fraction in (most, most / 2):
        assert plan(checkpoint, losses, fraction, Sizing(part, 8, "loss")).removed >= fraction


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "gpt_neox"])
def test_where_a_stock_configuration_has_no_fewer_heads_both_means_channels(
    make_model: MakeModel, model_type: str
) -> None:
    checkpoint = Checkpoint.open(make_model(model_type))
    losses = flat_losses(checkpoint, 1e-9, 1.0)
    both = plan(checkpoint, losses, 0.1, Sizing(multiple=8))
    assert both.stock
    assert both.widths[0].heads == 4
    heads = plan(checkpoint, losses, 0.1, Sizing("heads"))
    assert not heads.stock
    assert heads.widths[0].heads < 4


@pytest.mark.parametrize("part", ["heads", "ffn", "both"])
def test_a_fraction_that_leaves_nothing_is_refused_with_the_nearest_choice(
    tiny_llama: Path, part: Part
) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    with pytest.raises(UsageError, match=r"no .* would be left in a block with 99\.0%") as caught:
        sizing.check(checkpoint, 0.99, Sizing(part))
    nearest = float(caught.value.fix.split("structured:")[1].split(",")[0])
    sizing.check(checkpoint, nearest, Sizing(part))
    with pytest.raises(UsageError):
        sizing.check(checkpoint, nearest + 0.002, Sizing(part))


@pytest.mark.parametrize(
    ("part", "allocation", "multiple"), [("both", "uniform", 0), ("ffn", "loss", 49)]
)
def test_options_without_a_meaning_are_refused(
    tiny_llama: Path, part: Part, allocation: Allocation, multiple: int
) -> None:
    with pytest.raises(UsageError):
        sizing.check(Checkpoint.open(tiny_llama), 0.1, Sizing(part, multiple, allocation))


def test_a_part_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="--shrink 'all' is not one of the possible values"):
        Sizing("all")  # type: ignore[arg-type]  # that is what is to be seen
