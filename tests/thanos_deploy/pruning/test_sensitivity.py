"""Which layers stay dense, and why those."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Invoke, MakeModel, stock_model
from tests.thanos_deploy.pruning.test_layers import SEGMENTS
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.errors import UsageError
from thanos_deploy.model import families
from thanos_deploy.model.assignment import every
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured, Unstructured
from thanos_deploy.pruning import sensitivity
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.sensitivity import Group, Sensitivity, choose, weights_of
from thanos_deploy.ranks.shards import Layout
from thanos_deploy.solver.mask import smallest_in_groups

TWO_FOUR = SemiStructured(2, 4)
MAGNITUDE = Recipe.of(TWO_FOUR, method="magnitude", calib_forward="fp32")

Saves = dict[tuple[str, ...], float]

GROUPS = st.lists(st.tuples(st.integers(1, 50), st.floats(0.0, 1.0)), min_size=1, max_size=8).map(
    lambda pairs: [
        Sensitivity((Group((f"{number}.a", f"{number}.b"), weights, lost),), {})
        for number, (weights, lost) in enumerate(pairs)
    ]
)


def test_a_group_loses_what_its_pruning_changes_of_the_block(make_model: MakeModel) -> None:
    """By stock blocks: magnitude needs no statistics, so what is pruned is known exactly."""
    folder = make_model("llama")
    checkpoint = Checkpoint.open(folder)
    found = sensitivity.survey(checkpoint, SEGMENTS, every(checkpoint.linears, TWO_FOUR), MAGNITUDE)
    model = stock_model(folder, dtype=torch.float32)
    batches = Layout.of(*SEGMENTS.shape).batches
    looked_at = torch.cat([SEGMENTS[one.first : one.first + 1] for one in batches])
    assert all(sensitivity.SHARE * (one.stop - one.first) < 2 for one in batches)
    with torch.no_grad():
        for index, (block, report) in enumerate(zip(model.model.layers, found, strict=True)):
            prefix = f"model.layers.{index}."
            assert [group.layers for group in report.groups] == [
                tuple(prefix + name for name in group) for group in checkpoint.blocks[index].groups
            ]
            caught: list[torch.Tensor] = []
            handle = block.register_forward_hook(
                lambda _, __, out, caught=caught: caught.append(out)
            )
            model(looked_at)
            for group in report.groups:
                own = {name: model.get_submodule(name).weight for name in group.layers}
                kept = {name: weight.clone() for name, weight in own.items()}
                for weight in own.values():
                    weight[smallest_in_groups(weight.abs(), 2, 4)] = 0.0
                model(looked_at)
                for name, weight in own.items():
                    weight.copy_(kept[name])
                left, now = caught[0], caught.pop()
                change = (now - left).square().sum(dim=-1) / left.square().sum(dim=-1)
                assert group.lost == pytest.approx(change.mean().item(), rel=1e-4)
                assert group.weights == sum(weight.numel() for weight in own.values())
            handle.remove()


@given(found=GROUPS, share=st.floats(0.0, 0.99))
def test_what_stays_dense_fits_its_share_and_would_lose_most(
    found: list[Sensitivity], share: float
) -> None:
    """By every subset of the groups."""
    weights = weights_of(found)
    room = share * sum(weights.values())
    choices = choose(found, weights, room)
    groups = [group for block in found for group in block.groups]
    assert [(one.layers, one.costs) for one in choices] == [
        (one.layers, one.lost) for one in groups
    ]
    dense = [group for group, choice in zip(groups, choices, strict=True) if choice.dense]
    assert sum(group.weights for group in dense) <= room * (1 + 1e-6)
    best = max(
        sum(group.lost for group in some)
        for count in range(len(groups) + 1)
        for some in combinations(groups, count)
        if sum(group.weights for group in some) <= room
    )
    assert sum(group.lost for group in dense) >= best - 1e-9


def test_groups_that_fill_the_room_exactly_stay() -> None:
    lost = [0.3, 0.1, 0.7, 0.2, 0.5]
    found = [Sensitivity((Group((str(n),), 10, one),), {}) for n, one in enumerate(lost)]
    seconds: Saves = {
        (str(n),): 0.1 for n in range(5)
    }  # three of which are more than 0.3 as floats
    choices = choose(found, seconds, 0.3)
    assert [choice.dense for choice in choices] == [True, False, True, False, True]


def test_a_group_that_saves_nothing_stays_dense_and_takes_no_room() -> None:
    found = [Sensitivity((Group((str(n),), 10, 0.1 * n),), {}) for n in range(4)]
    saves: Saves = {("0",): 0.0, ("1",): -1e-6, ("2",): 2e-6, ("3",): 2e-6}
    choices = choose(found, saves, 2e-6)
    assert [choice.dense for choice in choices] == [True, True, False, True]


def test_a_journal_gives_the_same_survey_back(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_model("llama"))
    patterns = every(checkpoint.linears, TWO_FOUR)
    first, second = (
        sensitivity.survey(
            checkpoint,
            SEGMENTS,
            patterns,
            MAGNITUDE,
            journal=Journal(tmp_path / "journal", {}, Sensitivity),
        )
        for _ in range(2)
    )
    assert [block.groups for block in first] == [block.groups for block in second]


def test_a_block_without_layers_to_prune_has_no_group(make_model: MakeModel) -> None:
    checkpoint = Checkpoint.open(make_model("llama"))
    only = [name for name in checkpoint.linears if ".1.mlp." in name]
    found = sensitivity.survey(checkpoint, SEGMENTS, every(only, TWO_FOUR), MAGNITUDE)
    assert [len(block.groups) for block in found] == [0, *[2], *[0] * (len(found) - 2)]


def test_the_command_leaves_that_share_dense(invoke: Invoke, make_model: MakeModel) -> None:
    folder = make_model("llama")
    out = folder.parent / "kept"
    code, stdout, stderr = invoke(
        *(
            "prune",
            str(folder),
            "--pattern",
            "2:4",
            "--method",
            "magnitude",
        ),
        *("--nsamples", "4", "--seqlen", "16", "--keep-dense", "0.3", "-o", str(out), "--json"),
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    checkpoint = Checkpoint.open(folder)
    sizes = {
        name: checkpoint.weights.shapes[checkpoint.stored_name(f"{name}.weight")]
        for name in checkpoint.linears
    }
    weights = {name: rows * cols for name, (rows, cols) in sizes.items()}
    dense = result["layers_left_dense"]
    choices = result["choices"]
    assert choices["unit"] == "weights"
    assert choices["whole"] == sum(weights.values())
    assert dense == [
        name for group in choices["groups"] if group["dense"] for name in group["layers"]
    ]
    assert 0.2 < sum(weights[name] for name in dense) / sum(weights.values()) <= 0.3
    tensors = stock_model(out / "model").state_dict()
    before = stock_model(folder).state_dict()
    for name in checkpoint.linears:
        weight = tensors[f"{name}.weight"]
        assert torch.equal(weight, before[f"{name}.weight"]) == (name in dense)


def test_what_it_cannot_choose_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match=r"--allocation owl with --keep-dense 0\.2"):
        Recipe.of(Unstructured(0.5), owl=True, keep_dense=0.2)
    with pytest.raises(UsageError, match="--keep-dense 1"):
        Recipe.of(TWO_FOUR, keep_dense=1.0)
    checkpoint = Checkpoint.open(make_model("llama"))
    mixture = replace(checkpoint, family=families.family_of("mixtral"))
    with pytest.raises(UsageError, match="the experts have so many layers"):
        sensitivity.check(mixture)
