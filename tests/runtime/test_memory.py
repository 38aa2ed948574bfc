"""The KV cache of a device is moved like a numpy array, on the host and through the CUDA runtime.

There the CUDA runtime is stood in for by what its reference says of the two functions, on memory
of the host: so the arguments are right, and that copies wait for nothing else is not shown.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import memory
from runtime.engine import Reading, open_engine, open_slots
from runtime.floats import BFLOAT16, FLOAT16, FLOAT32, Float, named
from runtime.graph import Graph
from runtime.memory import CudaMemory, HostMemory, Memory, Tensor
from runtime.slots import OnnxRuntimeSlots
from tests.conftest import VOCABULARY
from tests.runtime.test_slots import SLOTS, events
from thanos_deploy.errors import InputError, PlatformError
from thanos_deploy.gpu import driver


class Function:
    """A function of a library, which takes `argtypes` and `restype` as ctypes' functions do."""

    def __init__(self, call: Any) -> None:
        self.argtypes: list[Any] = []
        self.restype: Any = None
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        assert len(arguments) == len(self.argtypes)
        return self._call(*arguments)


class CudaRuntime:
    """What `memory` calls of libcudart, for memory of the host."""

    def __init__(self) -> None:
        self.kinds: list[int] = []
        self.code = 0
        self.waiting = False
        self.cudaMemcpy2D = Function(self._copy)
        self.cudaMemset2D = Function(self._set)
        self.cudaGetErrorName = Function(lambda code: b"cudaErrorMemoryAllocation")

    def cudaStreamSynchronize(self, stream: None) -> int:  # noqa: N802
        self.waiting = False
        return 0

    def _copy(
        self, to: int, to_pitch: int, of: int, of_pitch: int, width: int, height: int, kind: int
    ) -> int:
        assert width <= min(to_pitch, of_pitch)  # else cudaErrorInvalidPitchValue
        for line in range(height):
            ctypes.memmove(to + line * to_pitch, of + line * of_pitch, width)
        self.kinds.append(kind)
        self.waiting = True
        return self.code

    def _set(self, to: int, pitch: int, value: int, width: int, height: int) -> int:
        assert width <= pitch
        for line in range(height):
            ctypes.memset(to + line * pitch, value, width)
        self.waiting = True
        return self.code


class HostCudaMemory(CudaMemory):
    """The real class, with memory of the host."""

    device = "cpu"


def cuda() -> HostCudaMemory:
    return HostCudaMemory(ort, CudaRuntime())


MEMORIES = pytest.mark.parametrize("make", [HostMemory, cuda])


def filled(space: Memory, array: NDArray[Any], kind: Float) -> Tensor:
    """A tensor with the values of an array."""
    flat = space.allocate(array.size, kind)
    ctypes.memmove(flat.address, array.ctypes.data, array.nbytes)
    return Tensor(flat.address, array.shape, kind, flat.owner)


def values(space: Memory, tensor: Tensor) -> NDArray[Any]:
    """What lies in a tensor."""
    rows, _, tokens, _ = tensor.shape
    raw = space.read(tensor.lines(range(rows), range(tokens)))
    return raw.view(tensor.type.bits).reshape(tensor.shape)


sizes = st.tuples(*[st.integers(1, 4)] * 2, st.integers(0, 6), st.integers(1, 5))


@MEMORIES
@given(sizes=sizes, data=st.data(), kind=st.sampled_from([FLOAT32, FLOAT16, BFLOAT16]))
@settings(max_examples=40, deadline=None)
def test_copies_and_zeros_are_those_of_numpy(
    make: Any, sizes: tuple[int, ...], data: st.DataObject, kind: Float
) -> None:
    space: Memory = make()
    rows, heads, tokens, dim = sizes
    longer = tokens + data.draw(st.integers(0, 3))

    def random(*shape: int) -> NDArray[Any]:
        return np.random.default_rng(0).integers(1, 99, shape).astype(kind.bits)

    target, source = random(rows, heads, longer, dim), random(rows, heads, tokens, dim) * 2
    there, here = filled(space, target, kind), filled(space, source, kind)
    first = data.draw(st.integers(0, rows))
    kept = data.draw(st.integers(0, tokens))
    space.copy(
        there.lines(range(first, rows), range(longer - kept, longer)),
        here.lines(range(first, rows), range(tokens - kept, tokens)),
    )
    target[first:, :, longer - kept :] = source[first:, :, tokens - kept :]
    np.testing.assert_array_equal(values(space, there), target)
    space.zero(there.lines(range(first), range(longer - kept)))
    target[:first, :, : longer - kept] = 0
    np.testing.assert_array_equal(values(space, there), target)
    if isinstance(space, CudaMemory):
        assert not space._cudart.waiting  # everything was waited for
        assert {kind for kind in space._cudart.kinds} <= {2, 3}


