import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import MODEL_TYPES, VOCABULARY, MakeModel, stock_model
from tests.golden import random_problem
from tests.recipes import plain
from thanos_deploy import methods
from thanos_deploy.errors import HessianError, ModelError, UsageError
from thanos_deploy.methods import thanos
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import Pattern, SemiStructured, Unstructured
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.pruning.solution import Solution, aim, solve
from thanos_deploy.solver.hessian import retarget
from thanos_deploy.solver.layer import LayerProblem
from thanos_deploy.solver.mask import smallest

TWO_FOUR = SemiStructured(2, 4)
SEGMENTS = torch.randint(VOCABULARY, (6, 100), generator=torch.Generator().manual_seed(0))


def run(
    folder: Path,
    out: Path,
    pattern: Pattern = TWO_FOUR,
    *,
    patterns: Mapping[str, Pattern] | None = None,
    dtype: torch.dtype | None = None,
    **given: Any,
) -> list[PrunedBlock]:
    out.mkdir()
    return prune(
        Checkpoint.open(folder),
        SEGMENTS,
        out,
        plain(pattern, "thanos", **{"block_size": 16, "true_sequential": True, **given}),
        patterns=patterns,
        dtype=dtype,
    )


def is_two_four(weight: torch.Tensor) -> bool:
    return bool(((weight != 0).reshape(-1, 4).sum(dim=1) == 2).all())


