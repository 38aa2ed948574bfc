"""A model repository for Triton Inference Server, and an InferenceService for KServe.

    text/              text, by `runtime` in Triton's Python backend: in pieces, as it is made
    onnx/              the graph, for Triton's ONNX Runtime backend, on a GPU with TensorRT
    tensorrt-ARCH/     an engine, for Triton's TensorRT backend
    kserve.yaml        an InferenceService with the model text

Triton loads the folder of a model alone and may copy it elsewhere first. So each is whole, and the
repository can be moved: `text` has the part of the bundle that it reads and the code that it runs.
Only the weights of `text` and `onnx` are one file with two names, where the file system can do
that; onnx refuses to read such a file, ONNX Runtime does not.
"""

import ast
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from exporters.triton import kserve
from thanos_deploy.bundle import files, manifest, onnxfile
from thanos_deploy.bundle.engine_record import read_build
from thanos_deploy.bundle.graph_record import read_graph_record
from thanos_deploy.bundle.layout import (
    ENGINE,
    GRAPH,
    GRAPH_DATA,
    GRAPH_RECORD,
    MODEL,
    ONNX,
    TOKENIZER,
)
from thanos_deploy.errors import InputError, PlatformError
from thanos_deploy.model import tokenizer_files
from thanos_deploy.model.rope import change_in
from thanos_deploy.progress import OnProgress, silent

CONFIG = "config.pbtxt"
TEXT = "text"  # the model beside the graph, which is called like its folder, and the engines
KSERVE = "kserve.yaml"

# Texts that `text` makes at once, and texts that may wait; its config.pbtxt can be changed.
_SLOTS, _QUEUE = 8, 64
_PACKAGES = ("runtime", "thanos_deploy")  # whose modules go with its model
_READ_BY_TEXT = (
    manifest.MANIFEST,
    *(f"{ONNX}/{name}" for name in (GRAPH, GRAPH_DATA, GRAPH_RECORD)),
    *(f"{MODEL}/{name}" for name in ("config.json", "generation_config.json")),
)

_TENSOR_TYPES = {
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.FLOAT16: "TYPE_FP16",
}
_OPTION_TYPES = {int: "TYPE_INT64", float: "TYPE_FP64"}


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine of a bundle.

    Attributes:
        folder: that `exporters.tensorrt.engine.export` wrote.
        graph: the folder with the graph that it was built from.
    """

    folder: Path
    graph: Path


def export(
    bundle: Path,
    destination: Path,
    *,
    name: str,
    graph: str = ONNX,
    engines: Mapping[str, Engine],
    tensorrt_options: Mapping[str, str],
    text_options: Mapping[str, type],
    text_model: Path,
    on_progress: OnProgress = silent,
) -> dict[str, str]:
    """Write the repository.

    Args:
        bundle: its folder, with a graph and a tokenizer.
        destination: an existing folder.
        name: of the InferenceService.
        graph: the folder of the bundle with the neutral graph; the text model has that in `onnx`.
        engines: by the name of their model.
        tensorrt_options: of ONNX Runtime's TensorRT provider, for the graph.
        text_options: what a request for text may set beside the prompt, and of which type it is.
        text_model: the Python model; the modules that it imports from its own packages go with it.
        on_progress: told of the beginning and the end.

    Returns:
        the backend of every model.

    Raises:
        PlatformError: tritonclient is not installed.
        InputError: the model has no tokenizer.json, or texts that share a batch would not get what
            they get alone; see `thanos_deploy.model.rope`.
    """
    types = library()
    record = read_graph_record(bundle / ONNX / GRAPH_RECORD)
    if (change := change_in(bundle)) is not None:
        change.require_never(record.max_sequence, bundle)
    if not (bundle / TOKENIZER).is_file():
        raise InputError(
            f"{bundle / TOKENIZER}: missing",
            fix="save the model's tokenizer as tokenizer.json before pruning it",
        )
    configs = {
        TEXT: _text(types, text_options),
        ONNX: _graph(types, bundle / graph / GRAPH, tensorrt_options),
        **{model: _engine(types, engine) for model, engine in engines.items()},
    }
    on_progress(0, len(configs))
    folders = {model: _begin(destination / model, config) for model, config in configs.items()}
    for path in _code(text_model):
        _copy(path, folders[TEXT] / path.relative_to(text_model.parent.parent))
    shutil.copyfile(text_model, folders[TEXT] / "model.py")
    texts = (f"{MODEL}/{name}" for name in tokenizer_files.files_in(bundle / MODEL))
    recorded = manifest.Bundle.open(bundle).recorded
    for read in (*_READ_BY_TEXT, *filter(recorded, texts)):
        if (bundle / read).exists():
            _copy(bundle / read, folders[TEXT] / "bundle" / read)
    shutil.copyfile(bundle / graph / GRAPH, folders[ONNX] / GRAPH)
    read_by_text = folders[TEXT] / "bundle" / graph / GRAPH_DATA
    data = read_by_text if read_by_text.exists() else bundle / graph / GRAPH_DATA
    files.link(data, folders[ONNX] / GRAPH_DATA)
    for model, engine in engines.items():
        shutil.copyfile(engine.folder / ENGINE, folders[model] / "model.plan")
    cache = _SLOTS * record.max_sequence * record.cache.bytes_per_token
    kserve.write(
        destination / KSERVE,
        name=name,
        model=TEXT,
        # While it loads the graph, ONNX Runtime may hold a matrix twice.
        memory_bytes=2 * (bundle / ONNX / GRAPH_DATA).stat().st_size + cache,
    )
    on_progress(len(configs), len(configs))
    return {model: config.backend for model, config in configs.items()}


def library() -> ModuleType:
    """The protobuf types of a model's configuration.

    Raises:
        PlatformError: tritonclient is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise PlatformError(
            f"the target triton needs the package tritonclient ({error})",
            fix="pip install 'thanos-deploy[triton]'",
        ) from error
    types: ModuleType = model_config_pb2
    return types


