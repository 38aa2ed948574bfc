"""What pruning layers saves, beside the forecasts of whole models."""

import json
from pathlib import Path

import pytest

from benchmarks.forecast import MODELS
from tests.conftest import Invoke, MakeModel
from thanos_deploy.errors import UsageError
from thanos_deploy.forecast.datasheets import find
from thanos_deploy.forecast.forecast import Variant, architecture, forecast
from thanos_deploy.forecast.measurements import published_measurements
from thanos_deploy.forecast.roofline import Setting, Step
from thanos_deploy.forecast.savings import savings
from thanos_deploy.model.assignment import every
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured, Unstructured
from thanos_deploy.pruning.budget import Budget
from thanos_deploy.pruning.sensitivity import Group, Sensitivity, choose

TWO_FOUR = SemiStructured(2, 4)
DECODE = Budget("speed=1.2x", "H100", "decode:1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of 8 billion parameters, as far as it is here."""
    folder = tmp_path_factory.mktemp("llama-8b")
    (folder / "config.json").write_text(json.dumps(MODELS["Llama-3-8B"]))
    return Checkpoint.outline(folder)


@pytest.mark.parametrize("gpu", ["H100", "A10"])
@pytest.mark.parametrize("step", ["decode:1", "decode:64", "prefill:2048"])
def test_what_all_groups_save_is_what_the_whole_model_saves(
    llama: Checkpoint, gpu: str, step: str
) -> None:
    budget = Budget("speed=1.1x", gpu, step)
    found = savings(llama, every(llama.linears, TWO_FOUR), budget)
    setting = Setting(find(gpu), "bf16", published_measurements(find(gpu), "bf16"))
    passed = Step(budget.sequences, budget.tokens, budget.past)
    dense, sparse = (
        sum(
            one.likely
            for one in forecast(Variant("", architecture(llama), sparse=sparse), passed, setting)
        )
        for sparse in (False, True)
    )
    assert found.dense == pytest.approx(dense)
    assert sum(found.seconds.values()) == pytest.approx(dense - sparse)
    assert len(found.seconds) == sum(len(block.groups) for block in llama.blocks)
    assert (found.measured > 0) == (gpu == "H100")


def test_the_speed_is_reached_by_the_groups_that_are_left(llama: Checkpoint) -> None:
    found = savings(llama, every(llama.linears, TWO_FOUR), DECODE)
    surveyed = [
        Sensitivity(
            tuple(
                Group(tuple(block.prefix + name for name in group), 1, 1.0 / (1 + number))
                for group in block.groups
            ),
            {},
        )
        for number, block in enumerate(llama.blocks)
    ]
    groups = choose(surveyed, found.seconds, found.room(DECODE))
    choices = found.choices(DECODE, groups)
    assert choices.fastest > 1.4
    assert 1.2 - 1e-9 <= choices.speed < 1.21
    # What loses most stays dense: the first blocks.
    dense = {name for group in groups if group.dense for name in group.layers}
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} <= dense
    assert "model.layers.31.mlp.down_proj" not in dense


def test_more_than_is_possible_is_refused_with_the_most_that_is(llama: Checkpoint) -> None:
    patterns = every(llama.linears, TWO_FOUR)
    found = savings(llama, patterns, DECODE)
    most = f"{int(100 * found.fastest) / 100:.2f}"
    with pytest.raises(UsageError, match=f"at most {most} times as fast") as refused:
        found.room(Budget("speed=3x", "H100", "decode:1"))
    assert f"speed={most}x" in str(refused.value.fix)
    assert found.room(Budget(f"speed={most}x", "H100", "decode:1")) < 0.01 * found.dense


@pytest.mark.parametrize("pattern", [Unstructured(0.5), SemiStructured(4, 8)])
def test_zeros_that_no_kernel_skips_save_nothing(
    llama: Checkpoint, pattern: SemiStructured | Unstructured
) -> None:
    found = savings(llama, every(llama.linears, pattern), DECODE)
    assert set(found.seconds.values()) == {0.0}
    with pytest.raises(UsageError, match=r"at most 1\.00 times as fast"):
        found.room(Budget("speed=1.001x", "H100", "decode:1"))


def test_a_kernel_is_not_sparse_in_part(llama: Checkpoint) -> None:
    """Queries, keys and values are multiplied as one."""
    some = [name for name in llama.linears if "v_proj" not in name]
    found = savings(llama, every(some, TWO_FOUR), DECODE)
    saved = {layers[-1].rpartition(".")[2]: one for layers, one in found.seconds.items()}
    assert saved["k_proj"] == 0.0
    assert saved["up_proj"] > 0.0


@pytest.mark.slow
def test_the_command_leaves_dense_what_there_is_time_for(
    make_model: MakeModel, tmp_path: Path, invoke: Invoke
) -> None:
    folder = make_model(
        "llama",
        hidden_size=128,
        intermediate_size=256,
        num_key_value_heads=4,
        num_hidden_layers=3,
    )
    out, measured = tmp_path / "out", tmp_path / "measured.json"
    products = [(384, 128), (128, 128), (512, 128), (128, 256)]
    records = [
        {
            "kernel": kernel,
            "tokens": 8,
            "outputs": outputs,
            "inputs": inputs,
            "seconds": [seconds * outputs * inputs],
        }
        for outputs, inputs in products
        for kernel, seconds in (("dense", 1e-9), ("other", 5e-10))
    ]
    measured.write_text(json.dumps({"gpu": "L4", "dtype": "bf16", "records": records}))
    arguments = (
        *("prune", folder, "--pattern", "2:4", "--method", "magnitude", "-o", out),
        *("--nsamples", "4", "--seqlen", "16"),
        *("--budget-gpu", "L4", "--budget-step", "decode:8", "--budget-measured", measured),
    )
    code, _, errors = invoke(*arguments, "--budget", "speed=4x")
    assert code == 2
    assert "decode at batch 8 on L4 in bf16 at most 1." in errors
    code, shown, errors = invoke(*arguments, "--budget", "speed=1.05x", "--dry-run")
    assert code == 0, errors
    assert "What pruning each group of layers saves and changes" in shown
    assert "not measured" in shown
    code, printed, errors = invoke(*arguments, "--budget", "speed=1.05x", "--json")
    assert code == 0, errors
    result = json.loads(printed)
    found = result["choices"]
    saved = sum(group["saves"] for group in found["groups"] if not group["dense"])
    assert found["whole"] / (found["whole"] - saved) >= 1.05 - 1e-9
    dense = [name for group in found["groups"] if group["dense"] for name in group["layers"]]
    assert dense == result["layers_left_dense"]
    assert found["measured"] == len(found["groups"]) == 12
    assert 0 < len(dense) < len(Checkpoint.open(folder).linears)
    code, shown, errors = invoke("report", out)
    assert code == 0, errors
    assert "groups of layers stay dense" in " ".join(shown.split())
    for page in ("report.md", "index.html"):
        assert (
            "What pruning each group of layers saves and changes"
            in (out / "report" / page).read_text()
        )
    assert "--budget speed=1.05x --budget-gpu L4" in (out / "report" / "report.md").read_text()
