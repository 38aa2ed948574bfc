"""What MODEL may be besides a folder and a hub id, and folders that a download left unfinished."""

import json
import shutil
from pathlib import Path

import pytest

from thanos_deploy.errors import ModelError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.locate import locate


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_a_bundle_is_its_model(two_four_bundle: Path) -> None:
    found = locate(str(two_four_bundle))
    assert found.path == two_four_bundle / "model"
    assert found.source.sha256 == locate(str(two_four_bundle / "model")).source.sha256


def test_a_file_of_weights_is_the_model_of_its_folder(model: Path) -> None:
    assert locate(str(model / "model.safetensors")) == locate(str(model))
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    with pytest.raises(
        ModelError, match=r"other\.safetensors: .* from other files: model\.safetensors"
    ):
        locate(str(model / "other.safetensors"))
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json beside this file"):
        locate(str(model / "model.safetensors"))


@pytest.mark.parametrize(
    "left",
    [
        "model.safetensors.part",
        ".cache/huggingface/download/abc.incomplete",
        "model.safetensors.aria2",
    ],
)
@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors"])
def test_an_interrupted_download_is_said(model: Path, left: str, lacking: str) -> None:
    (model / lacking).unlink()
    (model / left).parent.mkdir(parents=True, exist_ok=True)
    (model / left).write_bytes(b"half")
    with pytest.raises(ModelError, match=f"download was interrupted: {Path(left).name}") as raised:
        Checkpoint.open(model)
    assert "hf download" in raised.value.fix


def test_a_shard_that_the_hubs_cache_has_half_of_is_said(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(model, snapshot)
    shard = "model-00001-of-00001.safetensors"
    (snapshot / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": shard}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "abc.incomplete").write_bytes(b"half")
    with pytest.raises(ModelError, match=rf"{shard}: missing.*interrupted: abc\.incomplete"):
        Checkpoint.open(snapshot)


def test_a_pointer_in_the_place_of_the_weights_is_said(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (model / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match="is a pointer of Git LFS") as raised:
        Checkpoint.open(model)
    assert "git lfs pull" in raised.value.fix


def test_a_configuration_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert locate(str(tmp_path)).is_ordinary
    with pytest.raises(ModelError, match="it is nested too deeply"):
        Checkpoint.open(tmp_path)
