"""GGUF files whose heads claim more than the files have; the first kinds were found by fuzzing."""

import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.errors import ModelError
from thanos_deploy.model.convert import convert_gguf
from thanos_deploy.model.gguf_head import architecture


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "bc"])
    writer.add_token_scores([0.5, 1.0])
    writer.add_rope_freq_base(1e4)
    writer.add_bool("general.flag", True)
    writer.add_array("general.nested", [[1, 2], [3]])
    writer.add_tensor("w", np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_whole_file_is_taken(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(whole)
    assert architecture(path) == "llama"
    assert len(gguf.GGUFReader(path).tensors) == 1


def counted(name: bytes, *, array: bool) -> Callable[[bytes], int]:
    """Where the count of a value stands: behind its name, its type, and the type of its items."""
    return lambda content: content.index(name) + len(name) + (8 if array else 4)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda _: 8, id="tensors"),
        pytest.param(lambda _: 16, id="values"),
        pytest.param(lambda _: 24, id="length of a name"),
        pytest.param(counted(b"general.architecture", array=False), id="length of a string"),
        pytest.param(counted(b"tokenizer.ggml.tokens", array=True), id="strings"),
        pytest.param(counted(b"tokenizer.ggml.scores", array=True), id="floats"),
        pytest.param(counted(b"general.nested", array=True), id="arrays"),
    ],
)
@pytest.mark.parametrize("count", [1 << 60, (1 << 64) - 1, 100_000])
def test_a_count_that_lies_is_refused_at_once(
    place: Callable[[bytes], int], count: int, whole: bytes, tmp_path: Path
) -> None:
    at = place(whole)
    path = tmp_path / "lies.gguf"
    path.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        convert_gguf(path, tmp_path / "out")


@given(st.data())
def test_what_ends_within_its_head_is_refused(whole: bytes, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, whole.index(b"general.nested")))
    with tempfile.NamedTemporaryFile() as file:
        file.write(whole[:end])
        file.flush()
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            architecture(Path(file.name))


def test_a_block_with_a_number_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor(f"blk.{'9' * 5000}.w", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="tensors of 0 blocks, and claims to have 1"):
        architecture(path)
