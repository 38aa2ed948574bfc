import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import MakeModel, stock_model
from thanos_deploy import checkpoint
from thanos_deploy.checkpoint import (
    Checkpoint,
    Weights,
    WeightsCopy,
    convert_gguf,
    load_tokenizer,
    locate,
)
from thanos_deploy.errors import ModelError, PlatformError


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@settings(deadline=None, max_examples=40)
@given(tensors=st.dictionaries(st.text("abc.é", min_size=1), st.tuples(shapes, dtypes), min_size=1))
def test_a_copy_written_in_any_order_is_what_the_library_reads(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    original = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    save_file(original, folder / "model.safetensors")
    (folder / "out").mkdir()
    weights = Weights(folder)
    with WeightsCopy(weights, folder / "out", None) as copy:
        for name in reversed(copy.missing):
            copy.write(name, weights.read([name])[name])
    reread = load_file(folder / "out" / "model.safetensors")
    assert reread.keys() == original.keys()
    assert all(torch.equal(reread[name], original[name]) for name in original)


def test_tensors_are_read_and_copied_in_pieces(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_ENTRIES_AT_ONCE", 1000)
    weights = Weights(make_model("llama", dtype=torch.bfloat16))
    original = load_file(weights.folder / "model.safetensors")
    assert {name: one.dtype for name, one in weights.read(original).items()} == weights.dtypes
    for name, tensor in weights.read(original, torch.float32).items():
        assert torch.equal(tensor, original[name].float())
    with WeightsCopy(weights, tmp_path, None) as copy:
        for name in copy.missing:
            copy.write_pieces(name, weights.pieces(name))
    copied = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(copied[name], original[name]) for name in original)


def test_a_local_folder_is_known_by_its_content(model: Path) -> None:
    before = locate(str(model))
    assert (before.kind, before.name, before.revision) == ("folder", "damaged", "")
    assert locate(str(model)) == before
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert locate(str(model)).sha256 != before.sha256


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "missing.gguf", "a/b/c"])
def test_a_missing_path_is_bad_input(name: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        locate(name)


def test_a_hub_id_that_is_not_cached_needs_the_network() -> None:
    with pytest.raises(PlatformError, match="nobody/nothing"):
        locate("nobody/nothing")


def test_a_hub_id_is_found_in_the_hubs_local_cache(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = locate("someone/tiny")
    assert (source.kind, source.name, source.revision) == ("hub", "someone/tiny", commit)
    assert source.sha256 == locate(str(tiny_llama)).sha256
    assert Checkpoint.open(source.path).config.model_type == "llama"


def test_a_file_that_is_no_model_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not \.gguf"):
        locate(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ("{", "not a readable model configuration"),
        ("[]", "not a readable model configuration"),
        ('{"model_type": "mamba"}', "'mamba' is not supported; supported are .*llama"),
        ("{}", "'None' is not supported"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a readable model configuration"),
    ],
)
def test_an_unusable_configuration_is_bad_input(
    model: Path, content: str | None, message: str
) -> None:
    if content is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(model)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000])
def test_a_truncated_safetensors_file_is_bad_input(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors: not a readable safetensors file"):
        Checkpoint.open(model)


def test_a_header_that_lies_is_bad_input(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = (2**62).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        Checkpoint.open(model)


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin, which may run code"):
        Checkpoint.open(model)


def test_a_missing_shard_is_named(model: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: missing"):
        Checkpoint.open(model)


def test_an_unreadable_index_is_bad_input(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not a readable index"):
        Checkpoint.open(model)


def test_a_missing_tensor_is_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    checkpoint = Checkpoint.open(model)
    with pytest.raises(ModelError, match=r"no tensor model.layers.1.mlp.up_proj.weight"):
        checkpoint.stored_name("model.layers.1.mlp.up_proj.weight")


def test_quantised_tensors_are_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is stored as I8"):
        Checkpoint.open(model)


def test_nan_weights_are_refused_with_their_count(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, :2] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=f"2 of 1536 entries of {name} are NaN"):
        Checkpoint.open(model).weights.read([name])


def test_weights_without_the_base_models_prefix_are_found(make_model: MakeModel) -> None:
    folder = make_model("opt")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    name = "decoder.layers.0.fc1.weight"
    assert checkpoint.stored_name(f"model.{name}") == name
    stock_model(folder)  # such folders exist and load


def test_a_folder_without_a_tokenizer_is_bad_input(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_corrupt_gguf_is_bad_input_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"model.gguf: not a readable GGUF file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_of_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' is not supported"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
