from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.conftest import VOCABULARY, MakeModel, stock_model
from tests.recipes import plain
from thanos_deploy.calibration import tune as tuning
from thanos_deploy.calibration.blocks import Arguments, LoadedInputs, block_inputs
from thanos_deploy.calibration.tune import tune
from thanos_deploy.calibration.walk import visits
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.linear import matrix
from thanos_deploy.pattern import SemiStructured, Unstructured
from thanos_deploy.pruning.layers import gather, prune
from thanos_deploy.ranks import shards
from thanos_deploy.solver.mask import smallest_in_groups

TWO_FOUR = SemiStructured(2, 4)
SEGMENTS = torch.randint(VOCABULARY, (6, 100), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuning_brings_what_leaves_a_block_nearer_to_the_dense_one_and_keeps_zeros(
    make_model: MakeModel, model_type: str, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(make_model(model_type))
    errors: list[list[float]] = []
    with torch.no_grad():
        for visit in visits(checkpoint, SEGMENTS, with_dense=True, forward=dtype):
            assert visit.dense is not None
            before = {name: one.clone() for name, one in visit.dense.block.named_parameters()}
            *pruned, kept_dense = visit.structure.linears
            untouched = matrix(visit.block.get_submodule(kept_dense)).clone()
            masks = {}
            for name in pruned:
                weight = matrix(visit.block.get_submodule(name))
                masks[name] = smallest_in_groups(weight.abs(), 2, 4)
                visit.write(name, weight.masked_fill(masks[name], 0.0))
            errors.append([])
            for steps in (0, 24):
                if steps:
                    tune(visit, pruned, steps)
                error = energy = 0.0
                for batch, dense in zip(visit.walk.batches, visit.dense.batches, strict=True):
                    wanted = dense.forward(visit.index, visit.dense.block).float()
                    got = batch.forward(visit.index, visit.walk.block).float()
                    error += (got - wanted).square().sum().item()
                    energy += wanted.square().sum().item()
                errors[-1].append(error / energy)
            for name, mask in masks.items():
                weight = matrix(visit.block.get_submodule(name))
                assert torch.equal(weight == 0, mask)
                assert torch.equal(matrix(visit.walk.block.get_submodule(name)), weight.to(dtype))
            assert not any(one.requires_grad for one in visit.walk.block.parameters())
            assert torch.equal(matrix(visit.block.get_submodule(kept_dense)), untouched)
            for name, parameter in visit.dense.block.named_parameters():
                assert torch.equal(parameter, before[name])
    for first, last in errors:
        assert last < 0.9 * first


def test_a_block_that_steps_would_make_worse_stays_as_it_was(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    with torch.no_grad():
        for rate in (tuning._RATE, 3.0):
            monkeypatch.setattr(tuning, "_RATE", rate)
            walk = visits(Checkpoint.open(make_model("llama")), SEGMENTS, with_dense=True)
            visit = next(walk)
            names = visit.structure.linears
            for name in names:
                weight = matrix(visit.block.get_submodule(name))
                visit.write(name, weight * ~smallest_in_groups(weight.abs(), 2, 4))
            before = {name: one.clone() for name, one in visit.block.named_parameters()}
            tuned = tune(visit, names, 4)
            assert tuned is not None
            same = {before[name].equal(one) for name, one in visit.block.named_parameters()}
            assert (False not in same) == (not tuned.better) == (tuned.after >= tuned.before)
            found.append(tuned)
    assert found[0].before == found[1].before
    assert [one.better for one in found] == [True, False]


def test_a_tuned_model_is_the_same_every_time_and_keeps_its_pattern(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama")
    tuned = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        reports = prune(
            Checkpoint.open(folder),
            SEGMENTS,
            tmp_path / name,
            plain(TWO_FOUR, tune_steps=3),
            patterns={f"model.layers.{index}.mlp.up_proj": TWO_FOUR for index in (0, 1)},
            dtype=torch.float16,
        )
        tuned.append(load_file(tmp_path / name / "model.safetensors"))
        for layer in (layer for report in reports for layer in report.layers):
            assert layer.pattern_holds
            assert layer.sparsity == (tuned[-1][f"{layer.name}.weight"] == 0).float().mean()
    assert all(torch.equal(tuned[0][name], tuned[1][name]) for name in tuned[0])
    up = "model.layers.1.mlp.up_proj.weight"
    dense = load_file(folder / "model.safetensors")[up].half()
    kept = tuned[0][up] != 0
    assert not torch.equal(tuned[0][up][kept], dense[kept])


@torch.no_grad()
def test_statistics_are_of_the_first_segments_alone_and_steps_see_all(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "TOKENS_PER_BATCH", 200)
    checkpoint, further = Checkpoint.open(make_model("llama")), SEGMENTS.flip(0)[:5]
    found, seen = [], []
    for more in (None, further):
        walk = visits(checkpoint, SEGMENTS, further=more, with_dense=True)
        visit = next(walk)
        names = visit.structure.linears
        ((_, first), *_) = gather(visit, [visit.prefix + name for name in names], Walk())
        found.append(first)
        assert visit.dense is not None
        seen.append({number for number, _ in tuning._parts(visit.walk.batches, 20)})
        tune(visit, names, 2)
        assert visit.dense.done
        assert not visit.walk.done
    for name, statistics in found[0].items():
        assert torch.equal(statistics.hessian, found[1][name].hessian)
        assert statistics.mass == found[1][name].mass == SEGMENTS.numel()
    assert seen == [{0, 1, 2}, {0, 1, 2, 3, 4, 5}]


def test_what_blocks_are_only_tuned_on_changes_the_result(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder, made = make_model("llama"), []
    for name, further in (("few", None), ("more", SEGMENTS.flip(0)[:5]), ("same", SEGMENTS[:0])):
        (tmp_path / name).mkdir()
        prune(
            Checkpoint.open(folder),
            SEGMENTS,
            tmp_path / name,
            plain(TWO_FOUR, tune_steps=3),
            further=further,
        )
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[2] != made[1]


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox", "gemma3_text"])
def test_some_sequences_of_a_batch_are_what_they_are_in_the_whole(
    make_model: MakeModel, model_type: str
) -> None:
    model = stock_model(make_model(model_type), dtype=torch.float32)
    family = family_of(model_type)
    block = model.get_submodule(family.blocks)[1]
    with torch.no_grad():
        (batch,) = block_inputs(model, family, [SEGMENTS])
        whole = batch.forward(1, block)
        part = batch.forward(1, block, slice(2, 5))
    torch.testing.assert_close(part, whole[2:5], rtol=1e-5, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    tokens=st.integers(1, 1200),
    steps=st.integers(1, 40),
)
def test_steps_see_parts_from_all_over_the_data(
    lengths: list[int], tokens: int, steps: int
) -> None:
    nothing = Arguments((), {})
    batches = [LoadedInputs(torch.zeros(count, tokens, 1), [nothing]) for count in lengths]
    parts = list(tuning._parts(batches, steps))
    assert len(parts) == steps
    seen = Counter((number, row) for number, rows in parts for row in range(lengths[number])[rows])
    together = max(1, tuning.TOKENS_PER_STEP // tokens)
    assert all(0 < len(range(lengths[n])[rows]) <= together for n, rows in parts)
    every = sum(-(-count // together) for count in lengths)
    if steps >= every:  # no part comes twice before all have come once
        assert len(seen) == sum(lengths)
        assert max(seen.values()) - min(seen.values()) <= 1
    else:
        assert max(seen.values()) == 1


def test_a_block_without_weights_is_left_alone(make_model: MakeModel, tmp_path: Path) -> None:
    reports = prune(
        Checkpoint.open(make_model("llama")),
        SEGMENTS,
        tmp_path,
        plain(Unstructured(1.0), tune_steps=3),
    )
    assert {layer.sparsity for report in reports for layer in report.layers} == {1.0}
    assert all(layer.pattern_holds for report in reports for layer in report.layers)
