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
from thanos_deploy.pruning.sensitivity import Group, Sensitivity, left_dense
from thanos_deploy.ranks.shards import Layout
from thanos_deploy.solver.mask import smallest_in_groups

TWO_FOUR = SemiStructured(2, 4)
MAGNITUDE = Recipe.of(TWO_FOUR, method="magnitude", calib_forward="fp32")

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
def test_what_stays_fits_its_share_and_loses_most_for_its_size(
    found: list[Sensitivity], share: float
) -> None:
    kept = set(left_dense(found, share))
    groups = [group for block in found for group in block.groups]
    whole = sum(group.weights for group in groups)
    dense = [group for group in groups if kept.issuperset(group.layers)]
    pruned = [group for group in groups if kept.isdisjoint(group.layers)]
    assert len(dense) + len(pruned) == len(groups)
    used = sum(group.weights for group in dense)
    assert used <= share * whole + 1e-6
    for group in pruned:  # it had no room beside those that lose more
        before = [one for one in dense if one.lost / one.weights >= group.lost / group.weights]
        assert sum(one.weights for one in before) + group.weights > share * whole


def test_groups_of_one_size_stay_in_the_best_way_there_is() -> None:
    lost = [0.3, 0.1, 0.7, 0.2, 0.5]
    found = [Sensitivity((Group((str(n),), 10, one),), {}) for n, one in enumerate(lost)]
    best = max(combinations(range(5), 2), key=lambda pair: sum(lost[n] for n in pair))
    assert left_dense(found, 0.4) == tuple(map(str, best))


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
    with pytest.raises(UsageError, match="its experts have so many layers"):
        sensitivity.check(mixture)
