"""A whole model on a grid."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import thanos_deploy as td
from tests.conftest import VOCABULARY, MakeModel, stock_model
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.cli._pruning_tables import show_pruned
from thanos_deploy.errors import HessianError, UsageError
from thanos_deploy.methods import Tuning
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.load import load_model
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning import quantise
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.quantise import QuantisedBlock, quantise_model
from thanos_deploy.pruning.result import PRUNE, Quantisation
from thanos_deploy.solver import quantise as solver
from thanos_deploy.solver.codes import round_to
from thanos_deploy.solver.grid import Grid, parse
from thanos_deploy.solver.layer import LayerProblem

SEGMENTS = torch.randint(VOCABULARY, (8, 60), generator=torch.Generator().manual_seed(0))


FURTHER = torch.randint(VOCABULARY, (6, 60), generator=torch.Generator().manual_seed(1))


def run(
    model: Path,
    out: Path,
    grid: Grid,
    steps: int = 0,
    *,
    journal: Path | None = None,
    on_progress: OnProgress = silent,
) -> tuple[Quantisation, Codes]:
    for name in ("model", "codes"):
        (out / name).mkdir(parents=True)
    done = quantise_model(
        Checkpoint.open(model),
        SEGMENTS,
        out / "model",
        out / "codes",
        grid,
        tuning=Tuning(tune_steps=steps),
        further=FURTHER if steps else None,
        journal=None if journal is None else Journal(journal, {}, QuantisedBlock),
        on_progress=on_progress,
    )
    return done, Codes.open(out / "codes")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("spelling", ["int4:16", "int8:16:asym"])
def test_the_weights_are_the_values_of_the_codes(
    make_model: MakeModel, tmp_path: Path, model_type: str, spelling: str
) -> None:
    grid, source = parse(spelling), make_model(model_type)
    done, codes = run(source, tmp_path, grid)
    checkpoint, model = Checkpoint.open(source), load_model(tmp_path / "model")
    assert codes.grid == grid
    for name in checkpoint.linears:
        weight = matrix(model.get_submodule(name)).detach()
        found = codes.of(name, weight)
        assert found.weight.equal(weight)
        assert found.codes.unique().numel() > 8
    assert done.grid == spelling
    assert done.median_relative_error is not None
    assert done.median_rounding_error is not None
    assert done.median_relative_error < done.median_rounding_error
    assert not done.rounded


def test_all_else_is_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path, Grid(4))
    before, after = (stock_model(folder) for folder in (tiny_llama, tmp_path / "model"))
    linears = {f"{name}.weight" for name in Checkpoint.open(tiny_llama).linears}
    for name, parameter in after.named_parameters():
        assert before.get_parameter(name).equal(parameter) == (name not in linears)


def test_the_model_is_nearer_to_itself_than_when_it_is_rounded(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("llama", hidden_size=64, intermediate_size=128)
    run(source, tmp_path, Grid(4))
    dense, quantised, rounded = (load_model(one) for one in (source, tmp_path / "model", source))
    for name in Checkpoint.open(source).linears:
        weight = matrix(rounded.get_submodule(name))
        weight.data.copy_(round_to(weight.detach(), Grid(4)).weight)
    with torch.inference_mode():
        wanted, ours, others = (model(SEGMENTS).logits for model in (dense, quantised, rounded))
    assert (ours - wanted).square().mean() < 0.8 * (others - wanted).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["int4:row", "int4:row:asym"])
@pytest.mark.parametrize(("model_type", "most"), [("llama", 0.9), ("gpt2", 1.0)])
def test_steps_of_whole_blocks_bring_them_nearer_and_stay_on_the_grid(
    make_model: MakeModel, tmp_path: Path, model_type: str, most: float, spelling: str
) -> None:
    """One scale for a row leaves room; in small groups, a tiny model's blocks are at their best.

    Rounding costs the small GPT-2 so little that the last bits decide whether steps help it. Then
    they may be thrown away, but no block is farther away after them.
    """
    grid, source = parse(spelling), tmp_path / "pruned"
    shutil.copytree(make_model(model_type), source)
    pruned = load_file(source / "model.safetensors")
    names = Checkpoint.open(source).linears
    kept = {}
    for name in names:
        weight = pruned[f"{name}.weight"]
        kept[name] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6
        weight *= kept[name]
    save_file(pruned, source / "model.safetensors", metadata={"format": "pt"})
    without, _ = run(source, tmp_path / "without", grid)
    done, codes = run(source, tmp_path / "with", grid, 24)
    assert without.tuned is None
    assert done.tuned is not None
    assert done.tuned.blocks == 2
    assert done.tuned.median_error <= most * done.tuned.median_error_before
    model, changed = load_model(tmp_path / "with" / "model"), 0
    before = load_file(tmp_path / "without" / "model" / "model.safetensors")
    for name in names:
        module = model.get_submodule(name)
        weight = matrix(module).detach()
        assert codes.of(name, weight).weight.equal(weight)
        assert not module.get_parameter("weight")[~kept[name]].any()
        changed += int((module.get_parameter("weight") != before[f"{name}.weight"]).sum())
    assert bool(changed) == bool(done.tuned.better)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    class Stop(Exception):  # noqa: N818 - it is thrown where the test wants the run to end
        pass

    def stop(done: int, _: int) -> None:
        if done == 2:  # when the first of two blocks is in the journal
            raise Stop

    run(tiny_llama, tmp_path / "whole", Grid(4, 16), 3)
    kept, steps = tmp_path / "journal", []
    with pytest.raises(Stop):
        run(tiny_llama, tmp_path / "cut off", Grid(4, 16), 3, journal=kept, on_progress=stop)
    done, _ = run(
        tiny_llama,
        tmp_path / "again",
        Grid(4, 16),
        3,
        journal=kept,
        on_progress=lambda done, _: steps.append(done),
    )
    assert steps == [1, 2]
    assert done.tuned is not None
    assert done.tuned.blocks == 2
    whole, again = (
        {path.relative_to(one): path.read_bytes() for path in sorted(one.rglob("*.safetensors"))}
        for one in (tmp_path / "whole", tmp_path / "again")
    )
    assert len(whole) == 3
    assert whole == again


def test_a_layer_whose_statistics_cannot_be_used_is_rounded_with_a_notice(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = solver.quantise

    def failing(problem: LayerProblem, *others: object, **named: object) -> object:
        if problem.name.endswith("0.mlp.up_proj"):
            raise HessianError("no", fix="none")
        return solve(problem, *others, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(quantise, "quantise", failing)
    done, _ = run(tiny_llama, tmp_path, Grid(4))
    assert done.rounded == {"model.layers.0.mlp.up_proj": "no"}
    before, after = (load_model(folder) for folder in (tiny_llama, tmp_path / "model"))
    weight, found = (
        matrix(model.get_submodule("model.layers.0.mlp.up_proj")).detach()
        for model in (before, after)
    )
    torch.testing.assert_close(found, round_to(weight, Grid(4)).weight)


@pytest.mark.parametrize("pattern", ["2:4", "structured:0.2"])
def test_prune_quantises_what_it_pruned(
    tiny_llama: Path, tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    bundle = td.prune(
        tiny_llama, pattern=pattern, quantize="int4:16", out=out, nsamples=2, seqlen=64
    )
    assert bundle.pruned.quantisation is not None
    failed = replace(bundle.pruned.quantisation, rounded={"layer.0": "no use"})
    show_pruned(replace(bundle.pruned, quantisation=failed))
    said = " ".join(capsys.readouterr().out.split())
    assert "quantised to │ int4:16" in said
    assert "layer.0 was rounded without compensation: no use." in said
    inner = Bundle.open(out)
    assert inner.options(PRUNE).quantize == "int4:16"
    assert inner.result(PRUNE).quantisation == bundle.pruned.quantisation
    assert "codes/00000.safetensors" in inner.stages["prune"].files
    model, checkpoint = load_model(out / "model"), Checkpoint.open(out / "model")
    codes = Codes.open(out / "codes")
    for name in checkpoint.linears:
        weight = matrix(model.get_submodule(name)).detach()
        assert codes.of(name, weight).weight.equal(weight)
        if pattern == "2:4":
            assert (weight.reshape(len(weight), -1, 4) == 0).sum(dim=2).ge(2).all()


@pytest.mark.slow
def test_prune_trains_the_scales_after_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"pattern": "2:4", "preset": "fast", "nsamples": 2, "seqlen": 64, "recover": 40}
    bundle = td.prune(tiny_llama, quantize="int4:16", out=out, **asked)  # type: ignore[arg-type]
    assert bundle.pruned.quantisation is not None
    trained = bundle.pruned.quantisation.trained
    assert trained is not None
    assert trained.tokens == 40 * 64
    assert Bundle.open(out).result(PRUNE).quantisation == bundle.pruned.quantisation
    assert sorted(path.name for path in out.glob("*-trained")) == []
    codes, checkpoint = Codes.open(out / "codes"), Checkpoint.open(out / "model")
    for name in checkpoint.linears:
        weight = checkpoint.linear(name)
        assert codes.of(name, weight).weight.equal(weight)
        assert (weight.reshape(len(weight), -1, 4) == 0).sum(dim=2).ge(2).all()


def test_what_no_grid_is_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int5"):
        td.prune(tiny_llama, pattern="2:4", quantize="int5", out=tmp_path / "out")
