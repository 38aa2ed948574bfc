"""gpt_oss as it is published, against MXFP4 by its definition."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import stock_model
from tests.mxfp4 import packed, unpacked
from tests.test_published import REPOSITORIES, publish
from thanos_deploy.errors import ModelError
from thanos_deploy.model.locate import locate
from thanos_deploy.model.mxfp4 import is_mxfp4, write_bfloat16

GPT_OSS = REPOSITORIES["openai/gpt-oss-20b"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_every_weight_is_what_its_bits_mean(tmp_path: Path) -> None:
    publish(tmp_path / "published", GPT_OSS)
    assert is_mxfp4(tmp_path / "published")
    assert not locate(str(tmp_path / "published")).is_ordinary
    write_bfloat16(tmp_path / "published", tmp_path / "ordinary")
    before, after = tensors_of(tmp_path / "published"), tensors_of(tmp_path / "ordinary")
    experts = [name.removesuffix("_blocks") for name in before if name.endswith("_blocks")]
    assert len(experts) == 4
    for name in experts:
        wanted = unpacked(before.pop(f"{name}_blocks"), before.pop(f"{name}_scales"))
        found = after.pop(name)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.double(), wanted)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "ordinary" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not is_mxfp4(tmp_path / "ordinary")
    assert stock_model(tmp_path / "ordinary").config.num_local_experts == 4


def test_numbers_of_every_size_are_kept_as_the_format_has_them() -> None:
    whole = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole *= 2.0 ** torch.arange(-20, 44)[:, None]
    made = packed("one", whole)
    again = packed("one", unpacked(made["one_blocks"], made["one_scales"]))
    assert torch.equal(
        unpacked(**{name.removeprefix("one_"): its for name, its in made.items()}),
        unpacked(**{name.removeprefix("one_"): its for name, its in again.items()}),
    )


@pytest.mark.parametrize("fault", ["missing", "another shape", "floats"])
def test_blocks_without_their_scales_are_refused(tmp_path: Path, fault: str) -> None:
    publish(tmp_path / "published", GPT_OSS)
    for path in (tmp_path / "published").glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("_scales")]:
            scales = tensors.pop(name)
            if fault == "another shape":
                tensors[name] = scales[..., :1].contiguous()
            elif fault == "floats":
                tensors[name] = scales.float()
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"_blocks is U8.*its scales are.*not MXFP4"):
        write_bfloat16(tmp_path / "published", tmp_path / "ordinary")