def inputs_of(model: Any, block: Any, name: str) -> torch.Tensor:
    """float32[tokens, cols] that a layer sees when the whole model runs."""
    seen: list[torch.Tensor] = []
    handle = block.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]))
    )
    model(SEGMENTS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("true_sequential", [True, False])
@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_the_walk_is_the_straightforward_one(
    make_model: MakeModel, tmp_path: Path, true_sequential: bool, dense_target: float
) -> None:
    """Against whole models in memory and whole forward passes for every single layer."""
    folder = make_model("llama")
    run(
        folder,
        tmp_path / "pruned",
        true_sequential=true_sequential,
        dense_target=dense_target,
    )
    walked = load_file(tmp_path / "pruned" / "model.safetensors")
    model, dense = (stock_model(folder, dtype=torch.float32) for _ in range(2))
    linears = Checkpoint.open(folder).blocks[0]
    groups = linears.groups if true_sequential else (linears.linears,)
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            for group in groups:
                results = {}
                for name in group:
                    x = inputs_of(model, block, name)
                    y = inputs_of(dense, dense.model.layers[index], name)
                    problem = LayerProblem(block.get_submodule(name).weight, x.T @ x, name)
                    if dense_target:
                        weight = retarget(problem, y.T @ x, dense_target)
                        problem = LayerProblem(weight, x.T @ x, name)
                    results[name] = thanos.prune(
                        problem, TWO_FOUR, thanos.Options(block_columns=16)
                    ).weight
                for name, weight in results.items():
                    stored = walked[f"model.layers.{index}.{name}.weight"]
                    agree = (weight == 0) == (stored == 0)
                    assert agree.float().mean() > 0.995, name
                    if bool(agree.all()):
                        torch.testing.assert_close(stored, weight, rtol=1e-3, atol=1e-3)
                    # Go on from what was stored, so that differences do not add up.
                    block.get_submodule(name).weight.copy_(stored)


def test_aiming_at_the_dense_model_brings_the_hidden_states_nearer_to_it(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama", num_hidden_layers=6)
    dense = stock_model(folder, dtype=torch.float32)
    errors = []
    for dense_target in (0.0, 0.5):
        out = tmp_path / str(dense_target)
        run(folder, out, dense_target=dense_target)
        with torch.no_grad():
            wanted, got = (
                model.model(SEGMENTS).last_hidden_state
                for model in (dense, stock_model(out, dtype=torch.float32))
            )
        errors.append((got - wanted).square().sum().item())
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_bfloat16_calibration_loses_as_much_as_a_float32_one(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder, errors = make_model(model_type), []
    for calib_forward in ("fp32", "bf16"):
        reports = run(folder, tmp_path / calib_forward, calib_forward=calib_forward)
        layers = [layer for block in reports for layer in block.layers]
        assert all(layer.pattern_holds for layer in layers)
        errors.append(sum(layer.relative_error for layer in layers))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("calib_forward", ["fp32", "bf16"])
def test_two_runs_write_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, calib_forward: str
) -> None:
    for out in ("one", "two"):
        run(tiny_llama, tmp_path / out, dense_target=0.4, calib_forward=calib_forward)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_pattern_survives_the_cast_and_no_negative_zero_is_written(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    reports = run(tiny_llama, tmp_path / "pruned", dtype=dtype)
    for name, weight in load_file(tmp_path / "pruned" / "model.safetensors").items():
        assert weight.dtype == dtype
        assert not (torch.signbit(weight) & (weight == 0)).any(), name
    assert all(layer.pattern_holds for block in reports for layer in block.layers)
    model = stock_model(tmp_path / "pruned")
    assert model.dtype == dtype


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_weights_that_are_held_in_half_precision_come_out_as_if_in_single(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    half = make_model(model_type, dtype=torch.float16)
    single = shutil.copytree(half, tmp_path / "single")
    weights = {name: one.float() for name, one in load_file(half / "model.safetensors").items()}
    save_file(weights, single / "model.safetensors", metadata={"format": "pt"})
    for folder, out in ((half, "from half"), (single, "from single")):
        run(
            folder,
            tmp_path / out,
            dtype=torch.float16,
            dense_target=0.4,
            tune_steps=2,
            calib_forward="bf16",
        )
    one, two = (load_file(tmp_path / f"from {n}" / "model.safetensors") for n in ("half", "single"))
    assert all(torch.equal(one[name], two[name]) for name in weights)


def test_a_checkpoint_keeps_its_own_dtype_and_its_shards(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama", dtype=torch.bfloat16)
    model = stock_model(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    run(tmp_path / "sharded", tmp_path / "pruned")
    assert sorted(path.name for path in (tmp_path / "pruned").glob("*.safetensors")) == shards
    pruned = stock_model(tmp_path / "pruned")
    assert pruned.dtype == torch.bfloat16
    assert is_two_four(pruned.model.layers[1].mlp.down_proj.weight)


def test_unstructured_removes_the_fraction_of_every_layer(tiny_llama: Path, tmp_path: Path) -> None:
    reports = run(tiny_llama, tmp_path / "pruned", Unstructured(0.6))
    for layer in (layer for block in reports for layer in block.layers):
        assert layer.sparsity == pytest.approx(
            int(0.6 * layer.rows * layer.cols + 1e-6) / (layer.rows * layer.cols)
        )
        assert layer.pattern_holds
        assert 0.0 < layer.relative_error < 1.0


def test_outlier_rows_are_reported_as_off_the_pattern(tiny_llama: Path, tmp_path: Path) -> None:
    reports = run(tiny_llama, tmp_path / "pruned", outlier_rows=0.25)
    assert not any(layer.pattern_holds for block in reports for layer in block.layers)


def test_a_width_that_the_group_does_not_divide_is_refused_before_anything_is_written(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama", intermediate_size=50)
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.down_proj: 50 inputs") as caught:
        run(folder, tmp_path / "pruned")
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "pruned").iterdir())


def test_an_option_that_does_not_fit_is_a_usage_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="blocks of 6 columns"):
        run(tiny_llama, tmp_path / "pruned", block_size=6)


def test_activations_that_overflow_leave_a_mask_by_magnitude_and_it_is_said(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama")
    model = stock_model(folder)
    for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
        linear.weight.data *= 1e12  # so their product overflows when it is squared
    model.save_pretrained(folder)
    reports = run(folder, tmp_path / "pruned")
    layers = {layer.name: layer for block in reports for layer in block.layers}
    hit = layers.pop("model.layers.1.mlp.down_proj")
    assert (hit.solver, hit.damping) == ("magnitude mask", 0.0)
    assert "NaN or infinite" in hit.failures[0]
    assert {(layer.solver, layer.failures) for layer in layers.values()} == {("thanos", ())}
    before, after = (
        load_file(path / "model.safetensors")[f"{hit.name}.weight"]
        for path in (folder, tmp_path / "pruned")
    )
    removed = smallest(before.abs(), TWO_FOUR, per_row=False)
    assert torch.equal(after, torch.where(removed, 0.0, before))


def solved(problem: LayerProblem, cross: torch.Tensor | None = None) -> Solution:
    options = thanos.Options(block_columns=8)
    aimed, failures = aim(problem, cross, 0.5, options)
    return solve(
        problem,
        TWO_FOUR,
        methods.load("thanos"),
        options,
        aimed=aimed,
        failures=failures,
    )


def test_a_layer_that_can_be_solved_needs_no_second_try() -> None:
    problem = random_problem(0)
    solution = solved(problem, problem.hessian)
    assert (solution.solver, solution.failures) == ("thanos", ())
    assert solution.result.damping == 0.01


def test_an_indefinite_hessian_is_damped_harder_first() -> None:
    problem = random_problem(0)
    problem.hessian.diagonal().sub_(0.05 * problem.hessian.diagonal().mean())
    solution = solved(problem)
    assert (solution.solver, solution.failures) == ("thanos", ())
    assert solution.result.damping == pytest.approx(0.1)


def test_a_layer_that_cannot_aim_at_the_dense_model_aims_at_its_own_output() -> None:
    problem = random_problem(0)
    solution = solved(problem, torch.full_like(problem.hessian, float("nan")))
    assert solution.solver == "thanos"
    assert "of the weight are NaN or infinite" in solution.failures[0]
    assert torch.equal(solution.result.weight, solved(problem).result.weight)


@pytest.mark.parametrize("entry", [(0, 5), (3, 3)], ids=["beside the diagonal", "on it"])
def test_a_hessian_that_is_not_finite_leaves_a_mask(entry: tuple[int, int]) -> None:
    problem = random_problem(0)
    scores = problem.weight.abs()
    if entry[0] != entry[1]:
        scores = scores * problem.hessian.diagonal().sqrt()
    problem.hessian[entry] = problem.hessian[entry[::-1]] = float("inf")
    solution = solved(problem, problem.hessian)
    assert solution.solver == ("wanda mask" if entry[0] != entry[1] else "magnitude mask")
    assert len(solution.failures) == 2
    removed = smallest(scores, TWO_FOUR, per_row=False)
    assert torch.equal(solution.result.mask, removed)
    assert torch.equal(solution.result.weight, torch.where(removed, 0.0, problem.weight))
    assert 0.0 < solution.result.relative_error < 1.0


def test_a_hopeless_hessian_leaves_the_mask_of_wanda() -> None:
    problem = random_problem(0)
    problem.hessian.diagonal().sub_(1e6 * problem.hessian.diagonal().mean())
    solution = solved(problem)
    assert solution.solver == "wanda mask"
    assert "not positive definite, even with damping 100" in solution.failures[0]


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    problem = random_problem(0)
    problem.weight[1, 1] = float("nan")
    with pytest.raises(HessianError, match="1 of 96 entries of the weight"):
        solved(problem)


def test_each_layer_keeps_its_own_pattern_and_the_others_every_bit(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("llama", intermediate_size=50)  # 2:4 does not divide it
    model = stock_model(folder)
    block = model.model.layers[1]
    block.mlp.down_proj.weight.data[0, :3] = torch.tensor([-0.0, 0.0, -0.0])
    model.save_pretrained(folder)
    first = "model.layers.0."
    own: dict[str, Pattern] = {
        f"{first}self_attn.k_proj": TWO_FOUR,
        f"{first}self_attn.v_proj": Unstructured(0.3),
        "model.layers.1.mlp.up_proj": SemiStructured(1, 4),
    }
    for true_sequential in (True, False):
        out = tmp_path / str(true_sequential)
        reports = run(folder, out, patterns=own, true_sequential=true_sequential)
        dense, pruned = (load_file(path / "model.safetensors") for path in (folder, out))
        for layer in (layer for report in reports for layer in report.layers):
            before, after = (tensors[f"{layer.name}.weight"] for tensors in (dense, pruned))
            zeros = (after == 0).float().mean().item()
            assert layer.sparsity == pytest.approx(zeros)
            assert layer.pattern_holds
            assert layer.pattern == str(own.get(layer.name, "dense"))
            if layer.name in own:
                assert layer.solver == "thanos"
                assert zeros == pytest.approx(own[layer.name].sparsity, abs=0.01)
            else:
                assert layer.solver == "none"
                assert torch.equal(before.view(torch.int32), after.view(torch.int32)), layer.name
        names = [layer.name for layer in reports[0].layers]
        assert names == [f"{first}{name}" for name in Checkpoint.open(folder).blocks[0].linears]


def test_a_block_may_stay_dense_as_a_whole(tiny_llama: Path, tmp_path: Path) -> None:
    own: dict[str, Pattern] = {"model.layers.1.mlp.up_proj": TWO_FOUR}
    reports = run(tiny_llama, tmp_path / "pruned", patterns=own)
    assert {layer.solver for layer in reports[0].layers} == {"none"}
    assert [layer.sparsity for layer in reports[1].layers if layer.solver == "thanos"] == [0.5]


def test_weights_too_large_for_the_dtype_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("llama")
    model = stock_model(folder)
    model.model.norm.weight.data[0] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"model.norm.weight: values up to 1e\+06 do not fit"):
        run(folder, tmp_path / "pruned", dtype=torch.float16)


def test_passes_that_may_not_wait_start_over_and_find_the_same(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("llama")
    waiting = run(folder, tmp_path / "waiting", dense_target=0.4)
    monkeypatch.setattr("thanos_deploy.calibration.sizes.WAITING_BYTES", 0)
    again = run(folder, tmp_path / "again", dense_target=0.4)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("waiting", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [layer.relative_error for block in waiting for layer in block.layers] == [
        layer.relative_error for block in again for layer in block.layers
    ]
