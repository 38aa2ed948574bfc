from pathlib import Path

import pytest

from tests.conftest import MODEL_TYPES, VOCABULARY, MakeModel
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.parts import part_bytes


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_parts_are_the_whole(model_type: str, make_model: MakeModel) -> None:
    folder = make_model(model_type)
    sizes = part_bytes(Checkpoint.open(folder))
    (file,) = folder.glob("*.safetensors")
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert sum(sizes.values()) == file.stat().st_size - header
    assert sizes["attention"] > 0
    assert sizes["mlp"] > 0
    assert sizes["norms"] < sizes["attention"]


def test_each_weight_of_a_llama_is_where_it_belongs(tiny_llama: Path) -> None:
    hidden, channels, heads, kv_heads, blocks = 32, 48, 4, 2, 2
    head = hidden // heads
    assert part_bytes(Checkpoint.open(tiny_llama)) == {
        "embeddings": 4 * VOCABULARY * hidden,
        "attention": 4 * blocks * hidden * head * (2 * heads + 2 * kv_heads),
        "mlp": 4 * blocks * 3 * hidden * channels,
        "norms": 4 * hidden * (2 * blocks + 1),
        "head": 0,  # tied
    }


def test_an_output_head_of_its_own_is_counted_as_such(make_model: MakeModel) -> None:
    sizes = part_bytes(Checkpoint.open(make_model("qwen2")))
    assert sizes["head"] == sizes["embeddings"] > 0
