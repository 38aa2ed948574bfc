import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.engine import open_engine
from runtime.engines import torch as torch_runtime
from runtime.latency import Decode, Prefill
from tests.conftest import Invoke, stock_model
from thanos_deploy import gpu, gpu_check
from thanos_deploy.check import Check
from thanos_deploy.errors import GateError, PlatformError
from thanos_deploy.gpu_check import Findings, Sizes

SMALL = Sizes(
    hidden=64,
    channels=128,
    heads=8,
    kv_heads=4,
    head_size=8,
    blocks=2,
    vocabulary=300,
    scenarios=(Prefill(1, 16), Decode(2, 8, 4)),
)


@pytest.mark.skipif(bool(gpu.probe().gpus), reason="there is a GPU")
def test_without_a_gpu_every_step_is_skipped_with_the_reason(
    exported_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    file = tmp_path / "found.json"
    code, out, err = invoke("gpu-check", "--bundle", exported_llama, "-o", file)
    assert code == 4
    assert "no GPU" in err
    result = json.loads(file.read_text())
    skipped = {check["name"] for check in result["checks"] if check["outcome"] == "SKIP"}
    assert {*gpu_check.STEPS, "verdict"} - {"environment"} <= skipped
    assert not any(check["outcome"] == "FAIL" for check in result["checks"])
    reasons = [check["detail"] for check in result["checks"] if check["name"] == "gemm"]
    assert reasons[0].startswith("not measured (no GPU)")
    assert "end-to-end" in out


def test_models_of_one_shape_are_dense_sparse_shrunk_and_both(tmp_path: Path) -> None:
    models = gpu_check.make_models(tmp_path, SMALL)
    assert list(models) == ["dense", "2:4", "shrunk", "shrunk, 2:4"]
    for name, path in models.items():
        tensors = load_file(path / "model.safetensors")
        linears = {k: v for k, v in tensors.items() if k.endswith("_proj.weight")}
        assert len(linears) == 14
        kept = [(weight.reshape(-1, 4) != 0).sum(dim=1) for weight in linears.values()]
        assert all((k == 2).all() if "2:4" in name else (k == 4).all() for k in kept), name
        model = stock_model(path, dtype=torch.float32)
        assert model.config.intermediate_size == (96 if "shrunk" in name else 128)
        heads = model.model.layers[0].self_attn.q_proj.out_features // 8
        assert heads == (4 if "shrunk" in name else 8)


def test_engines_that_agree_are_told_from_engines_that_do_not(
    exported_llama: Path, tiny_llama: Path
) -> None:
    reference = open_engine(exported_llama)
    assert gpu_check.disagreement(reference, torch_runtime.open_model(tiny_llama)) < 1e-5

    class Off:
        """Right at first, and wrong in the last step."""

        def __init__(self) -> None:
            self.engine = open_engine(exported_llama)
            self.steps = 0

        def prefill(self, ids: Any) -> Any:
            return self.engine.prefill(ids)

        def decode(self, ids: Any) -> Any:
            self.steps += 1
            logits = self.engine.decode(ids)
            return logits + np.nan if self.steps == 16 else logits

    assert not gpu_check.disagreement(reference, Off()) <= gpu_check.AGREEMENT  # type: ignore[arg-type]


def test_a_step_that_goes_wrong_is_a_line_and_the_others_go_on(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thanos_deploy.artifact import Bundle
    from thanos_deploy.gpu import Driver, Gpu

    def refuses(*_: object) -> Findings:
        raise PlatformError("no such library", fix="install it")

    def fails(*_: object) -> Findings:
        raise GateError("differs", fix="report it")

    def crashes(*_: object) -> Findings:
        raise RuntimeError("CUDA error: an illegal memory access")

    def passes(*_: object) -> Findings:
        return Findings([Check("fine", "PASS", "as it should be")], {"seconds_each": 1.0})

    device = Gpu("H100", (9, 0), 80 * 10**9)
    monkeypatch.setattr(gpu, "probe", lambda: Driver("13.0", (device,), ""))
    steps = {"a": refuses, "b": fails, "c": crashes, "d": passes}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    result = gpu_check.run(Bundle.open(exported_llama))
    seen = [(check["name"], check["outcome"], check["detail"]) for check in result["checks"]]
    assert seen == [
        ("a", "SKIP", "no such library"),
        ("b", "FAIL", "differs"),
        ("c", "FAIL", "RuntimeError: CUDA error: an illegal memory access"),
        ("fine", "PASS", "as it should be"),
        ("verdict", "FAIL", "1 PASS, 2 FAIL, 1 SKIP"),
    ]
    assert result["steps"]["d"]["seconds_each"] == 1.0


@pytest.mark.gpu
def test_on_a_gpu_nothing_fails(exported_llama: Path, invoke: Invoke) -> None:
    if not gpu.probe().gpus:
        pytest.skip("no GPU")
    code, out, err = invoke("gpu-check", "--bundle", exported_llama)
    assert code == 0, out + err
