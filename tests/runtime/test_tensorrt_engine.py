"""The TensorRT engine without a GPU: TensorRT and the CUDA runtime are stood in for.

The stand-ins take what the libraries' references say that these take, at addresses in memory of the
host, and compute with the real graph on ONNX Runtime. That TensorRT computes the same is for a GPU.
"""

import ctypes
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.tensorrt import Limits, TensorRTEngine
from runtime.graph import Graph
from runtime.memory import HostMemory
from tests.conftest import VOCABULARY
from thanos_deploy.errors import InputError

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT64", "FP8"])
TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
TRT: Any = SimpleNamespace(DataType=DataType, TensorIOMode=TensorIOMode)

# What is stored for a float32, what it is when it is read again, and how far that is off.
Pack = Callable[[NDArray[np.float32]], NDArray[Any]]
PACK: dict[DataType, Pack] = {
    DataType.FLOAT: lambda values: values,
    DataType.HALF: lambda values: values.astype(np.float16),
    DataType.BF16: lambda values: (values.view(np.uint32) >> 16).astype(np.uint16),
}
UNPACK: dict[DataType, Callable[[NDArray[Any]], NDArray[np.float32]]] = {
    DataType.FLOAT: lambda bits: bits,
    DataType.HALF: lambda bits: bits.astype(np.float32),
    DataType.BF16: lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
}
STORED = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.BF16: np.uint16}
TOLERANCE = {DataType.FLOAT: 1e-5, DataType.HALF: 5e-3, DataType.BF16: 4e-2}  # of the range


class Stream:
    """A stream of cuda-bindings: an object that can be made an int."""

    def __int__(self) -> int:
        return 7


class Cudart:
    """`cuda.bindings.runtime`, on memory of the host."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}

    def cudaStreamCreate(self) -> tuple[int, Stream]:  # noqa: N802
        return 0, Stream()

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        memory = (ctypes.c_uint8 * size)(*[255] * size)  # NaN in every type
        self.memory[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(  # noqa: N802
        self, to: int, of: int, size: int, kind: int, stream: Stream
    ) -> tuple[int]:
        assert isinstance(stream, Stream)
        ctypes.memmove(to, of, size)
        return (0,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[int]:  # noqa: N802
        assert isinstance(stream, Stream)
        return (0,)

    def cudaStreamDestroy(self, stream: Stream) -> tuple[int]:  # noqa: N802
        return (0,)


class Engine:
    """A `trt.ICudaEngine`, and the `IExecutionContext` of it, whose floats are of one type."""

    def __init__(self, session: ort.InferenceSession, kind: DataType) -> None:
        self._session = session
        self._kind = kind
        self._inputs = {entry.name: entry for entry in session.get_inputs()}
        self._outputs = {entry.name: entry for entry in session.get_outputs()}
        self.num_io_tensors = len(self._inputs) + len(self._outputs)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.profiles: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        name: str = [*self._inputs, *self._outputs][index]
        return name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = {**self._inputs, **self._outputs}[name].shape
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.INT64 if name in list(self._inputs)[:3] else self._kind

    def create_execution_context(self) -> "Engine":
        return self

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        assert type(stream) is int  # pybind11 takes nothing else for a size_t
        self.profiles.append(profile)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._shapes[name] = shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert type(stream) is int
        feeds = {}
        for place, name in enumerate(self._inputs):
            kind = np.int64 if place < 3 else STORED[self._kind]
            bits = self._at(name, self._shapes[name], kind)
            feeds[name] = bits if place < 3 else UNPACK[self._kind](bits.copy())
        for name, values in zip(self._outputs, self._session.run(None, feeds), strict=True):
            packed = PACK[self._kind](values)
            self._at(name, packed.shape, packed.dtype)[:] = packed
        return True

    def _at(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_uint8 * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


@pytest.fixture(scope="module")
def sessions(exported_llama: Path, last_logits: Path) -> dict[str, ort.InferenceSession]:
    """Of the graph with the logits after every token, and of the one with the last only."""
    return {
        logits: ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        for logits, folder in (("all", exported_llama / "onnx"), ("last", last_logits))
    }


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("kind", list(PACK), ids=lambda kind: kind.name)
def test_an_engine_of_any_float_type_gives_the_last_logits_of_the_graph(
    sessions: dict[str, ort.InferenceSession], logits: str, kind: DataType
) -> None:
    fake = Engine(sessions[logits], kind)
    engine = TensorRTEngine(TRT, Cudart(), fake, Limits(3, 16, 64))
    graph = Graph(sessions["all"], ort, memory=HostMemory(), max_sequence=64)
    reference = OnnxRuntimeEngine(graph)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(3, 12))
    mask = np.ones((3, 9), np.int64)
    mask[1, :4] = 0
    expected = [reference.prefill(ids[:, :9], mask), *map(reference.decode, ids[:, 9:].T)]
    actual = [engine.prefill(ids[:, :9], mask), *map(engine.decode, ids[:, 9:].T)]
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=TOLERANCE[kind] * float(np.ptp(want)))
    assert fake.profiles == [0, 1]


@pytest.mark.slow
def test_an_engine_of_a_type_that_is_not_read_is_refused(
    sessions: dict[str, ort.InferenceSession],
) -> None:
    with pytest.raises(InputError, match=r"past_key_values\.0\.key is of type FP8"):
        TensorRTEngine(TRT, Cudart(), Engine(sessions["all"], DataType.FP8), Limits(1, 8, 64))
