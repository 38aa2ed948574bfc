"""`vllm serve` on shrunk and on 2:4 models, beside transformers: the same greedy tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import thanos_deploy as td
from tests.bitmask import bitmask_folder
from tests.conftest import MakeModel, stock_model
from tests.vllm.conftest import TWO_RANKS, greedy, needs_vllm, refusal, serving
from thanos_deploy.measure.quality import TextQuality
from thanos_deploy.model.loaders import LOADERS

pytestmark = needs_vllm

PROMPTS = [[10, 60, 200, 4, 77], [5, 9, 31]]
(TESTED,) = (loader.tested for loader in LOADERS if loader.tested is not None)
SMALL: td.PruneOptions = {"nsamples": 4, "seqlen": 64}
TWO_FOUR: td.PruneOptions = {**SMALL, "method": "magnitude"}

# vLLM's attention on a CPU takes heads of 32; OPT has no size of a head beside the others.
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
SIZES_OF_OPT = {
    **{"hidden_size": 128, "word_embed_proj_dim": 128, "num_attention_heads": 4},
    "ffn_dim": 512,
}


def model_of(make_model: MakeModel, model_type: str) -> Path:
    return make_model(model_type, **(SIZES_OF_OPT if model_type == "opt" else SIZES))


def exported(bundle: td.Bundle) -> Path:
    """The folder for vLLM."""
    bundle.export("vllm")
    return bundle.path / "vllm"


def expected(folder: Path) -> list[list[int]]:
    """The tokens of transformers, without a cache and in float32."""
    model = stock_model(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(16):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=[] if each == "llama" else pytest.mark.slow)
        for each in TESTED.model_types
    ],
)
def test_vllm_answers_with_a_shrunk_model_as_transformers_does(
    make_model: MakeModel, model_type: str, tmp_path: Path
) -> None:
    model = model_of(make_model, model_type)
    how: td.PruneOptions = {**SMALL, "shrink": "ffn" if model_type == "opt" else "both"}
    bundle = td.prune(model, pattern="structured:0.3", out=tmp_path / "out", **how)
    folder = exported(bundle)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    with serving(folder, "--enforce-eager") as client:
        assert greedy(client, folder, PROMPTS) == expected(bundle.model_path)


@pytest.mark.slow
def test_vllm_serves_a_model_without_some_of_its_blocks(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Blocks with a sliding window and without one are left."""
    model = make_model(
        "gemma3_text",
        **SIZES,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
    )
    how: td.PruneOptions = {**SMALL, "allocation": "blocks"}
    bundle = td.prune(model, pattern="structured:0.2", out=tmp_path / "out", **how)
    config = json.loads((bundle.model_path / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 3
    folder = exported(bundle)
    with serving(folder, "--enforce-eager") as client:
        assert greedy(client, folder, PROMPTS) == expected(bundle.model_path)


def test_vllm_multiplies_with_the_packed_layers_of_a_mixed_model(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """Some layers are ignored, others have other patterns; the quality is PyTorch's."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"re:.*layers.1.mlp.gate_proj": "unstructured:0.6"}))
    how: td.PruneOptions = {
        **TWO_FOUR,
        "ignore": ["re:.*layers.0.mlp.down_proj"],
        "sparsity_file": str(own),
    }
    bundle = td.prune(model_of(make_model, "llama"), pattern="2:4", out=tmp_path / "out", **how)
    folder = exported(bundle)
    packed = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    # Gate and up are one layer in vLLM.
    assert len(packed) == 14 - 3
    with serving(folder, "--enforce-eager") as client:
        assert greedy(client, folder, PROMPTS) == expected(bundle.model_path)
        url = str(client.base_url).removesuffix("/v1/")
        served = td.evaluate(bundle.path, runtime="vllm", url=url, segments=3, seqlen=60)
    by_torch = td.evaluate(bundle.path, segments=3, seqlen=60)
    assert isinstance(served, TextQuality)
    assert isinstance(by_torch, TextQuality)
    assert served.value == pytest.approx(by_torch.value, rel=1e-4)


def test_vllm_compiles_a_packed_model_with_biases(make_model: MakeModel, tmp_path: Path) -> None:
    model = model_of(make_model, "opt")
    bundle = td.prune(model, pattern="2:4", out=tmp_path / "out", **TWO_FOUR)
    folder = exported(bundle)
    with serving(folder) as client:
        assert greedy(client, folder, PROMPTS) == expected(bundle.model_path)


@pytest.fixture
def two_four(make_model: MakeModel, tmp_path: Path) -> td.Bundle:
    model = model_of(make_model, "llama")
    return td.prune(model, pattern="2:4", out=tmp_path / "out", **TWO_FOUR)


@pytest.mark.slow
def test_two_ranks_serve_a_converted_checkpoint(two_four: td.Bundle, tmp_path: Path) -> None:
    """Each has its rows and columns of the packed weights; the checkpoint is sparse-24-bitmask."""
    old, folder = tmp_path / "old", tmp_path / "new"
    bitmask_folder(two_four.model_path, old, keep_weight=True)
    for path in two_four.model_path.glob("token*.json"):
        shutil.copy(path, old)
    td.export(old, "vllm", to=folder)
    with serving(folder, "--enforce-eager", *TWO_RANKS) as client:
        assert greedy(client, folder, PROMPTS) == expected(two_four.model_path)


def test_a_flipped_byte_is_refused_before_weights_are_used(two_four: td.Bundle) -> None:
    folder = exported(two_four)
    (weights,) = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    said = refusal(folder)
    assert "SHA-256" in said
    assert "fetch the checkpoint again" in said


@pytest.mark.slow
def test_a_config_that_names_other_layers_than_are_packed_is_refused(two_four: td.Bundle) -> None:
    folder = exported(two_four)
    config = json.loads((folder / "config.json").read_text())
    missing = config["quantization_config"]["layers"].pop()
    (folder / "config.json").write_text(json.dumps(config))
    said = refusal(folder)
    assert f"only one of the two has {missing}" in said
    assert "export the model again" in said


@pytest.mark.slow
def test_an_untested_version_of_vllm_serves_after_one_warning(
    two_four: td.Bundle, tmp_path: Path
) -> None:
    """The tested vLLM, whose record names a later version."""
    record = tmp_path / "later" / "vllm-99.0+cpu.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 99.0+cpu\n")
    folder = exported(two_four)
    with serving(folder, "--enforce-eager", modules=[record.parent]) as client:
        assert greedy(client, folder, PROMPTS) == expected(two_four.model_path)
    (log,) = folder.parent.glob("vllm-*.log")
    assert log.read_text().count("is tested with vLLM 0.32, and this is 99.0+cpu") == 1


@pytest.mark.slow
def test_adapters_are_refused_before_an_engine_starts(two_four: td.Bundle) -> None:
    said = refusal(exported(two_four), "--enable-lora")
    *_, error, fix = said.strip().splitlines()
    assert "LoRA is not supported on packed 2:4 layers" in error
    assert "leave out --enable-lora" in fix
    assert "EngineCore" not in said


@pytest.mark.slow
def test_another_quantisation_is_refused(two_four: td.Bundle) -> None:
    said = refusal(exported(two_four), "--quantization", "awq")
    assert "does not match the quantization" in said
