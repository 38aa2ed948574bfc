import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from exporters import preflight
from runtime.engine import open_engine
from runtime.engines import torch as torch_runtime
from tests.conftest import Invoke
from thanos_deploy import gpu_check
from thanos_deploy.check import Check
from thanos_deploy.gpu import driver
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.rows import CheckRow, HessianRow, ModelRow, Row, StepRow
from thanos_deploy.gpu_check import bundle as bundles
from thanos_deploy.gpu_check import models
from thanos_deploy.gpu_check.steps import Step, Task
from thanos_deploy.measure.latency import Decode, Prefill

no_gpu = pytest.mark.skipif(bool(driver.probe().gpus), reason="there is a GPU")

SMALL = models.Sizes(
    hidden=64,
    channels=128,
    heads=8,
    kv_heads=4,
    head_size=8,
    blocks=2,
    vocabulary=300,
    scenarios=(Prefill(1, 16), Decode(2, 8, 4)),
    turns=1,
    warmup=0,
)
THERE = [Check("GPU 0", "PASS", "H100"), Check("ONNX Runtime", "PASS", "1.31")]


def passes(task: Task) -> Iterator[Row]:
    yield HessianRow(1, 2, 3.0)


def fails(task: Task) -> Iterator[Row]:
    yield HessianRow(1, 2, 3.0)
    yield CheckRow("b", "the product", "FAIL", "is wrong", "report it")


@no_gpu
def test_without_a_gpu_every_step_is_skipped_with_the_reason(
    tmp_path: Path, invoke: Invoke
) -> None:
    file = tmp_path / "found.json"
    code, out, err = invoke("gpu-check", "-o", file)
    assert code == 4
    assert "no step could run: peaks: not measured (GPU: no NVIDIA driver" in err
    records = gpu_records.read(file)
    ends = records.of(StepRow)
    assert [row.step for row in ends] == [step.name for step in gpu_check.STEPS]
    assert {row.outcome for row in ends} == {"SKIP"}
    # The preflight comes first, and nothing of it fails here.
    assert records.rows[0] == CheckRow(
        "preflight", **{name: getattr(preflight.checks()[0], name) for name in Check.__slots__}
    )
    assert "tensorrt-models" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json"]


@no_gpu
def test_steps_are_chosen_on_the_command_line(tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "found.json"
    chosen = ("--only", "gemm", "--skip", "gemm:cutlass")
    code, out, _ = invoke("gpu-check", *chosen, "-o", file, "--json")
    assert code == 4
    names = [row.step for row in gpu_records.read(file).of(StepRow)]
    assert names[:2] == ["card", "gemm:dense"]
    assert "gemm:mma-sp" in names
    assert "gemm:cutlass" not in names
    assert json.loads(out)["checks"][-1]["name"] == "verdict"
    code, _, err = invoke("gpu-check", "--only", "spam", "-o", file)
    assert code == 2
    assert "there is no step 'spam'" in err


def test_a_bundle_without_a_graph_is_refused(tmp_path: Path, invoke: Invoke) -> None:
    code, _, err = invoke("gpu-check", "--bundle", tmp_path)
    assert code == 3
    assert "not a bundle" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "expected", "message"), [(passes, 0, ""), (fails, 6, "the product: is wrong")]
)
def test_the_exit_code_tells_what_came_of_it_and_the_rows_are_kept(
    step: Any,
    expected: int,
    message: str,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "checks", lambda: THERE)
    monkeypatch.setattr(gpu_check, "STEPS", (Step("b", 30, step, ("gpu",)),))
    monkeypatch.setattr(gpu_records.Records, "reasons", ())
    code, out, err = invoke("gpu-check", "-o", tmp_path / "found.json", "--seconds", "60")
    assert code == expected, err
    assert message in err
    assert message in " ".join(out.replace("│", " ").split())  # a cell of the table has lines
    records = gpu_records.read(tmp_path / "found.json")
    assert records.of(HessianRow) == (HessianRow(1, 2, 3.0),)
    assert not (tmp_path / "found.jsonl").exists()


def test_too_few_seconds_for_any_step_are_refused(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "checks", lambda: THERE)
    monkeypatch.setattr(gpu_check, "STEPS", (Step("b", 30, passes, ("gpu",)),))
    code, _, err = invoke("gpu-check", "-o", tmp_path / "found.json", "--seconds", "3")
    assert code == 2
    assert "3 seconds are too few for any step: b, the shortest, takes 30" in err


def test_what_the_preflight_did_not_find_is_missing() -> None:
    def lacking(*checks: Check) -> dict[str, str]:
        found = gpu_check.missing([*THERE, *checks], Path("bundle"))
        return {need: missing.reason for need, missing in found.items()}

    assert lacking() == {}
    old = Check("PyTorch on CUDA", "FAIL", "the driver takes CUDA 12.4", "install another")
    assert lacking(old) == {"gpu": "not measured (PyTorch on CUDA: the driver takes CUDA 12.4)"}
    turing = Check("GPU 0: sparse tensor cores", "FAIL", "compute capability 7.5", "")
    assert list(lacking(turing)) == ["sparse"]
    cpu = Check("ONNX Runtime on CUDA", "SKIP", "built for CPUs only", "")
    assert list(lacking(cpu)) == ["onnxruntime-cuda"]
    other = Check("ONNX Runtime with TensorRT", "FAIL", "linked against TensorRT 10", "")
    assert list(lacking(other)) == ["onnxruntime-tensorrt"]
    # Not known is no reason: the step tries it.
    unknown = Check("ONNX Runtime with TensorRT", "SKIP", "not known", "")
    assert lacking(unknown) == {}
    assert list(gpu_check.missing(THERE, None)) == ["bundle"]


