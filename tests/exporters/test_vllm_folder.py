"""The folder for vLLM; `tests/vllm` serves one."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime.vllm_plugin
from exporters import targets, vllm
from exporters.targets.vllm import VllmResult
from tests.bitmask import bitmask_folder
from tests.conftest import Exported, Invoke, MakeModel
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import IntegrityError, ModelError, UsageError
from thanos_deploy.model import quantization
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.packed_folder import unpack_folder
from thanos_deploy.model.weights import Weights
from thanos_deploy.pattern import SemiStructured

TWO_FOUR = SemiStructured(2, 4)


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def export(checkpoint: Checkpoint, destination: Path, *, dense: tuple[str, ...] = ()) -> VllmResult:
    destination.mkdir()
    patterns = dict.fromkeys((name for name in checkpoint.linears if name not in dense), TWO_FOUR)
    return vllm.export(checkpoint, destination, patterns=patterns)


@pytest.mark.parametrize(
    "model_type",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "gpt2"))],
)
def test_the_folder_holds_the_model_and_says_which_layers_are_packed(
    exported_two_four: Exported, model_type: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(exported_two_four(model_type) / "model")
    result = export(checkpoint, tmp_path / "vllm")
    assert (result.packed, result.dense) == (len(checkpoint.linears), 0)
    config = config_of(tmp_path / "vllm")
    assert config.pop("quantization_config") == quantization.entry(checkpoint.linears)
    assert config == config_of(checkpoint.folder)
    quantization.require_intact(tmp_path / "vllm", checkpoint.linears)
    (tmp_path / "again").mkdir()
    unpack_folder(tmp_path / "vllm", tmp_path / "again")
    again = Weights(tmp_path / "again")
    for name in checkpoint.weights.shapes:
        assert torch.equal(again.read([name])[name], checkpoint.weights.read([name])[name])
    assert {path.name for path in (tmp_path / "vllm").glob("token*.json")} == {
        path.name for path in checkpoint.folder.glob("token*.json")
    }


def test_parts_that_vllm_runs_as_one_are_stored_alike(
    exported_two_four: Exported, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(exported_two_four("llama") / "model")
    block = "model.layers.0."
    result = export(
        checkpoint,
        tmp_path / "vllm",
        dense=(f"{block}self_attn.k_proj", f"{block}mlp.down_proj"),
    )
    assert result.dense_beside == (f"{block}self_attn.q_proj", f"{block}self_attn.v_proj")
    packed = set(config_of(tmp_path / "vllm")["quantization_config"]["layers"])
    assert {name for name in checkpoint.linears if name not in packed} == {
        *(f"{block}self_attn.{part}_proj" for part in "qkv"),
        f"{block}mlp.down_proj",
    }


def test_without_two_four_the_weights_are_the_files_of_the_model(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    result = vllm.export(Checkpoint.open(tiny_llama), tmp_path / "vllm", patterns={})
    assert (result.packed, result.ratio) == (0, 1.0)
    assert config_of(tmp_path / "vllm") == config_of(tiny_llama)
    name = "model.safetensors"
    assert (tmp_path / "vllm" / name).samefile(tiny_llama / name)


def test_a_bundle_is_exported_and_verified(
    two_four_bundle: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = Path(shutil.copytree(two_four_bundle, tmp_path / "out"))
    code, _, said = invoke("export", out, "--target", "vllm")
    assert code == 0, said
    bundle = Bundle.open(out)
    bundle.verify("vllm")
    (check,) = targets.get("vllm").verify(bundle, "vllm")
    assert (check.name, check.outcome) == ("vllm: packed layers", "PASS")
    assert check.detail == "14, as config.json names them"
    assert bundle.stages["vllm"].result["packed"] == 14
    (weights,) = (out / "vllm").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError):
        bundle.verify("vllm")
    (check,) = targets.get("vllm").verify(bundle, "vllm")
    assert (check.outcome, "SHA-256" in check.detail) == ("FAIL", True)
    layers = quantization.layers_of(config_of(out / "vllm")["quantization_config"])
    with pytest.raises(IntegrityError, match="SHA-256"):
        quantization.require_intact(out / "vllm", layers)


def test_a_bitmask_checkpoint_becomes_a_folder_for_vllm(
    exported_two_four: Exported, tmp_path: Path, invoke: Invoke
) -> None:
    model = exported_two_four("llama") / "model"
    bitmask_folder(model, tmp_path / "old", keep_weight=True)
    for path in model.glob("token*.json"):
        shutil.copy(path, tmp_path / "old")
    new = tmp_path / "new" / "vllm"
    convert = ("export", tmp_path / "old", "--target", "vllm", "--to", new)
    code, printed, said = invoke(*convert, "--json")
    assert code == 0, said
    assert (json.loads(printed)["packed"], json.loads(printed)["dense"]) == (14, 0)
    (tmp_path / "again").mkdir()
    unpack_folder(new, tmp_path / "again")
    before, after = (Weights(folder) for folder in (model, tmp_path / "again"))
    for name in before.shapes:
        assert torch.equal(before.read([name])[name], after.read([name])[name])
    layers = quantization.layers_of(config_of(new)["quantization_config"])
    quantization.require_intact(new, layers)
    code, _, said = invoke(*convert)
    assert (code, "exists already" in said) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "vllm"), "no linear layer is 2:4"),
        (("--target", "onnx"), "can be made only from a bundle"),
        (("--target", "vllm", "--overwrite"), "only to the export of a bundle"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, options: tuple[str, ...], message: str
) -> None:
    code, _, said = invoke("export", tiny_llama, *options, "--to", tmp_path / "vllm")
    assert (code, message in said) == (2, True)
    assert not (tmp_path / "vllm").exists()


def test_a_bundle_has_no_revision(tiny_llama: Path, invoke: Invoke) -> None:
    code, _, said = invoke("export", tiny_llama, "--target", "vllm", "--revision", "v1")
    assert code == 2
    assert "--revision without --to" in said


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("llama", "has to be a multiple of 8"), ("qwen2", "whatever head_dim says")],
)
def test_what_vllm_refuses_is_said_before(
    make_model: MakeModel, model_type: str, reason: str
) -> None:
    checkpoint = Checkpoint.open(make_model(model_type, head_dim=20))
    with pytest.raises(
        UsageError, match=rf"vLLM \S+ does not support this model: .*{reason}.*\.py"
    ):
        vllm.require_served(checkpoint)


@pytest.mark.slow
def test_widths_by_block_are_refused(exported_shrunk: Exported) -> None:
    checkpoint = Checkpoint.open(exported_shrunk("llama") / "model")
    with pytest.raises(UsageError, match="the blocks differ in width"):
        vllm.require_served(checkpoint)


def test_layers_that_are_not_those_of_config_json_are_refused(
    exported_two_four: Exported, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(exported_two_four("llama") / "model")
    export(checkpoint, tmp_path / "vllm")
    with pytest.raises(ModelError, match=r"13 packed layers .* only one of the two has .*q_proj"):
        quantization.require_intact(tmp_path / "vllm", checkpoint.linears[1:])
    shorter = [name.removeprefix("model.") for name in checkpoint.linears]
    with pytest.raises(ModelError, match=r"only one of the two has layers\.0\.self_attn\.q_proj"):
        quantization.require_intact(tmp_path / "vllm", [*shorter[:1], *checkpoint.linears[1:]])


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"quant_method": "awq"},
        {**quantization.entry(["a"]), "pattern": "4:8"},
        {**quantization.entry([])},
        {**quantization.entry(["a"]), "layers": "a"},
    ],
)
def test_an_entry_of_another_method_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="does not name the method thanos-2of4, the pattern 2:4"):
        quantization.layers_of(entry)


def test_an_untested_vllm_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THANOS_DEPLOY_VLLM_WARNED", raising=False)
    runtime.vllm_plugin.warn_of("0.32.1")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        runtime.vllm_plugin.warn_of("0.320.0")
        # A process that the first one starts.
        monkeypatch.setattr("os.getpid", lambda: 1)
        runtime.vllm_plugin.warn_of("0.320.0")
    (record,) = caplog.records
    assert "tested with vLLM 0.32, and this is 0.320.0" in record.getMessage()
