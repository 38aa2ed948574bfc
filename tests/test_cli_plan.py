"""`thanos-deploy plan` as a user meets it."""

import json
from pathlib import Path

import pytest

from benchmarks.forecast import MODELS
from tests.conftest import Invoke
from thanos_deploy.gpu.figures import published


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """A model of 8 billion parameters, as far as it is here."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["Llama-3-8B"]))
    return tmp_path


def test_a_configuration_is_enough(configuration: Path, invoke: Invoke) -> None:
    code, output, errors = invoke(
        "plan",
        configuration,
        "--gpu",
        "A100",
        "--batch",
        "1,256",
        "--json",
        "--pattern",
        "2:4",
        "--pattern",
        "structured:0.25",
        "--pattern",
        "4:8",
    )
    assert code == 0, errors
    result = json.loads(output)
    assert [step["batch"] for step in result["passes"]] == [1, 256]
    left = result["block_parameters"]
    assert left["2:4"] == left["dense"] == 32 * 4096 * (6144 + 4096 + 3 * 14336)
    assert 0.70 < left["structured:0.25"] / left["dense"] <= 0.75
    decode = next(one for one in result["verdict"] if one.startswith("Decode at batch 1 "))
    assert "2:4 will not help" in decode
    assert "structured:0.25 will help" in decode
    assert "4:8 will not help (1.00x)" in decode
    prefill = next(one for one in result["verdict"] if one.startswith("Prefill at batch 256 "))
    assert "2:4 will help" in prefill
    said = [text.partition(":")[0] for text in result["measured"]]
    assert said == ["2", "structured"]  # what a GPU can be faster by
    alone, many = result["passes"]
    assert alone["fits"]["dense"]
    cache = 255 * 640 * 2 * 32 * 8 * 128 * 2
    assert many["memory_bytes"]["dense"] - alone["memory_bytes"]["dense"] == cache


def test_products_that_were_published_replace_the_roofline(
    configuration: Path, invoke: Invoke
) -> None:
    code, output, errors = invoke(
        "plan", configuration, "--gpu", "H100", "--json", "--pattern", "2:4"
    )
    assert code == 0, errors
    result = json.loads(output)
    assert result["measured_products"] == 40
    # The kernels read 9/16 of the bytes, which the roofline of an engine does not expect.
    assert "2:4 will help" in result["verdict"][0]
    code, output, errors = invoke(
        "plan", configuration, "--gpu", "H100", "--json", "--dtype", "fp16", "--pattern", "2:4"
    )
    assert json.loads(output)["measured_products"] == 0


def test_what_pruning_takes_is_forecast_from_layers_that_were_pruned(
    configuration: Path, invoke: Invoke
) -> None:
    """Of the sizes that were measured, three of a block's seven layers, no less and no more."""
    run = next(one for one in published() if one.layers)
    told = {}
    for gpus in ("1", "8"):
        code, output, errors = invoke(
            "plan", configuration, "--gpu", "H100", "--prune", "--gpus", gpus, "--json"
        )
        assert code == 0, errors
        told[gpus] = {one["preset"]: one for one in json.loads(output)["pruning"]}
    for preset in ("fast", "best"):
        alone, many = (told[gpus][preset] for gpus in ("1", "8"))
        measured = {
            (one.outputs, one.inputs): one.seconds for one in run.layers if one.preset == preset
        }
        # q and o; gate and up; down. k and v are of a size that was not measured.
        known = 2 * measured[4096, 4096] + 2 * measured[14336, 4096] + measured[4096, 14336]
        assert 32 * known * 0.8 < alone["seconds"]["solver"] < 32 * known * 1.5
        assert many["total_seconds"] < alone["total_seconds"] < 600
        assert alone["seconds"]["exchange"] == 0.0 < many["seconds"]["exchange"]
        assert alone["fits"]
        assert "measured on one NVIDIA H100" in alone["basis"]
    assert told["1"]["best"]["device_bytes"] > told["1"]["fast"]["device_bytes"]
    code, output, errors = invoke("plan", configuration, "--gpu", "H100", "--prune")
    assert code == 0, errors
    assert "Pruning to 2:4 on 1 x NVIDIA H100" in output


def test_the_table_shows_every_layer_if_asked_for(tiny_llama: Path, invoke: Invoke) -> None:
    arguments = ("plan", tiny_llama, "--gpu", "l40s", "--prompt", "16", "--new-tokens", "4")
    code, short, errors = invoke(*arguments)
    assert code == 0, errors
    code, long, _ = invoke(*arguments, "--layers")
    assert code == 0
    for text in ("NVIDIA L40S data sheet", "Decode at batch 8"):
        assert text in " ".join(short.split())
    assert "lm_head" in long
    assert "lm_head" not in short


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--gpu", "V100"), 2, "use one of A10, A100"),
        (("--gpu", "A100", "--dtype", "fp8"), 2, "A100 has no tensor cores for fp8"),
        (("--gpu", "A100", "--batch", "1,0"), 2, "not a list of positive whole numbers"),
        (("--gpu", "A100", "--batch", "one"), 2, "not a list of positive whole numbers"),
        (("--gpu", "A100", "--pattern", "structured:0.999"), 2, "remove at most structured:"),
        (("--gpu", "A100", "--prompt", "9000"), 2, "the 8192 tokens that the model takes"),
        (("--gpu", "A100", "--measured", "nowhere.json"), 3, "not a readable table"),
        (("--gpu", "A100", "--prune"), 2, "have no layer that was pruned on it"),
        (("--gpu", "H100", "--prune", "--gpus", "64"), 2, "work for 32 processes only"),
    ],
)
def test_a_mistake_is_explained(
    configuration: Path, invoke: Invoke, arguments: tuple[str, ...], code: int, message: str
) -> None:
    found, _, errors = invoke("plan", configuration, *arguments)
    assert (found, message in " ".join(errors.split())) == (code, True), errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "not supported"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": -1}, "config.json"),
        ({"vocab_size": "many"}, "config.json"),
    ],
)
def test_a_configuration_that_describes_no_model_is_refused(
    configuration: Path, invoke: Invoke, changes: dict[str, object], message: str
) -> None:
    content = MODELS["Llama-3-8B"] | changes
    (configuration / "config.json").write_text(json.dumps(content))
    code, _, errors = invoke("plan", configuration, "--gpu", "A100")
    assert (code, message in errors) == (3, True), errors


def test_an_empty_folder_is_refused(tmp_path: Path, invoke: Invoke) -> None:
    code, _, errors = invoke("plan", tmp_path, "--gpu", "A100")
    assert (code, "config.json: missing" in errors) == (3, True)