def _text(types: Any, options: Mapping[str, type]) -> Any:
    return types.ModelConfig(
        backend="python",
        input=[
            types.ModelInput(name="prompt", data_type="TYPE_STRING", dims=[1]),
            types.ModelInput(name="new_tokens", data_type="TYPE_INT64", dims=[1]),
            types.ModelInput(name="stop", data_type="TYPE_STRING", dims=[-1], optional=True),
            *(
                types.ModelInput(
                    name=option, data_type=_OPTION_TYPES[kind], dims=[1], optional=True
                )
                for option, kind in options.items()
            ),
        ],
        output=[
            types.ModelOutput(name=name, data_type="TYPE_STRING", dims=[1])
            for name in ("text", "finish_reason")
        ],
        # One, whatever it runs on: its texts share the steps of one batch.
        instance_group=[types.ModelInstanceGroup(kind="KIND_CPU", count=1)],
        model_transaction_policy=types.ModelTransactionPolicy(decoupled=True),
        parameters={
            key: types.ModelParameter(string_value=value)
            for key, value in (
                ("provider", "cpu"),
                ("slots", str(_SLOTS)),
                ("queue", str(_QUEUE)),
            )
        },
    )


def _graph(types: Any, graph: Path, tensorrt_options: Mapping[str, str]) -> Any:
    options = dict(tensorrt_options)
    # The one option for which the backend has a name of its own.
    precision = "FP16" if options.pop("trt_fp16_enable") == "1" else "FP32"
    accelerators = types.ModelOptimizationPolicy.ExecutionAccelerators
    return types.ModelConfig(
        platform="onnxruntime_onnx",
        backend="onnxruntime",
        **_tensors(types, graph),
        instance_group=[types.ModelInstanceGroup(kind="KIND_AUTO", count=1)],
        optimization=types.ModelOptimizationPolicy(
            execution_accelerators=accelerators(
                gpu_execution_accelerator=[
                    accelerators.Accelerator(
                        name="tensorrt", parameters={"precision_mode": precision, **options}
                    )
                ]
            )
        ),
    )


def _engine(types: Any, engine: Engine) -> Any:
    profiles = read_build(engine.folder).profiles
    return types.ModelConfig(
        platform="tensorrt_plan",
        backend="tensorrt",
        **_tensors(types, engine.graph / GRAPH),
        instance_group=[
            types.ModelInstanceGroup(
                kind="KIND_GPU",
                count=1,
                # All of them, so that Triton takes the one that fits: prefill or decode.
                profile=[str(index) for index in range(len(profiles))],
            )
        ],
        # Before the same model on ONNX Runtime, where both share a GPU.
        optimization=types.ModelOptimizationPolicy(priority="PRIORITY_MAX"),
    )


def _tensors(types: Any, graph: Path) -> dict[str, list[Any]]:
    """Inputs and outputs as the graph has them; there is no dimension that Triton may batch."""
    onnxfile.require_own_data(graph)
    content = ir.load(graph).graph
    return {
        "input": [types.ModelInput(**_tensor(value)) for value in content.inputs],
        "output": [types.ModelOutput(**_tensor(value)) for value in content.outputs],
    }


def _tensor(value: ir.Value) -> files.Json:
    assert value.dtype is not None
    assert value.shape is not None
    return {
        "name": value.name,
        "data_type": _TENSOR_TYPES[value.dtype],
        "dims": [dim if isinstance(dim, int) else -1 for dim in value.shape],
    }


def _begin(model: Path, config: Any) -> Path:
    """Write a model's configuration and return the folder of its one version."""
    from google.protobuf import text_format

    version = model / "1"
    version.mkdir(parents=True)
    text = text_format.MessageToString(config)
    (model / CONFIG).write_text(text, encoding="utf-8")
    return version


def _code(module: Path) -> set[Path]:
    """The files of `runtime.triton_model`, and of all that it imports from our packages."""
    root = module.parent.parent
    found: set[Path] = set()
    # `runtime.engine` imports the engine by its name.
    left = [module, module.parent / "engines" / "onnxruntime.py"]
    while left:
        path = left.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            match node:
                case ast.Import(names):
                    imported = [alias.name for alias in names]
                case ast.ImportFrom(package, names):
                    # Each may be a module, or something in one.
                    imported = [f"{package}.{alias.name}" for alias in names]
                case _:
                    continue
            for parts in (name.split(".") for name in imported):
                if parts[0] in _PACKAGES:
                    for depth in range(1, len(parts) + 1):
                        place = root.joinpath(*parts[:depth])
                        left += [place.with_suffix(".py"), place / "__init__.py"]
    return found


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
