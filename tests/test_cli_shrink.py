"""Structured patterns as a user of the command meets them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.bundles import checked
from tests.conftest import Invoke, MakeModel, stock_model
from tests.test_cli import JUDGING, TIMING, TUNING
from thanos_deploy.bundle.manifest import Bundle

pytestmark = pytest.mark.slow

CALIBRATION = ("--nsamples", "4", "--seqlen", "64")
REST = (*TUNING, *JUDGING, *TIMING)


def test_structured_gives_a_smaller_model_and_a_report_that_says_so(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    arguments = ("prune-export", tiny_llama, "--pattern", "structured:0.2", *CALIBRATION, *REST)
    code, output, errors = invoke(*arguments, "-o", out, "--json")
    assert code == 0, errors
    (report,) = checked(json.loads(output))["models"]
    dense, small = (stock_model(folder) for folder in (tiny_llama, out / "model"))
    counts = [sum(p.numel() for p in model.model.layers.parameters()) for model in (dense, small)]
    widths = report["widths"]
    assert [widths[f"block_parameters_{when}"] for when in ("before", "after")] == counts
    assert widths["removed"] == pytest.approx(1 - counts[1] / counts[0])
    assert widths["removed"] >= 0.2
    assert widths["heads"]["after"] == [small.config.num_attention_heads]
    assert widths["channels"]["after"] == [small.config.intermediate_size]
    for kind in ("model", "onnx"):
        assert report["bytes"][kind]["pruned"] < report["bytes"][kind]["dense"]
    assert any("were cut out" in sentence for sentence in report["verdict"])
    assert not any("zeros" in sentence for sentence in report["verdict"])
    card = (out / "README.md").read_text()
    assert "no code comes with" in card
    assert f"| feed-forward channels | 48 | {small.config.intermediate_size} |" in card
    blocks = json.loads((out / "layers.json").read_text())
    assert [len(block["channels"]) for block in blocks] == [small.config.intermediate_size] * 2
    code, table, _ = invoke(*arguments, "-o", out)
    assert code == 0
    assert "parameters of the blocks" in table


def test_widths_by_loss_are_for_onnx_and_the_card_says_so(
    make_model: MakeModel, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    pattern = ("--pattern", "structured:0.2", "--allocation", "loss", "--shrink", "ffn")
    model = make_model("llama", num_hidden_layers=3)
    code, output, errors = invoke(
        "prune-export", model, *pattern, *CALIBRATION, *REST, "-o", out, "--json"
    )
    assert code == 0, errors
    (report,) = checked(json.loads(output))["models"]
    assert report["widths"]["stock_config"] is False
    assert any("widths.json declares them" in sentence for sentence in report["verdict"])
    assert 'td.load_model("model")' in (out / "README.md").read_text()
    Bundle.open(out).verify()


def test_a_dry_run_prints_the_plan_that_the_run_then_follows(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    arguments = ("prune", tiny_llama, "--pattern", "structured:0.2", *CALIBRATION)
    out = tmp_path / "out"
    code, output, _ = invoke(*arguments, "-o", out, "--dry-run", "--json")
    assert code == 0
    assert not out.exists()
    plan = json.loads(output)
    planned, estimate = plan["widths"], plan["estimate"]
    assert all(block["predicted_loss"] > 0 for block in planned["blocks"])
    assert planned["block_parameters_after"] < planned["block_parameters_before"]
    code, output, _ = invoke(*arguments, "-o", out, "--json")
    assert code == 0
    made = json.loads(output)
    assert made["widths"] == planned
    assert set(estimate["seconds"]) == {"survey", "collect", "solve", "forward"}
    for activity, seconds in estimate["seconds"].items():
        assert seconds > 0.0
        assert made[f"{activity}_seconds"] > 0.0
    assert estimate["total_seconds"] == pytest.approx(sum(estimate["seconds"].values()))
    assert 1e8 < estimate["memory_bytes"] < 1e10
    code, table, _ = invoke(*arguments, "-o", tmp_path / "other", "--dry-run")
    assert code == 0
    for said in ("kv heads", "predicted loss", "estimated seconds", "survey ", "estimated memory"):
        assert said in table
    code, output, errors = invoke(
        "prune-export",
        *arguments[1:],
        "--dense-target",
        0.5,
        "--recover",
        4,
        "--quantize",
        "int8",
        *REST,
        "-o",
        tmp_path / "other",
        "--dry-run",
        "--json",
    )
    assert code == 0, errors
    estimate = json.loads(output)["estimate"]
    assert estimate["seconds"]["eval"] > 0.0
    assert estimate["not_estimated"] == ["recover", "quantize", "onnx", "bench"]


def test_recovery_is_recorded_repeatable_and_told(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    arguments = ("prune-export", tiny_llama, "--pattern", "structured:0.2", *CALIBRATION, *REST)
    code, output, errors = invoke(*arguments, "--recover", 60, "-o", out, "--json")
    assert code == 0, errors
    (report,) = checked(json.loads(output))["models"]
    assert any("--recover 60" in command for command in report["commands"])
    assert "trained on 60 segments of the calibration text" in (out / "README.md").read_text()
    bundle = Bundle.open(out)
    bundle.verify()
    recovery = bundle.stages["prune"].result["recovery"]
    assert recovery["divergence"][-1] < recovery["divergence"][0]
    code, _, errors = invoke(*arguments, "-o", out)
    assert code == 2
    assert "recover" in errors


def test_a_recovered_two_four_model_still_is_two_four(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    pattern = ("--pattern", "2:4", "--recover", 4)
    code, _, errors = invoke("prune", tiny_llama, *pattern, *CALIBRATION, "-o", out)
    assert code == 0, errors
    weights = load_file(out / "model" / "model.safetensors")
    for name, weight in weights.items():
        if "_proj" in name:
            assert int((weight.reshape(-1, 4) != 0).sum(dim=1).max()) <= 2, name
    code, output, errors = invoke("verify", out)
    assert code == 0, errors + output


def test_the_dense_models_own_text_is_kept_and_the_same_again(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    text = tmp_path / "signs.txt"
    text.write_text("#$%&*+/<=>@" * 200)  # a random model writes nothing else
    how = ("--pattern", "2:4", "--preset", "fast", "--nsamples", 4, "--seqlen", 40)
    run = ("prune", tiny_llama, *how, "--calib", text, "--recover-text")
    for name in ("one", "other"):
        code, _, errors = invoke(*run, "own", "--recover", 3, "-o", tmp_path / name)
        assert code == 0, errors
    kept = [tmp_path / name / "own-text.jsonl" for name in ("one", "other")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    assert len([json.loads(line)["text"] for line in kept[0].open(encoding="utf-8")]) == 3
    bundle = Bundle.open(tmp_path / "one")
    bundle.verify()
    assert "own-text.jsonl" in bundle.stages["prune"].files
    assert bundle.stages["prune"].result["recovery"]["drawn"] >= 3
    assert invoke("report", tmp_path / "one")[0] == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert "3 segments of text that the dense model wrote (`own-text.jsonl`)" in card
    for asked, wanted, message in (
        (("chat", "--recover", 3), 3, "has no chat template"),
        (("own",), 2, "--recover-text own without --recover"),
        (("calib", "--recover-rank", 8), 2, "--recover-rank 8 without --recover"),
    ):
        code, _, errors = invoke(*run, *asked, "-o", tmp_path / "refused")
        assert code == wanted
        assert message in errors


def test_keep_shape_sets_columns_to_zero_and_changes_no_shape(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    pattern = ("--pattern", "structured:0.25", "--keep-shape")
    code, _, errors = invoke("prune", tiny_llama, *pattern, *CALIBRATION, "-o", out)
    assert code == 0, errors
    dense, masked = (load_file(f / "model.safetensors") for f in (tiny_llama, out / "model"))
    assert {name: w.shape for name, w in dense.items()} == {n: w.shape for n, w in masked.items()}
    for name, weight in masked.items():
        if "_proj" in name:
            zero = int((weight == 0).all(dim=0).sum())
            assert zero == weight.shape[1] // 4, name
        else:
            assert torch.equal(weight, dense[name])


@pytest.mark.parametrize(
    ("arguments", "message", "advice"),
    [
        (
            ("structured:0.2", "--outlier-rows", "0.1"),
            "with --outlier-rows",
            "--keep-shape",
        ),
        (("structured:0.2", "--method", "wanda"), "only the method thanos", "--keep-shape"),
        (("structured:0.99",), "no heads or channels would be left", "at most structured:0."),
        (("structured:0.5", "--shrink", "heads"), "no heads would be left", "--shrink both"),
        (("structured:0.2", "--block-size", "64"), "with --block-size", "leave it out"),
        (("structured:0.2", "--true-sequential"), "with --true-sequential", "leave it out"),
        (("structured:0.2", "--calib-forward", "bf16"), "with --calib-forward", "leave it out"),
        (
            ("structured:0.2", "--preset", "paper"),
            "--preset paper is not available with structured:0.2",
            "--keep-shape",
        ),
        (
            ("structured:0.2", "--ffn-multiple", "49"),
            "--ffn-multiple 49: a block has",
            "use a multiple from 1 to",
        ),
        (("2:4", "--shrink", "ffn"), "--shrink with pattern 2:4", "structured patterns"),
        (("2:4", "--keep-shape"), "--keep-shape with pattern 2:4", "structured patterns"),
        (
            ("structured:0.2", "--keep-shape", "--allocation", "loss"),
            "--allocation loss with pattern structured:0.2 and --keep-shape",
            "leave it out",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_work(
    tiny_llama: Path,
    tmp_path: Path,
    invoke: Invoke,
    arguments: tuple[str, ...],
    message: str,
    advice: str,
) -> None:
    pattern, *options = arguments
    common = ("--pattern", pattern, *options, *CALIBRATION)
    for command in (("prune",), ("prune", "--dry-run"), ("prune-export", *REST)):
        code, output, errors = invoke(
            command[0], tiny_llama, *common, *command[1:], "-o", tmp_path / "out"
        )
        assert (code, output) == (2, ""), errors
        assert message in errors
        assert advice in errors
    assert not list(tmp_path.rglob("manifest.json"))
