"""SmolLM2-135M-Instruct with a fifth of its blocks' parameters cut out."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.engine import open_engine, stop_ids
from runtime.generate import generate
from tests.conftest import stock_model
from tests.exporters.test_genai import greedy_by_genai
from tests.real_model import prune_real, require_engine, require_greedy
from tests.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shrunk(
    tmp_path_factory: pytest.TempPathFactory, store: Store
) -> tuple[Path, Path, dict[str, Any]]:
    """Bundle, bundle of the dense model, report."""
    out = tmp_path_factory.mktemp("shrunk") / "out"
    return out, *prune_real(out, store, "structured:0.2")


def test_the_shrunk_model_is_smaller_in_every_count_and_loads_with_the_stock_loader(
    shrunk: tuple[Path, Path, dict[str, Any]],
) -> None:
    out, _, report = shrunk
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
    shrunk: tuple[Path, Path, dict[str, Any]],
) -> None:
    """Zeros in the dense model's shapes give the logits that the smaller shapes give."""
    small, masked = stock_model(shrunk[0] / "model"), stock_model(shrunk[1] / "model")
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
    shrunk: tuple[Path, Path, dict[str, Any]],
) -> None:
    out = shrunk[0]
    prompt = AutoTokenizer.from_pretrained(out / "model")("Once upon a time")["input_ids"]
    ids = list(generate(open_engine(out), prompt, new_tokens=32))
    assert len(ids) == 32
    require_greedy(out / "model", prompt, ids)
    by_genai = greedy_by_genai(out / "genai", prompt, 32)
    assert by_genai == ids[: len(by_genai)]
    assert len(by_genai) == 32 or by_genai[-1] in stop_ids(out / "model")


@pytest.mark.tensorrt
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_an_engine_of_the_shrunk_model_holds_every_linear_layer(
    shrunk: tuple[Path, Path, dict[str, Any]],
) -> None:
    require_engine(shrunk[0], sparse=False)
