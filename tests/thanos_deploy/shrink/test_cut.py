import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import exporters.onnx.graph
from tests.conftest import CUT_TYPES, VOCABULARY, MakeModel, stock_model
from tests.model_types import CHANNEL_TYPES
from tests.recipes import plain
from thanos_deploy.errors import ModelError, UsageError
from thanos_deploy.methods import NO_TUNING, Tuning
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.load import load_model
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import check, shrink
from thanos_deploy.shrink.options import Allocation, Fit, Part, Sizing
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Plan
from thanos_deploy.shrink.survey import survey
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import factor, retarget
from thanos_deploy.solver.layer import LayerProblem

SEGMENTS = torch.randint(VOCABULARY, (6, 100), generator=torch.Generator().manual_seed(0))


def run(
    folder: Path,
    out: Path,
    fraction: float = 0.3,
    *,
    part: Part = "both",
    allocation: Allocation = "uniform",
    dense_target: float = 0.0,
    tuning: Tuning = NO_TUNING,
    further: torch.Tensor | None = None,
) -> tuple[Plan, list[CutBlock]]:
    out.mkdir()
    checkpoint = Checkpoint.open(folder)
    losses = survey(checkpoint, SEGMENTS)
    plan = sizing.plan(checkpoint, losses, fraction, Sizing(part, None, allocation))
    fit = Fit(dense_target=dense_target)
    reports = shrink(checkpoint, SEGMENTS, out, plan, fit, tuning, further=further)
    return plan, reports


def masked_model(dense: Path, shrunk: Path, reports: list[CutBlock]) -> Any:
    """The dense model with zero columns where the shrunk one has lost heads and channels.

    Nothing is cut: queries, keys, values and channels that no column reads are still computed.
    """
    model, cut = stock_model(dense, dtype=torch.float32), load_model(shrunk)
    checkpoint = Checkpoint.open(dense)
    family, size = checkpoint.family, checkpoint.head_size
    for index, report in enumerate(reports):
        whole, part = (m.get_submodule(f"{family.blocks}.{index}") for m in (model, cut))
        heads = torch.tensor(report.heads)[:, None] * size + torch.arange(size)
        for name, kept in (
            (family.heads.consumer, heads.flatten()),
            (family.channels.consumer, torch.tensor(report.channels)),
        ):
            target: Any = whole.get_submodule(name)
            source: Any = part.get_submodule(name)
            with torch.no_grad():
                matrix(target).zero_()
                matrix(target)[:, kept] = matrix(source)
                if target.bias is not None:
                    target.bias.copy_(source.bias)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tuning_brings_a_cut_model_nearer_to_the_dense_one(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder = make_model(model_type)
    dense, errors, shapes = load_model(folder), [], []
    further = torch.randint(VOCABULARY, (5, 100), generator=torch.Generator().manual_seed(1))
    for name, tuning in (("untuned", NO_TUNING), ("tuned", Tuning(tune_steps=24))):
        _, reports = run(folder, tmp_path / name, 0.25, tuning=tuning, further=further)
        assert ("tune" in reports[0].seconds) == (tuning.tune_steps > 0)
        model = load_model(tmp_path / name)
        with torch.no_grad():
            wanted, found = (one.base_model(SEGMENTS).last_hidden_state for one in (dense, model))
        errors.append(((found - wanted).square().sum() / wanted.square().sum()).item())
        shapes.append({name: one.shape for name, one in model.named_parameters()})
    assert errors[1] < 0.95 * errors[0]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["heads", "ffn", "both"])
@pytest.mark.parametrize("model_type", CUT_TYPES)
def test_cutting_changes_nothing_that_masking_has_not_changed(
    make_model: MakeModel, tmp_path: Path, model_type: str, part: Part
) -> None:
    folder = make_model(model_type, tie_word_embeddings=True)
    fraction = 0.1 if part == "heads" else 0.2
    plan, reports = run(folder, tmp_path / "shrunk", fraction, part=part)
    assert plan.removed >= fraction
    masked = masked_model(folder, tmp_path / "shrunk", reports)
    shrunk = load_model(tmp_path / "shrunk")
    with torch.no_grad():
        expected, actual = (m(SEGMENTS).logits for m in (masked, shrunk))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    dense, small = (sum(p.numel() for p in m.parameters()) for m in (masked, shrunk))
    assert small < dense


