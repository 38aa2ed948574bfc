"""Folders of compressed-tensors, as stock transformers loads them."""

import shutil
from pathlib import Path

import pytest
import torch

import exporters.compressed_tensors
import thanos_deploy as td
from tests.conftest import VOCABULARY, MakeModel, stock_model
from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.quantise import quantise_model
from thanos_deploy.solver.grid import parse

SEGMENTS = torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0))


def quantised(model: Path, out: Path, spelling: str) -> tuple[Checkpoint, Codes]:
    for name in ("model", "codes"):
        (out / name).mkdir()
    quantise_model(Checkpoint.open(model), SEGMENTS, out / "model", out / "codes", parse(spelling))
    return Checkpoint.open(out / "model"), Codes.open(out / "codes")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("spelling", ["int4:16", "int8:row"])
def test_stock_transformers_computes_what_the_checkpoint_does(
    make_model: MakeModel, tmp_path: Path, model_type: str, spelling: str
) -> None:
    checkpoint, codes = quantised(make_model(model_type), tmp_path, spelling)
    folder = tmp_path / "compressed"
    folder.mkdir()
    result = exporters.compressed_tensors.export(checkpoint, codes, folder)
    assert (result.grid, result.layers) == (spelling, len(checkpoint.linears))
    assert result.ratio < 0.8
    model = stock_model(folder, dtype=torch.float32)
    with torch.inference_mode():
        wanted = load_model(checkpoint.folder)(SEGMENTS).logits
        torch.testing.assert_close(model(SEGMENTS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_computes_the_same_to_the_last_bit(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """The checkpoint's values are rounded to bfloat16, and so are those of the codes."""
    source = make_model("llama", dtype=torch.bfloat16)
    checkpoint, codes = quantised(source, tmp_path, "int8:16")
    folder = tmp_path / "compressed"
    folder.mkdir()
    exporters.compressed_tensors.export(checkpoint, codes, folder)
    with torch.inference_mode():
        found, wanted = (
            stock_model(one, dtype=torch.bfloat16)(SEGMENTS).logits
            for one in (folder, checkpoint.folder)
        )
    assert found.equal(wanted)


@pytest.mark.parametrize(
    ("model_type", "spelling", "complaint"),
    [
        ("llama", "int4:32", "down_proj: 48 inputs do not divide into the groups of 32"),
        ("gpt2", "int4:16", "weights as .inputs, outputs."),
        ("llama", "int4:16:asym", "does not load zero points"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    make_model: MakeModel, tmp_path: Path, model_type: str, spelling: str, complaint: str
) -> None:
    checkpoint, codes = quantised(make_model(model_type), tmp_path, spelling)
    with pytest.raises(UsageError, match=complaint):
        exporters.compressed_tensors.export(checkpoint, codes, tmp_path)


def test_codes_of_another_model_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    other = make_model("llama")
    _, codes = quantised(other, tmp_path, "int4:16")
    with pytest.raises(InputError, match="do not match the weight"):
        exporters.compressed_tensors.export(Checkpoint.open(other), codes, tmp_path)
    (tmp_path / "codes" / "00001.safetensors").write_bytes(b"{}")
    with pytest.raises(InputError, match="codes: not readable"):
        Codes.open(tmp_path / "codes")
    for path in (tmp_path / "codes").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="there are no codes"):
        Codes.open(tmp_path / "codes")


def test_a_bundle_that_was_not_quantised_is_refused(two_four_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(two_four_bundle, out)
    with pytest.raises(UsageError, match="was not quantised"):
        td.Bundle(out).export("compressed-tensors")