def test_every_step_can_be_chosen_on_the_command_line() -> None:
    names = [step.name for step in gpu_check.STEPS]
    assert len(set(names)) == len(names)
    assert not any("," in name for name in names)
    assert "model:structured+2:4" in names


def test_every_need_of_a_step_is_one_that_can_be_missing() -> None:
    nothing = [
        Check(name, "FAIL", "", "")
        for name in (
            *("GPU", "GPU 0: sparse tensor cores", "ONNX Runtime", "target tensorrt"),
            "ONNX Runtime with TensorRT",
        )
    ]
    assert {need for step in gpu_check.STEPS for need in step.needs} == {
        *gpu_check.missing(nothing, None)
    }


def test_models_of_one_shape_are_dense_sparse_structured_and_both() -> None:
    for name in models.MODELS:
        model = models.make(name, SMALL, "cpu")
        names = models.linears(model)
        assert len(names) == 14
        for linear in names:
            weight = model.get_parameter(f"{linear}.weight")
            assert weight.dtype == torch.bfloat16
            kept = (weight.reshape(-1, 4) != 0).sum(dim=1)
            assert (kept == (2 if name.endswith("2:4") else 4)).all()
        structured = name.startswith("structured")
        assert model.config.intermediate_size == (96 if structured else 128)
        heads = model.model.layers[0].self_attn.q_proj.out_features // 8
        assert heads == (4 if structured else 8)


def test_a_pass_that_fails_is_a_row_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take = Prefill.take

    def runs_out(self: Prefill, engine: Any, turn: int) -> Any:
        if self.batch == 8:
            raise torch.OutOfMemoryError("Tried to allocate 3 PiB\nmore of it")
        return take(self, engine, turn)

    monkeypatch.setattr(Prefill, "take", runs_out)
    sizes = replace(SMALL, scenarios=(Prefill(8, 16), Prefill(1, 16), Decode(2, 8, 4)))
    failed, told, prefill, decode = models.rows("dense", sizes, Task("cpu"))
    assert isinstance(failed, ModelRow)
    assert (failed.batch, failed.seconds) == (8, None)
    assert failed.reason == "OutOfMemoryError: Tried to allocate 3 PiB"
    assert isinstance(told, CheckRow)
    assert told.outcome == "FAIL"
    for row, samples in ((prefill, 1), (decode, 4)):
        assert isinstance(row, ModelRow)
        assert row.seconds is not None
        assert len(row.seconds) == samples


@no_gpu
def test_a_variant_that_is_refused_is_a_row_with_the_reason() -> None:
    rows = [*models.rows("2:4", SMALL, Task("cpu"), variants=("sparse",))]
    assert len(rows) == len(SMALL.scenarios)
    for row in rows:
        assert isinstance(row, ModelRow)
        assert row.engine == "torch:sparse"
        assert row.reason == "variant sparse runs on an NVIDIA GPU only"


def test_the_structured_model_of_the_day_has_70_percent_of_a_block() -> None:
    sizes = models.Sizes()
    heads = 2 * sizes.hidden * sizes.head_size * (sizes.heads + sizes.kv_heads)
    channels = 3 * sizes.hidden * sizes.channels
    left = heads * sizes.kept_heads + channels * sizes.kept_channels
    assert left / (heads + channels) == pytest.approx(0.70, abs=0.005)


def test_engines_that_agree_are_told_from_engines_that_do_not(
    exported_llama: Path, tiny_llama: Path
) -> None:
    reference = open_engine(exported_llama)
    assert bundles.disagreement(reference, torch_runtime.open_model(tiny_llama)) < 1e-5

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

    off: Any = Off()
    assert not bundles.disagreement(reference, off) <= bundles.AGREEMENT
    assert bundles.agreement("a", "b", reference, off.__class__()).outcome == "FAIL"


@no_gpu
def test_nothing_is_made_for_tensorrt_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thanos_deploy.errors import PlatformError
    from thanos_deploy.gpu_check import whole_engines

    monkeypatch.setattr(models, "make", partial(pytest.fail, "a model was made"))
    with pytest.raises(PlatformError):
        next(whole_engines.rows(SMALL, Task("cuda", None, tmp_path)))


@pytest.mark.slow
def test_whole_engines_compute_what_the_torch_engines_do_the_last_logits_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import exporters.tensorrt.engine
    from runtime.engines import tensorrt as tensorrt_runtime
    from thanos_deploy.gpu_check import whole_engines

    # Engines are built on a GPU only; the graph that they are built from is a real one.
    monkeypatch.setattr(driver, "require", lambda: SimpleNamespace(arch="sm90"))
    monkeypatch.setattr(exporters.tensorrt.engine, "export", lambda graph, *_, **__: {})
    monkeypatch.setattr(tensorrt_runtime, "open_folder", lambda folder: None)
    models.make("dense", replace(SMALL, dtype="fp16"), "cpu").save_pretrained(tmp_path)
    whole_engines._build(tmp_path, SMALL)
    assert json.loads((tmp_path / "onnx" / "export.json").read_bytes())["logits"] == "last"


@pytest.mark.gpu
def test_on_a_gpu_nothing_fails(exported_llama: Path, tmp_path: Path, invoke: Invoke) -> None:
    if not driver.probe().gpus:
        pytest.skip("no GPU")
    file = tmp_path / "found.json"
    code, out, err = invoke("gpu-check", "--bundle", exported_llama, "-o", file)
    assert code == 0, out + err
