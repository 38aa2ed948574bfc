"""Engines are built by the real TensorRT-RTX, which needs no GPU; running one needs one."""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import onnx
import pytest

import exporters.onnx.graph
from exporters.targets import tensorrt, tensorrt_rtx
from exporters.tensorrt import builder, engine
from tests.conftest import Exported
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.engine_record import Summary
from thanos_deploy.errors import InputError, PlatformError, ResourceError, UsageError
from thanos_deploy.gpu import driver
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="tensorrt-rtx is not installed",
    ),
]

Graphs = Callable[[str], Path]

export = partial(engine.export, library=tensorrt_rtx.LIBRARY)


@pytest.fixture(scope="module")
def half_graph(exported_two_four: Exported, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Makes the fp16 graph of a small model of a type that was pruned to 2:4."""

    @cache
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{model_type}-fp16")
        exporters.onnx.graph.export(
            Checkpoint.open(exported_two_four(model_type) / "model"),
            folder,
            pattern=SemiStructured(2, 4),
            dtype="fp16",
        )
        return folder

    return make


@pytest.mark.parametrize("form", engine.FORMS)
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
def test_an_engine_is_built_and_every_linear_layer_found_in_it(
    half_graph: Graphs, model_type: str, form: str, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    build = export(
        half_graph(model_type),
        tmp_path,
        architectures=("sm80", "sm89"),
        form=form,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert (tmp_path / "model.engine").stat().st_size == build.engine_bytes > 0
    assert json.loads((tmp_path / "build.json").read_text()) == encode(build)
    assert build.sparse_weights
    graph = json.loads((half_graph(model_type) / "export.json").read_text())
    assert [layer.name for layer in build.layers] == [w["name"] for w in graph["weights"]]
    for layer in build.layers:
        assert layer.pattern_holds
        assert layer.engine_layer, layer
        # Sizes of 12 and 48 are no multiples of 16 or 8; the others wait for their GPU.
        assert layer.verdict in ("not reported", "not eligible"), layer
    assert build.summary.picked == 0
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    # Nothing of this machine is in what travels with the bundle.
    assert str(tmp_path) not in (tmp_path / "build.log").read_text()


def test_an_int8_engine_is_built_from_quantised_weights(
    exported_two_four: Exported, tmp_path: Path
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "engine").mkdir()
    model = Checkpoint.open(exported_two_four("llama") / "model")
    exporters.onnx.graph.export(
        model, tmp_path / "onnx", pattern=SemiStructured(2, 4), dtype="int8-qdq"
    )
    build = export(tmp_path / "onnx", tmp_path / "engine", architectures=("sm89",))
    assert build.dtype == "int8-qdq"
    assert build.summary.pattern_holds == 14
    log = (tmp_path / "engine" / "build.log").read_text()
    listed = [line for line in log.splitlines() if "_proj" in line and "LayerType: gemm" in line]
    assert listed
    assert all("Datatype: Int8" in line for line in listed)


def test_a_dense_graph_is_built_without_a_look_at_sparse_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "engine").mkdir()
    exporters.onnx.graph.export(
        Checkpoint.open(tiny_llama), tmp_path / "onnx", pattern=None, dtype="fp16"
    )
    build = export(tmp_path / "onnx", tmp_path / "engine", architectures=("sm86",))
    assert not build.sparse_weights
    assert build.summary == Summary(layers=14, pattern_holds=0, eligible=0, picked=0)
    assert all("keep more than 2" in layer.reason for layer in build.layers)


def test_a_gpu_that_the_library_does_not_know_is_refused_with_those_it_does(
    half_graph: Graphs, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"sm90: the library builds for .*sm80.*sm86"):
        export(half_graph("llama"), tmp_path, architectures=("sm90",))


@pytest.mark.parametrize("wider", ["same-sm", "ampere+"])
def test_an_engine_is_built_for_more_gpus(half_graph: Graphs, wider: str, tmp_path: Path) -> None:
    build = export(half_graph("llama"), tmp_path, architectures=("sm80",), compatibility=wider)
    assert build.compatibility == wider


def test_engines_of_any_version_need_the_lean_runtime(half_graph: Graphs, tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="libnvinfer_lean"):
        export(half_graph("llama"), tmp_path, architectures=("sm80",), compatibility="version")


@pytest.mark.parametrize(
    ("last", "code", "error"),
    [
        ('{"kind": "memory", "message": "OutOfMemory"}', 1, ResourceError),
        ("", -9, ResourceError),
        ("", -11, PlatformError),
    ],
)
def test_a_builder_that_dies_says_of_what(last: str, code: int, error: type[Exception]) -> None:
    assert type(engine._error("g", "tensorrt", code, last, "Segmentation fault")) is error


def test_what_the_library_prints_is_neither_progress_nor_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy.py").write_text(
        "import os\n"
        "os.write(1, b'[TRT] not JSON\\n')\n"
        "os.write(2, b'noise\\n' * 100_000)\n"  # more than a pipe holds
        "raise ImportError('no library here')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    order = builder.Order(
        module="noisy",
        graph="model.onnx",
        engine="model.engine",
        log="build.log",
        timing_cache="timing.cache",
        sparse=True,
        compatibility="none",
        architectures=(),
        profiles=(),
    )
    with pytest.raises(PlatformError, match="no library here"):
        engine._carry_out(order, tensorrt.LIBRARY, tmp_path, lambda *_: None)


def test_a_graph_that_the_library_does_not_take_is_refused_with_its_reason(
    half_graph: Graphs, tmp_path: Path
) -> None:
    shutil.copytree(half_graph("llama"), tmp_path / "onnx")
    (tmp_path / "engine").mkdir()
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    next(node for node in graph.graph.node if node.op_type == "Sigmoid").op_type = "Sygmoid"
    onnx.save(graph, tmp_path / "onnx" / "model.onnx")
    with pytest.raises(InputError, match=r"tensorrt-rtx: Sygmoid"):
        export(tmp_path / "onnx", tmp_path / "engine", architectures=("sm80",))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_truncated_graph_is_refused(half_graph: Graphs, name: str, tmp_path: Path) -> None:
    shutil.copytree(half_graph("llama"), tmp_path / "onnx")
    (tmp_path / "engine").mkdir()
    whole = (tmp_path / "onnx" / name).read_bytes()
    (tmp_path / "onnx" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not readable"):
        export(tmp_path / "onnx", tmp_path / "engine", architectures=("sm80",))


def test_a_timing_cache_is_kept_and_taken_up(half_graph: Graphs, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        earlier = tmp_path / "first" / "timing.cache"
        export(
            half_graph("llama"),
            tmp_path / name,
            architectures=("sm80",),
            timing_cache=earlier if earlier.exists() else None,
        )
    assert (tmp_path / "second" / "timing.cache").stat().st_size > 0


def test_the_full_library_is_refused_clearly_where_it_cannot_build(
    half_graph: Graphs, tmp_path: Path
) -> None:
    if driver.probe().gpus:
        pytest.skip("there is a GPU: the library may well build here")
    with pytest.raises(PlatformError, match="tensorrt"):
        engine.export(
            half_graph("llama"), tmp_path, library=tensorrt.LIBRARY, architectures=("sm90",)
        )


def test_a_build_that_is_interrupted_leaves_no_builder_behind(
    half_graph: Graphs, tmp_path: Path
) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom exporters.targets import tensorrt_rtx\n"
        "from exporters.tensorrt import engine\n"
        "engine.export(Path(sys.argv[1]), Path(sys.argv[2]), library=tensorrt_rtx.LIBRARY,"
        " architectures=('sm80',), on_progress=lambda *_: print('going', flush=True))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(half_graph("llama")), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.5)  # into the builder
        child.send_signal(signal.SIGINT)
        child.wait(timeout=60)
    assert not (tmp_path / "build.json").exists()
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"exporters.tensorrt.builder" in line for line in running)


def test_the_library_knows_every_gpu_that_is_built_for_by_default() -> None:
    known = importlib.import_module("tensorrt_rtx").ComputeCapability
    assert all(hasattr(known, arch.upper()) for arch in tensorrt_rtx.ARCHITECTURES)
