"""GGUF files whose heads describe another model than their tensors make; found by fuzzing."""

from pathlib import Path

import pytest

from tests.conftest import MakeModel
from tests.gguf_file import write_gguf
from thanos_deploy.errors import ModelError
from thanos_deploy.model.convert import convert_gguf


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("num_hidden_layers", 1 << 31),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("hidden_size", 1 << 21),
        ("hidden_size", 1 << 31),
        ("hidden_size", 16),
        ("intermediate_size", 1 << 31),
        ("intermediate_size", 16),
        ("num_key_value_heads", 1),
    ],
)
def test_a_head_that_claims_another_model_is_refused_before_that_model_is_made(
    make_model: MakeModel, tmp_path: Path, entry: str, value: int
) -> None:
    folder = make_model("qwen2", max_position_embeddings=512)
    write_gguf(folder, tmp_path / "model.gguf", **{entry: value})
    with pytest.raises(ModelError, match=r"model\.gguf: (its tensors|not a readable)"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