@pytest.mark.parametrize("model_type", CUT_TYPES)
def test_a_stock_plan_loads_with_the_stock_loader_and_generates(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder = make_model(model_type)
    plan, _ = run(folder, tmp_path / "shrunk", 0.2, dense_target=0.5)
    assert plan.stock
    assert not (tmp_path / "shrunk" / "widths.json").exists()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "shrunk", output_loading_info=True
    )
    model, information = loaded
    assert not any(information.values()), information
    model.save_pretrained(tmp_path / "again")
    stored, again = (
        load_file(tmp_path / name / "model.safetensors") for name in ("shrunk", "again")
    )
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    after = plan.widths[0]
    assert getattr(model.config, Checkpoint.open(folder).family.channels.count) == after.channels
    assert model.config.num_attention_heads == after.heads
    text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    assert text.shape[1] > 3


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
def test_what_no_stock_configuration_describes_is_declared_and_stock_loaders_refuse_it(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder = make_model(model_type)
    part: Part = "both" if model_type == "llama" else "heads"
    plan, reports = run(folder, tmp_path / "shrunk", 0.15, part=part, allocation="loss")
    assert not plan.stock
    assert plan.removed >= 0.15
    assert Checkpoint.open(tmp_path / "shrunk").widths == plan.widths
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk")
    masked, model = (
        masked_model(folder, tmp_path / "shrunk", reports),
        load_model(tmp_path / "shrunk"),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(SEGMENTS).logits, masked(SEGMENTS).logits, rtol=0, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_shrunk_model_exports_to_onnx_with_parity(
    make_model: MakeModel, tmp_path: Path, model_type: str, allocation: Allocation
) -> None:
    run(make_model(model_type), tmp_path / "shrunk", 0.2, allocation=allocation)
    (tmp_path / "onnx").mkdir()
    record = exporters.onnx.graph.export(
        Checkpoint.open(tmp_path / "shrunk"), tmp_path / "onnx", pattern=None
    )
    worst = max(max(case.logits_error, case.cache_error) for case in record.parity)
    assert worst < 1e-5


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
def test_a_shrunk_model_can_be_pruned_to_two_four_on_top(
    make_model: MakeModel, tmp_path: Path, allocation: Allocation
) -> None:
    folder = make_model("llama", num_hidden_layers=3)
    plan, _ = run(folder, tmp_path / "shrunk", 0.2, allocation=allocation)
    (tmp_path / "sparse").mkdir()
    reports = prune(
        Checkpoint.open(tmp_path / "shrunk"),
        SEGMENTS,
        tmp_path / "sparse",
        plain(SemiStructured(2, 4), "thanos", block_size=8),
    )
    assert all(layer.pattern_holds for block in reports for layer in block.layers)
    sparse = Checkpoint.open(tmp_path / "sparse")
    assert sparse.widths == plan.widths
    assert bool(load_model(tmp_path / "sparse")(SEGMENTS).logits.isfinite().all())


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_the_walk_is_the_straightforward_one(
    make_model: MakeModel, tmp_path: Path, dense_target: float
) -> None:
    """Against whole masked models in memory and whole forward passes for every single layer."""
    folder = make_model("llama", num_hidden_layers=3)
    plan, reports = run(folder, tmp_path / "shrunk", 0.3, dense_target=dense_target)
    masked, dense = (stock_model(folder, dtype=torch.float64) for _ in range(2))
    shrunk = load_model(tmp_path / "shrunk").double()
    size = Checkpoint.open(folder).head_size
    for index, (block, report) in enumerate(zip(plan.blocks, reports, strict=True)):
        whole, cut = masked.model.layers[index], shrunk.model.layers[index]
        heads = torch.tensor(report.heads)
        kept = {
            "self_attn.o_proj": (heads[:, None] * size + torch.arange(size)).flatten(),
            "mlp.down_proj": torch.tensor(report.channels),
        }
        for group in family_of("llama").inputs:
            x = inputs_of(masked, whole.get_submodule(group[0]))
            y = inputs_of(dense, dense.model.layers[index].get_submodule(group[0]))
            for name in group:
                layer = whole.get_submodule(name)
                with torch.no_grad():
                    problem = LayerProblem(layer.weight, x.T @ x, name)
                    weight = retarget(problem, y.T @ x, dense_target)
                    if name in kept:
                        problem = LayerProblem(weight, x.T @ x, name)
                        elimination = Elimination(weight, factor(problem))
                        if name == "mlp.down_proj":
                            elimination.drop_channels(block.after.channels)
                        else:
                            elimination.drop_heads(
                                (block.before.heads, block.before.kv_heads),
                                keep=(block.after.heads, block.after.kv_heads),
                            )
                        assert torch.equal(elimination.left.nonzero().flatten(), kept[name])
                        weight = elimination.weight
                    # Go on from what was stored, so that differences do not add up; of a layer
                    # that lost outputs, what is left is compared when all is known.
                    stored = cut.get_submodule(name).weight
                    if name in kept:
                        torch.testing.assert_close(
                            stored, weight[:, kept[name]], rtol=1e-3, atol=1e-4
                        )
                        weight = torch.zeros_like(weight)
                        weight[:, kept[name]] = stored
                    else:
                        rows = kept_rows(name, report, size)
                        torch.testing.assert_close(stored, weight[rows], rtol=1e-3, atol=1e-4)
                        weight[rows] = stored
                    layer.weight.copy_(weight)


def kept_rows(name: str, report: CutBlock, size: int) -> torch.Tensor:
    """Rows of a LLaMA's producer that are left."""
    if name.startswith("mlp."):
        return torch.tensor(report.channels)
    heads = torch.tensor(report.heads)
    if "q_proj" not in name:
        heads = (heads // (report.before.heads // report.before.kv_heads)).unique()
    return (heads[:, None] * size + torch.arange(size)).flatten()


def inputs_of(model: Any, layer: torch.nn.Module) -> torch.Tensor:
    """float64[tokens, cols] that a layer sees when the whole model runs."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].reshape(-1, arguments[0].shape[-1]))
    )
    with torch.no_grad():
        model(SEGMENTS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "gpt_neox"])
def test_a_bias_takes_over_what_the_lost_inputs_add_on_average(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder = make_model(model_type)
    _, reports = run(folder, tmp_path / "shrunk", 0.2, part="ffn")
    dense = stock_model(folder, dtype=torch.float32)
    shrunk = load_model(tmp_path / "shrunk")
    family = Checkpoint.open(folder).family
    name = f"{family.blocks}.0.{family.channels.consumer}"
    x, small = (inputs_of(model, model.get_submodule(name)) for model in (dense, shrunk))
    torch.testing.assert_close(small, x[:, list(reports[0].channels)], rtol=0, atol=1e-5)
    with torch.no_grad():
        before, after = (
            model.get_submodule(name)(inputs) for model, inputs in ((dense, x), (shrunk, small))
        )
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=0, atol=1e-4)


def test_a_fraction_of_nothing_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    plan, reports = run(tiny_llama, tmp_path / "shrunk", 0.0)
    assert plan.removed == 0.0
    assert plan.stock
    assert all(report.heads == (0, 1, 2, 3) for report in reports)
    one, two = (load_file(f / "model.safetensors") for f in (tiny_llama, tmp_path / "shrunk"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_runs_write_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tiny_llama, tmp_path / name, 0.2, dense_target=0.5)
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


def test_shards_and_half_precision_stay(make_model: MakeModel, tmp_path: Path) -> None:
    model = stock_model(make_model("llama", dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    run(tmp_path / "sharded", tmp_path / "shrunk")
    assert sorted(path.name for path in (tmp_path / "shrunk").glob("*.safetensors")) == shards
    shrunk = stock_model(tmp_path / "shrunk")
    assert shrunk.dtype == torch.bfloat16
    index = json.loads((tmp_path / "shrunk" / "model.safetensors.index.json").read_text())
    stored = sum(p.numel() * p.element_size() for p in shrunk.parameters())
    assert index["metadata"]["total_size"] == stored


def test_a_fused_layout_that_is_not_understood_is_refused(make_model: MakeModel) -> None:
    folder = make_model("gpt_neox")
    weights = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    weights[name] = weights[name][:64].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"has shape \(64, 32\), config\.json says \(96, 32\)"
    ) as caught:
        check(Checkpoint.open(folder))
    assert caught.value.exit_code == 3


def test_a_model_whose_blocks_differ_already_is_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    run(make_model("llama"), tmp_path / "shrunk", 0.2, allocation="loss")
    widths = Checkpoint.open(tmp_path / "shrunk").widths
    assert len(set(widths)) == 2
    with pytest.raises(ModelError, match="different widths already"):
        check(Checkpoint.open(tmp_path / "shrunk"))


def test_heads_that_share_a_norm_stay_and_channels_go(
    make_model: MakeModel, tmp_path: Path
) -> None:
    (name,) = CHANNEL_TYPES
    folder = make_model(name)
    plan, reports = run(folder, tmp_path / "shrunk", 0.2)
    assert {block.after.heads for block in plan.blocks} == {4}
    assert all(block.after.channels < 48 for block in plan.blocks)
    masked = masked_model(folder, tmp_path / "shrunk", reports)
    with torch.no_grad():
        expected, actual = (
            model(SEGMENTS).logits for model in (masked, load_model(tmp_path / "shrunk"))
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    with pytest.raises(
        UsageError, match="no attention head can be cut out: the norm of its queries"
    ):
        sizing.check(Checkpoint.open(folder), 0.1, Sizing("heads"))