@pytest.fixture(scope="module")
def session(exported_llama: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        exported_llama / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"]
    )


@pytest.fixture
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings of prompts are found again, as short as they are here."""
    monkeypatch.setattr("runtime.prefixes._TOKENS", 4)


@pytest.mark.usefixtures("_short_blocks")
@given(events=events)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_slots_on_a_device_are_those_on_the_host_bit_by_bit(
    session: ort.InferenceSession, events: list[tuple[str, Any]]
) -> None:
    both = [
        OnnxRuntimeSlots(
            Graph(session, ort, memory=space, max_sequence=128), slots=SLOTS, prefix_bytes=1 << 20
        )
        for space in (HostMemory(), cuda())
    ]
    rows = newcomers = 0
    readings: list[Reading] = []
    for event, value in events:
        if event == "join" and not newcomers:
            prompts = value[: SLOTS - rows]
            newcomers = len(prompts)
            readings = [slots.join(prompts) for slots in both] if prompts else []
        elif event == "read" and newcomers:
            host, device = (reading.read(value) for reading in readings)
            np.testing.assert_array_equal(host, device)
            if host is not None:
                rows, newcomers = rows + newcomers, 0
        elif event == "decode" and rows:
            ids = (np.arange(rows) + value) % VOCABULARY
            host, device = (slots.decode(ids) for slots in both)
            np.testing.assert_array_equal(host, device)
        elif event == "leave" and value < rows:
            rows -= 1
            for slots in both:
                slots.leave(value)
        elif event == "abandon" and value < newcomers:
            newcomers -= 1
            for reading in readings:
                reading.abandon(value)


@MEMORIES
def test_an_empty_cache_has_an_address_and_no_tokens(
    session: ort.InferenceSession, make: Any
) -> None:
    cache = Graph(session, ort, memory=make(), max_sequence=128).empty_cache(3)
    assert all(tensor.address for tensor in cache)
    assert [tensor.shape for tensor in cache] == [(3, 2, 0, 8)] * 4


def test_an_error_of_cuda_is_an_error_of_the_machine() -> None:
    space = cuda()
    space._cudart.code = 2
    tensor = filled(space, np.ones((1, 1, 2, 2), np.float32), FLOAT32)
    with pytest.raises(PlatformError, match="cudaErrorMemoryAllocation") as caught:
        space.zero(tensor.lines(range(1), range(2)))
    assert "--slots" in caught.value.fix


def test_a_cuda_runtime_that_is_not_there_is_an_error_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "cuda_version", "99.1")
    with pytest.raises(PlatformError, match=r"libcudart\.so\.99"):
        memory.open_cuda(ort)


def test_every_float_is_widened_exactly() -> None:
    numbers = np.array([0.0, -0.0, 1.5, -3.25, 2.0**-14, np.inf], np.float32)
    upper = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(BFLOAT16.widen(upper), numbers)
    np.testing.assert_array_equal(FLOAT16.widen(numbers.astype(np.float16)), numbers)
    assert FLOAT32.widen(numbers) is numbers


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tensor(float)", FLOAT32), ("tensor(bfloat16)", BFLOAT16), ("HALF", FLOAT16)],
)
def test_types_are_known_by_the_names_of_both_libraries(name: str, expected: Float) -> None:
    assert named(name, tensor="logits") == expected


def test_another_type_is_refused() -> None:
    with pytest.raises(InputError, match=r"logits is of type tensor\(double\)"):
        named("tensor(double)", tensor="logits")


@pytest.mark.gpu
@pytest.mark.skipif(not driver.probe().gpus, reason="there is no GPU")
def test_on_a_gpu_engine_and_slots_compute_what_they_compute_on_the_cpu(
    exported_llama: Path,
) -> None:
    prompt = np.array([[72, 101, 108, 108, 111]])
    near = open_engine(exported_llama).prefill(prompt)
    far = open_engine(exported_llama, provider="cuda").prefill(prompt)
    tolerance = 1e-2 * float(np.ptp(near))  # products in TF32
    np.testing.assert_allclose(far, near, atol=tolerance)
    host, device = (
        open_slots(exported_llama, slots=SLOTS, provider=provider) for provider in ("cpu", "cuda")
    )
    for prompts in ([[1, 2, 3], [4]], [[9] * 20]):
        there, here = (slots.join(prompts).read(99) for slots in (device, host))
        assert there is not None
        assert here is not None
        np.testing.assert_allclose(there, here, atol=tolerance)
    for leaving, rows in ((0, 3), (1, 2)):
        ids = np.arange(rows)
        np.testing.assert_allclose(device.decode(ids), host.decode(ids), atol=tolerance)
        for slots in (host, device):
            slots.leave(leaving)
