"""A model repository for Triton Inference Server, and an InferenceService for KServe.

    text/              generates text with `runtime` in Triton's Python backend, and streams it
    onnx/              the graph, for Triton's ONNX Runtime backend; on a GPU with TensorRT
    tensorrt-ARCH/     an engine, for Triton's TensorRT backend
    kserve.yaml        an InferenceService that serves the model text

Triton loads the folder of each model alone, and may copy it elsewhere first. So every folder is
self-contained, and the repository can be moved: `text` has the part of the bundle that it reads and
the code that it runs. The weights of `text` and `onnx` are one file with two names (hard links)
where the graph is the same and the file system allows it. The package onnx refuses to read such a
file; ONNX Runtime reads it.
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
TEXT = "text"  # name of the text model; the graph and the engines have the names of their stages
KSERVE = "kserve.yaml"

# Texts that `text` generates at once, and that may wait in its queue; config.pbtxt can be edited.
_SLOTS, _QUEUE = 8, 64
_PACKAGES = ("runtime", "thanos_deploy")  # packages whose modules are copied with the text model
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
        folder: the folder that `exporters.tensorrt.engine.export` wrote.
        graph: the folder with the graph that the engine was built from.
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
        bundle: folder of the bundle, which has a graph and a tokenizer.
        destination: an existing folder.
        name: a name from which the name of the InferenceService is made.
        graph: the folder of the bundle with the neutral graph, for the model `onnx`; the text model
            uses the graph in the bundle's folder `onnx`.
        engines: the engines, by name of their model in the repository.
        tensorrt_options: options of ONNX Runtime's TensorRT provider, for the model `onnx`.
        text_options: the sampling options that a request to the text model may set, and their
            types.
        text_model: file of the Python model; modules of this project that it imports are copied
            with it.
        on_progress: called at the beginning and at the end.

    Returns:
        The backend of every model, by name.

    Raises:
        PlatformError: tritonclient is not installed.
        InputError: the model has no tokenizer.json, or its rotary embedding would make a text in a
            batch depend on the other texts; see `thanos_deploy.model.rope`.
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
        # ONNX Runtime may hold each matrix twice while it loads the graph.
        memory_bytes=2 * (bundle / ONNX / GRAPH_DATA).stat().st_size + cache,
    )
    on_progress(len(configs), len(configs))
    return {model: config.backend for model, config in configs.items()}


def library() -> ModuleType:
    """Import the protobuf types of a model's configuration.

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
        # A single instance on any machine: all texts share the steps of one batch.
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
    # Triton's backend has its own name for this option only.
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
                # All profiles, so that Triton picks the one that fits: prefill or decode.
                profile=[str(index) for index in range(len(profiles))],
            )
        ],
        # Goes before the same model on ONNX Runtime if both share a GPU.
        optimization=types.ModelOptimizationPolicy(priority="PRIORITY_MAX"),
    )


def _tensors(types: Any, graph: Path) -> dict[str, list[Any]]:
    """Inputs and outputs with all dimensions of the graph; Triton does not batch requests."""
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
    """The file of the text model, and the files of all modules of this project that it imports."""
    root = module.parent.parent
    found: set[Path] = set()
    # `runtime.engine` imports this module by its name, which the search below does not see.
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
                    # Each name may be a module, or an object of the module `package`.
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
