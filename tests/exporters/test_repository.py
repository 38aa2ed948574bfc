"""The repository as it is written; tests/triton has it served."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import exporters.onnx.graph
import runtime
from exporters.targets.triton import TritonResult
from exporters.triton import kserve, repository
from runtime.engines.onnxruntime import tensorrt_build_options
from tests.bundles import add_to_model, build_record
from tests.conftest import Invoke
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json, write_json
from thanos_deploy.bundle.manifest import Bundle, claim
from thanos_deploy.errors import InputError, PlatformError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.stages.export import export

pytestmark = pytest.mark.slow

TYPES = {
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
}


@pytest.fixture
def out(two_four_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle."""
    return Path(shutil.copytree(two_four_bundle, tmp_path / "out"))


def exported(out: Path) -> TritonResult:
    with claim(out, Bundle.open(out).source) as bundle:
        result = export(bundle, target="triton").result
    assert isinstance(result, TritonResult)
    return result


def config(out: Path, model: str) -> Any:
    text = (out / "triton" / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors(values: Any) -> list[tuple[str, str, list[int]]]:
    """Inputs or outputs of a configuration."""
    return [
        (value.name, model_config_pb2.DataType.Name(value.data_type), list(value.dims))
        for value in values
    ]


def tensors_of_graph(values: Any) -> list[tuple[str, str, list[int]]]:
    """The same of an ONNX graph; what varies is -1."""
    return [
        (
            value.name,
            TYPES[value.type.tensor_type.elem_type],
            [
                dim.dim_value if dim.HasField("dim_value") else -1
                for dim in value.type.tensor_type.shape.dim
            ],
        )
        for value in values
    ]


def accelerator(out: Path) -> Mapping[str, str]:
    (found,) = config(out, "onnx").optimization.execution_accelerators.gpu_execution_accelerator
    assert found.name == "tensorrt"
    parameters: Mapping[str, str] = found.parameters
    return parameters


def add_engine(out: Path, target: str) -> str:
    """What an engine stage leaves, with an engine that nothing can load; the name of the stage."""
    stage = f"{target}-sm90"

    def produce(folder: Path) -> Json:
        place = folder / "engines" / stage
        place.mkdir(parents=True)
        (place / "model.engine").write_bytes(b"engine")
        record = build_record(target)
        write_json(place / "build.json", encode(record))
        return encode(record.result({}))

    with claim(out, Bundle.open(out).source) as bundle:
        inputs = {"model": bundle.model_sha256, "onnx": bundle.graph_sha256}
        bundle.run(stage, produce, options={}, inputs=inputs)
    return stage


def test_the_graph_is_configured_as_it_is(out: Path) -> None:
    assert exported(out) == TritonResult({"text": "python", "onnx": "onnxruntime"}, {})
    seen = config(out, "onnx")
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    assert tensors(seen.input) == tensors_of_graph(graph.input)
    assert tensors(seen.output) == tensors_of_graph(graph.output)
    assert (seen.platform, seen.backend) == ("onnxruntime_onnx", "onnxruntime")
    assert seen.max_batch_size == 0


def test_tensorrt_may_use_sparse_kernels_where_two_four_is_proven(out: Path) -> None:
    exported(out)
    parameters = accelerator(out)
    assert parameters["trt_sparsity_enable"] == "1"
    assert parameters["precision_mode"] == "FP32"
    shapes = parameters["trt_profile_max_shapes"]
    inputs = [value.name for value in config(out, "onnx").input]
    assert [shape.partition(":")[0] for shape in shapes.split(",")] == inputs
    assert str(out) not in (out / "triton" / "onnx" / "config.pbtxt").read_text()


@pytest.mark.slow
def test_a_dense_graph_in_half_precision(tiny_llama: Path, out: Path) -> None:
    shutil.rmtree(out / "onnx")
    (out / "onnx").mkdir()
    model = Checkpoint.open(tiny_llama)
    record = exporters.onnx.graph.export(model, out / "onnx", pattern=None, dtype="fp16")
    (out / "triton").mkdir()
    repository.export(
        out,
        out / "triton",
        name="half",
        engines={},
        tensorrt_options=tensorrt_build_options(record),
        text_options={},
        text_model=Path(runtime.__path__[0]) / "triton_model.py",
    )
    graph = onnx.load(out / "onnx" / "model.onnx", load_external_data=False).graph
    assert tensors(config(out, "onnx").output) == tensors_of_graph(graph.output)
    assert ("logits", "TYPE_FP16") in [found[:2] for found in tensors(config(out, "onnx").output)]
    assert accelerator(out)["precision_mode"] == "FP16"
    assert accelerator(out)["trt_sparsity_enable"] == "0"


def test_what_no_stage_wrote_is_left_out(out: Path) -> None:
    add_to_model(out, "special_tokens_map.json", "{}")
    (out / "model" / "added_tokens.json").write_text("{}")
    exported(out)
    served = out / "triton" / "text" / "1" / "bundle" / "model"
    assert (served / "special_tokens_map.json").is_file()
    assert not (served / "added_tokens.json").exists()


def test_a_model_without_a_tokenizer_is_bad_input(out: Path) -> None:
    (out / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: missing"):
        exported(out)


def test_an_engine_has_all_its_profiles_and_the_inputs_of_its_graph(out: Path) -> None:
    stage = add_engine(out, "tensorrt")
    assert exported(out).models[stage] == "tensorrt"
    seen = config(out, stage)
    assert seen.platform == "tensorrt_plan"
    assert seen.input == config(out, "onnx").input
    assert seen.output == config(out, "onnx").output
    (group,) = seen.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == ["0", "1"]
    assert seen.optimization.priority == model_config_pb2.ModelOptimizationPolicy.PRIORITY_MAX
    assert (out / "triton" / stage / "1" / "model.plan").read_bytes() == b"engine"


def test_an_engine_that_triton_cannot_load_is_left_out_with_the_reason(out: Path) -> None:
    stage = add_engine(out, "tensorrt-rtx")
    result = exported(out)
    assert result.left_out == {stage: "Triton has no backend for TensorRT-RTX"}
    assert not (out / "triton" / stage).exists()


def test_an_engine_of_another_graph_is_left_out(out: Path) -> None:
    stage = add_engine(out, "tensorrt")
    with claim(out, Bundle.open(out).source) as bundle:
        export(bundle, target="onnx", request=None, overwrite=True)
        bundle.stages[stage].inputs["onnx"] = {}
        result = export(bundle, target="triton").result
    assert "built from an earlier onnx/" in result.left_out[stage]


def test_a_new_engine_joins_the_repository(out: Path) -> None:
    assert "tensorrt-sm90" not in exported(out).models
    add_engine(out, "tensorrt")
    assert "tensorrt-sm90" in exported(out).models


def test_the_weights_are_stored_once_in_the_repository_and_apart_from_the_bundle(
    out: Path,
) -> None:
    exported(out)
    weights = [
        path.stat().st_ino
        for path in (
            out / "triton" / "text" / "1" / "bundle" / "onnx" / "model.onnx.data",
            out / "triton" / "onnx" / "1" / "model.onnx.data",
            out / "onnx" / "model.onnx.data",
        )
    ]
    assert weights[0] == weights[1] != weights[2]
    onnx.load(out / "onnx" / "model.onnx")  # which refuses a file with two names


def test_without_hard_links_the_weights_are_copied(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, destination: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    exported(out)
    copies = [path.read_bytes() for path in (out / "triton").rglob("model.onnx.data")]
    assert len(copies) == 2
    assert copies[0] == copies[1]


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(PlatformError) as caught:
        repository.library()
    assert "thanos-deploy[triton]" in caught.value.fix


def test_the_command_makes_it_and_verify_checks_it(out: Path, invoke: Invoke) -> None:
    code, printed, errors = invoke("export", out, "--target", "triton", "--json", "-q")
    assert code == 0, errors
    assert json.loads(printed)["models"] == {"text": "python", "onnx": "onnxruntime"}
    Bundle.open(out).verify("triton")
    (out / "triton" / "text" / "1" / "model.py").write_text("")
    code, _, errors = invoke("export", out, "--target", "triton", "-q")
    assert code == 7
    assert "model.py" in errors


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf-2:4", "smollm2-135m-instruct-q4-1-gguf-2-4"),
        ("8B", "model-8b"),
        ("ÄÖ", "model"),
        ("a" * 60, "a" * 40),
        (f"{'a' * 39}/b", "a" * 39),
    ],
)
def test_a_service_has_a_name_that_kserve_takes(name: str, label: str) -> None:
    assert kserve.service_name(name) == label
