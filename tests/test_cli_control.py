"""Which layers are pruned to what, what that will take, and input that has nothing to give."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.engines.onnxruntime import tensorrt_build_options
from tests.bundles import checked
from tests.conftest import Invoke
from tests.test_cli import PRUNING, SMALL
from thanos_deploy.bundle.graph_record import read_graph_record
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.report import escape
from thanos_deploy.solver.mask import removed_count

CALIBRATION = ("--nsamples", "4", "--seqlen", "64")
DOWN = "model.layers.1.mlp.down_proj"


def layers_of(out: Path) -> dict[str, dict[str, Any]]:
    blocks = json.loads((out / "layers.json").read_text())
    return {layer["name"]: layer for block in blocks for layer in block["layers"]}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of layers with patterns of their own."""
    path = tmp_path_factory.mktemp("own") / "own.json"
    path.write_text(json.dumps({"re:.*k_proj": "unstructured:0.25", "re:.*up_proj": "4:8"}))
    return path


@pytest.mark.slow
def test_layers_with_patterns_of_their_own_are_judged_by_these_everywhere(
    tiny_llama: Path, tmp_path: Path, own: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    wanted = ("--ignore", "re:.*v_proj", "--ignore", DOWN, "--sparsity-file", own)
    arguments = ("prune", tiny_llama, *PRUNING, *wanted, "-o", out)
    for command in (
        arguments,
        ("export", out, "--target", "packed"),
        ("export", out, "--target", "onnx"),
        ("report", out, "--json"),
    ):
        code, printed, errors = invoke(*command)
        assert code == 0, errors
    dense = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", DOWN]
    (report,) = checked(json.loads(printed))["models"]
    found = report["linear_layers"]
    assert found["patterns"] == {"2:4": 7, "unstructured:0.25": 2, "dense": 3, "4:8": 2}
    assert sorted(found["layers_left_dense"]) == sorted(dense)
    assert found["pattern_holds"] is True
    assert found["retries"] == []
    assert any("The linear layers differ: 2:4 in 7" in said for said in report["verdict"])
    left = ", ".join(map(escape.code, found["layers_left_dense"]))
    assert f"bit by bit as they were: {left}." in (out / "README.md").read_text()
    before, after = (load_file(path / "model.safetensors") for path in (tiny_llama, out / "model"))
    for name in dense:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    # The graph, the packed file and `verify` go by each layer's own pattern.
    record = read_graph_record(out / "onnx" / "export.json")
    graph = {weight.name: weight for weight in record.weights}
    for name, layer in layers_of(out).items():
        assert graph[name].pattern == (None if name in dense else layer["pattern"])
        assert graph[name].pattern_holds is (None if name in dense else True)
    assert tensorrt_build_options(record)["trt_sparsity_enable"] == "1"
    assert Bundle.open(out).stages["packed"].result["packed"] == 9
    code, table, errors = invoke("verify", out)
    assert code == 0, errors
    assert "11 of 14 layers hold" in table
    # What the file says counts, not only its name.
    changed = tmp_path / own.name
    changed.write_text(json.dumps({"re:.*k_proj": "dense"}))
    code, _, errors = invoke(*arguments[:-3], changed, "-o", out)
    assert code == 0, errors
    assert layers_of(out)["model.layers.0.self_attn.k_proj"]["pattern"] == "dense"


@pytest.mark.parametrize("method", ["thanos", "magnitude"])
def test_owl_removes_exactly_what_was_asked_for(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, method: str
) -> None:
    out = tmp_path / "out"
    code, printed, errors = invoke(
        "prune",
        tiny_llama,
        "--pattern",
        "unstructured:0.6",
        "--method",
        method,
        *CALIBRATION,
        "--allocation",
        "owl",
        "--owl-threshold",
        "3",
        "--ignore",
        DOWN,
        "-o",
        out,
        "--json",
    )
    assert code == 0, errors
    layers = layers_of(out)
    weights = load_file(out / "model" / "model.safetensors")
    assert layers.pop(DOWN)["pattern"] == "dense"
    zeros = {name: int((weights[f"{name}.weight"] == 0).sum()) for name in layers}
    sizes = {name: layer["rows"] * layer["cols"] for name, layer in layers.items()}
    for name, layer in layers.items():
        fraction = float(layer["pattern"].removeprefix("unstructured:"))
        assert zeros[name] == removed_count(fraction, sizes[name])
        assert abs(zeros[name] - 0.6 * sizes[name]) <= 0.08 * sizes[name] + 1  # rounded
    assert sum(zeros.values()) == removed_count(0.6, sum(sizes.values()))
    for block in ("layers.0", "layers.1"):
        shares = [zeros[name] / sizes[name] for name in layers if block in name]
        assert max(shares) - min(shares) < 2 / min(sizes.values())
    (span, dense) = json.loads(printed)["patterns"]
    assert span.startswith("unstructured:0.")
    assert " to 0." in span
    assert dense == "dense"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("2:4", "--ignore", "lm_head"), 2, "--ignore lm_head: no linear layer"),
        (
            (
                "2:4",
                "--include",
                "re:(",
            ),
            2,
            "not a regular expression",
        ),
        (("2:4", "--sparsity-file", "/no/such.json"), 3, "/no/such.json: cannot be read"),
        (("structured:0.2", "--ignore", "re:.*"), 2, "--ignore with structured:0.2"),
        (("structured:0.2", "--allocation", "owl"), 2, "--allocation owl with pattern structured"),
        (("2:4", "--allocation", "owl"), 2, "which n:m and structured patterns cannot express"),
        (("2:4", "--allocation", "loss"), 2, "--allocation loss with pattern 2:4"),
        (("2:4", "--owl-spread", "0.1"), 2, "without --allocation owl"),
        (("unstructured:0.97", "--allocation", "owl"), 2, "use a spread from 0 to 0.03"),
        (("2:64",), 3, "32 inputs do not divide into the groups of 64"),
        (("unstructured:1.5",), 2, "between 0 and 1"),
        (("structured:1",), 2, "no heads or channels would be left"),
        (
            ("2:4", "--seqlen", "1"),
            2,
            "cannot cut 4 segments of 1 tokens: the model takes 2 to 128",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    tiny_llama: Path,
    tmp_path: Path,
    invoke: Invoke,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    command = ("prune", tiny_llama, *CALIBRATION, "--pattern", *arguments, "-o", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        actual, output, errors = invoke(*command, *more)
        assert (actual, output) == (code, ""), errors
        assert message in errors
        assert "Traceback" not in errors
    assert not list(tmp_path.rglob("manifest.json"))


def test_columns_are_no_pattern_of_one_layer(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"re:.*up_proj": "structured:0.25"}))
    common = ("prune", tiny_llama, *CALIBRATION, "--sparsity-file", path, "-o", tmp_path / "out")
    code, _, errors = invoke(*common, "--pattern", "2:4")
    assert code == 2
    assert "model.layers.0.mlp.up_proj is structured:0.25" in errors
    assert invoke(*common, "--pattern", "structured:0.5", "--keep-shape")[0] == 0


def test_calibration_shorter_than_a_segment_is_bad_input(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "short.txt").write_text("few words")
    code, _, errors = invoke(
        "prune",
        tiny_llama,
        "--pattern",
        "2:4",
        *CALIBRATION,
        "--calib",
        tmp_path / "short.txt",
        "-o",
        tmp_path / "out",
    )
    assert code == 3
    assert "9 tokens found, and 256 needed for 4 segments of 64 tokens" in errors


@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.5"])
def test_layers_and_inputs_without_signal_are_pruned_like_any_other(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, pattern: str
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    tensors["model.layers.0.post_attention_layernorm.weight"][:4] = 0.0  # inputs that are dead
    for name in ("gate_proj", "up_proj"):  # inputs of down_proj that are alike
        weight = tensors[f"model.layers.0.mlp.{name}.weight"]
        weight[8:16] = weight[:8]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    # Two tokens, so every Hessian is singular.
    few = ("--nsamples", "1", "--seqlen", "2")
    code, printed, errors = invoke("prune", model, "--pattern", pattern, *few, "-o", out, "--json")
    assert code == 0, errors
    result = json.loads(printed)
    assert result["pattern_holds"]
    layers = layers_of(out)
    assert layers["model.layers.0.self_attn.o_proj"]["relative_error"] == 0.0
    weights = load_file(out / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("sparsity", [0, 1])
def test_nothing_or_everything_may_go(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, sparsity: int
) -> None:
    out = tmp_path / "out"
    code, _, errors = invoke(
        "prune", tiny_llama, "--pattern", f"unstructured:{sparsity}", *CALIBRATION, "-o", out
    )
    assert code == 0, errors
    dense, pruned = (load_file(path / "model.safetensors") for path in (tiny_llama, out / "model"))
    for name, weight in pruned.items():
        if "_proj" in name and sparsity:
            assert not weight.any()
        else:
            assert torch.equal(weight, dense[name]), name


@pytest.mark.slow
def test_a_layer_that_cannot_be_solved_is_shown_wherever_results_are(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    for name in ("gate_proj", "up_proj"):  # their product overflows when it is squared
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e12
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    arguments = ("prune", model, "--pattern", "2:4", *CALIBRATION, "-o", out)
    code, printed, errors = invoke(*arguments, "--json")
    assert code == 0, errors
    (retry,) = json.loads(printed)["retries"]
    assert (retry["layer"], retry["solver"]) == (DOWN, "magnitude mask")
    assert layers_of(out)[DOWN]["failures"] == retry["failures"]
    said = f"{DOWN} was not solved: magnitude mask, without an update"
    assert said in " ".join(invoke(*arguments)[1].split())
    code, printed, errors = invoke("report", out, "--json")
    assert code == 0, errors
    assert any(said in notice for notice in checked(json.loads(printed))["notices"])
    for name in ("README.md", "report/report.md", "report/index.html"):
        # Markdown writes an underscore as \_.
        assert said in (out / name).read_text().replace("\\", ""), name


@pytest.mark.slow
def test_a_dry_run_estimates_time_memory_and_disk(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = ("-o", tmp_path / "out", "--dry-run")
    code, printed, errors = invoke(
        "prune",
        tiny_llama,
        "--pattern",
        "unstructured:0.5",
        *CALIBRATION,
        "--allocation",
        "owl",
        "--ignore",
        "re:.*layers.0.*",
        "--quantize",
        "int4:16",
        *out,
        "--json",
    )
    assert code == 0, errors
    plan = json.loads(printed)
    found = plan["estimate"]
    assert set(found["seconds"]) == {"survey", "collect", "solve", "tune", "forward", "quantize"}
    assert all(seconds > 0.0 for seconds in found["seconds"].values())
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert 1e8 < found["memory_bytes"] < 1e10
    # The model, the same in the journal, both once more while it is quantised, and the calibration
    # data between two blocks.
    assert plan["disk_bytes_needed"] > 4 * 4 * plan["parameters"]
    assert plan["linear_weights_removed"] == plan["linear_weights"] // 4
    assert len(plan["layers_left_dense"]) == 7
    code, table, errors = invoke("prune-export", tiny_llama, *SMALL, *out)
    assert code == 0, errors
    for said in ("estimated seconds", "eval ", "not estimated", "onnx, bench", "estimated from"):
        assert said in table
    assert not (tmp_path / "out").exists()
