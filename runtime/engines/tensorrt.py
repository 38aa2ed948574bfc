"""TensorRT and TensorRT-RTX engines, on an NVIDIA GPU.

Needs numpy, the package that built the engine (`tensorrt` or `tensorrt-rtx`) and `cuda-bindings`.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import floats
from runtime.engine import Ids, Logits, require_readable, require_room
from runtime.graph import TOKEN_INPUTS
from thanos_deploy.bundle.engine_record import BuildRecord, Built, EngineResult, read_build
from thanos_deploy.bundle.layout import BUILD, ENGINE, engine_folder
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Stage
from thanos_deploy.errors import InputError, PlatformError, UsageError
from thanos_deploy.gpu import driver
from thanos_deploy.gpu.driver import Gpu
from thanos_deploy.model.rope import Change, change_in

COMMAND = "thanos-deploy export {bundle} --target tensorrt"

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_PREFILL, _DECODE = 0, 1  # the order of the profiles in `exporters.tensorrt.profiles`


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest sizes that an engine was built for.

    Attributes:
        batch: largest number of sequences at once.
        prompt: largest number of tokens of a prompt.
        sequence: largest number of tokens of a sequence, prompt and answer together.
    """

    batch: int
    prompt: int
    sequence: int

    @classmethod
    def of(cls, build: BuildRecord) -> "Limits":
        """Return the limits in the build record of an engine."""
        prefill = build.profiles[_PREFILL]
        return cls(prefill.batch.most, prefill.sequence.most, build.max_sequence)

    def check(self, batch: int, prompt: int) -> None:
        """Refuse a batch of prompts that is too large for the engine.

        Raises:
            UsageError: there are too many sequences or tokens.
        """
        if batch > self.batch or prompt > self.prompt:
            raise UsageError(
                f"{batch} prompts of {prompt} tokens: the engine takes {self.batch} of "
                f"{self.prompt}",
                fix="build the engine with a larger --batch and --seq, or use fewer or "
                "shorter prompts",
            )

    def check_room(self, tokens: int) -> None:
        """Refuse sequences that are too long.

        Raises:
            UsageError: there are more tokens than `sequence`.
        """
        require_room(
            tokens,
            self.sequence,
            taker="the engine was built for",
            fix="use a shorter prompt or fewer new tokens, or build with a larger --max-seq",
        )


class _Device:
    """A CUDA stream, and named buffers on the GPU, which grow and never shrink."""

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self.stream = self.call(cudart.cudaStreamCreate())
        self.stream_address = int(self.stream)  # TensorRT takes the address
        self._buffers: dict[str, tuple[int, int]] = {}

    def call(self, result: tuple[Any, ...]) -> Any:
        """Check the error code in the result of a CUDA runtime call, and return its value."""
        code, *values = result
        if code != self._cudart.cudaError_t.cudaSuccess:
            raise PlatformError(
                f"CUDA: {code.name}",
                fix="free memory on the GPU, or build with a smaller --batch and --max-seq"
                if "Memory" in code.name
                else "check the driver with nvidia-smi, and report this error if the driver works",
            )
        return values[0] if values else None

    def buffer(self, name: str, needed: int) -> int:
        """Return the address of a named buffer of at least `needed` bytes, and never of none."""
        address, size = self._buffers.get(name, (0, 0))
        if size < max(needed, 1):
            if address:
                self.call(self._cudart.cudaFree(address))
            size = max(needed, 1)
            address = int(self.call(self._cudart.cudaMalloc(size)))
            self._buffers[name] = (address, size)
        return address

    def upload(self, name: str, array: NDArray[np.generic]) -> int:
        """Start to copy an array into a named buffer, and return the address of the buffer."""
        address = self.buffer(name, array.nbytes)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call(
            self._cudart.cudaMemcpyAsync(
                address, array.ctypes.data, array.nbytes, kind, self.stream
            )
        )
        return address

    def download(self, address: int, array: NDArray[np.generic]) -> None:
        """Start to copy from a GPU address into an array; `wait` for the end."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call(
            self._cudart.cudaMemcpyAsync(
                array.ctypes.data, address, array.nbytes, kind, self.stream
            )
        )

    def wait(self) -> None:
        """Wait until all work on the stream is done."""
        self.call(self._cudart.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free the buffers and the stream; a second call does nothing."""
        for address, _ in self._buffers.values():
            self._cudart.cudaFree(address)
        self._buffers.clear()
        if self.stream is not None:
            self._cudart.cudaStreamDestroy(self.stream)
            self.stream = None


class TensorRTEngine:
    """An engine of TensorRT, with the KV cache of its current sequences.

    The cache stays on the GPU in two sets of buffers, which take turns: a step reads the past from
    one set and writes the longer cache into the other.

    Attributes:
        max_sequence: largest number of tokens of a sequence, prompt and answer together.
    """

    def __init__(
        self, trt: Any, cudart: Any, engine: Any, limits: Limits, *, change: Change | None = None
    ) -> None:
        """Wrap a loaded engine that was built from a graph of `exporters.onnx`.

        Args:
            trt: the module `tensorrt` or `tensorrt_rtx`.
            cudart: the module `cuda.bindings.runtime`.
            engine: a `trt.ICudaEngine`.
            limits: the largest sizes that it was built for.
            change: the length beyond which a row depends on the longest row of the batch; None if
                there is none.

        Raises:
            InputError: the cache or the logits have a type that is not supported.
        """
        self._limits = limits
        self._change = change
        self.max_sequence = limits.sequence
        self._engine = engine
        self._context = engine.create_execution_context()
        self._profile = -1
        self._device = _Device(cudart)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._past = [name for name in inputs if name not in TOKEN_INPUTS]
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        # [batch, heads, past, dim]: heads and dim may differ from block to block.
        self._sizes = {name: tuple(engine.get_tensor_shape(name)) for name in self._past}
        self._types = {
            name: floats.named(engine.get_tensor_dtype(name).name, tensor=name)
            for name in (*self._past, "logits")
        }
        _, given, self._vocabulary = engine.get_tensor_shape("logits")
        self._only_last = given == 1  # otherwise the logits after every token
        self._mask = np.ones((0, 0), dtype=np.int64)
        self._turn = 0

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """See `Engine.prefill`."""
        require_readable(ids, self._vocabulary)
        self._limits.check(*ids.shape)
        self._limits.check_room(ids.shape[1])
        self._mask = np.ones_like(ids) if mask is None else mask
        self._use(_PREFILL)
        return self._step(ids, past=0)

    def decode(self, ids: Ids) -> Logits:
        """See `Engine.decode`."""
        self._limits.check_room(self._mask.shape[1] + 1)
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        self._use(_DECODE)
        return self._step(ids[:, None], past=self._mask.shape[1] - 1)

    def close(self) -> None:
        """Free the GPU's memory."""
        self._device.close()

    def _use(self, profile: int) -> None:
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, self._device.stream_address)
            self._profile = profile

    def _step(self, ids: Ids, *, past: int) -> Logits:
        context, device = self._context, self._device
        batch, sequence = ids.shape
        if self._change is not None:
            self._change.require_alike(self._mask.sum(axis=1))
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)[:, -sequence:]
        for name, array in zip(TOKEN_INPUTS, (ids, self._mask, positions), strict=True):
            array = np.ascontiguousarray(array, dtype=np.int64)
            context.set_input_shape(name, array.shape)
            context.set_tensor_address(name, device.upload(name, array))
        for source, result in zip(self._past, self._present, strict=True):
            _, heads, _, dim = self._sizes[source]
            # Full size from the beginning: growing a buffer would lose the cache in it.
            room = batch * heads * self.max_sequence * dim * self._types[source].bytes
            context.set_input_shape(source, (batch, heads, past, dim))
            context.set_tensor_address(source, device.buffer(f"{source}.{self._turn}", room))
            context.set_tensor_address(result, device.buffer(f"{source}.{1 - self._turn}", room))
        kind = self._types["logits"]
        row = self._vocabulary * kind.bytes
        given = 1 if self._only_last else sequence
        logits = device.buffer("logits", batch * given * row)
        context.set_tensor_address("logits", logits)
        if not context.execute_async_v3(device.stream_address):
            raise PlatformError(
                f"TensorRT refused a step of {batch} x {sequence} tokens after {past}",
                fix="report this with the bundle's build.json",
            )
        last = np.empty((batch, self._vocabulary), dtype=kind.bits)
        for index in range(batch):
            end = logits + (index * given + given - 1) * row
            device.download(end, last[index])
        device.wait()
        self._turn = 1 - self._turn
        return kind.widen(last)

    def __del__(self) -> None:
        if hasattr(self, "_device"):
            self.close()


def folder(bundle: Bundle) -> str:
    """Return the name of the folder in a bundle with an engine for the GPU of this machine.

    Raises:
        PlatformError: there is no GPU.
        InputError: the bundle has no engine for it.
    """
    device = driver.require()
    built = {
        name: bundle.result(Stage(name, dict, dict, EngineResult))
        for name, record in bundle.stages.items()
        if record.result.get("target") in _PACKAGES
    }
    # Prefer an engine whose kernels were timed on this kind of GPU to one built ahead of time.
    for name in sorted(built, key=lambda name: built[name].target != "tensorrt"):
        if runs_on(built[name], device):
            return engine_folder(name)
    raise InputError(
        f"{bundle.path}: no engine for {device.name} ({device.arch}); there are "
        f"{', '.join(sorted(built)) or 'none'}",
        fix=f"run `thanos-deploy export {bundle.path} --target tensorrt` on this machine",
    )


def runs_on(build: Built, device: Gpu) -> bool:
    """Whether an engine was built for the compute capability of a GPU."""
    if build.compatibility == "ampere+":
        return device.capability >= (8, 0)
    return device.arch in build.arch


def open_engine(
    bundle: Path, *, provider: str = "cuda", threads: int | None = None
) -> TensorRTEngine:
    """Load the engine of a bundle that fits the GPU of this machine.

    Args:
        bundle: its folder.
        provider: "cuda".
        threads: ignored, because everything runs on the GPU.

    Raises:
        PlatformError: there is no GPU, or a package is missing or of another version.
        InputError: the bundle has no engine for this GPU, or it cannot be loaded.
        UsageError: there is no such provider.
    """
    if provider != "cuda":
        raise UsageError(f"provider {provider!r}: TensorRT runs on cuda", fix="give cuda")
    return open_folder(bundle / folder(Bundle.open(bundle)), change=change_in(bundle))


def open_folder(folder: Path, *, change: Change | None = None) -> TensorRTEngine:
    """Load the engine in a folder that `exporters.tensorrt` wrote.

    Whether the engine fits the GPU and the library is decided from build.json, because loading an
    engine that does not fit can crash the process (triton-inference-server/server issue 4956).

    Args:
        folder: the folder of the engine.
        change: see `TensorRTEngine`.

    Raises:
        PlatformError: there is no GPU, or a package is missing or of another version.
        InputError: the engine is for other GPUs, or cannot be loaded.
    """
    build, device = read_build(folder), driver.require()
    if not runs_on(build, device):
        raise InputError(
            f"{folder}: built for {', '.join(build.arch)}, this is {device.arch}",
            fix="build the engine again on this machine",
        )
    try:
        package, limits = _PACKAGES[build.target], Limits.of(build)
    except LookupError as error:
        raise InputError(
            f"{folder / BUILD}: not a readable record of an engine ({error!r})",
            fix="build the engine again with --overwrite",
        ) from error
    trt, cudart = _modules(package)
    if trt.__version__ != build.library and build.compatibility != "version":
        raise PlatformError(
            f"{folder}: built with {package} {build.library}, {trt.__version__} is installed",
            fix=f"pip install {package.replace('_', '-')}=={build.library}, or build the engine "
            "again",
        )
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
    if engine is None:
        raise InputError(
            f"{folder}: {package} cannot load the engine",
            fix="build the engine again on this machine",
        )
    return TensorRTEngine(trt, cudart, engine, limits, change=change)


def _modules(package: str) -> tuple[Any, Any]:
    found = []
    for name, wheel in (
        (package, package.replace("_", "-")),
        ("cuda.bindings.runtime", "cuda-bindings"),
    ):
        try:
            found.append(import_module(name))
        except (ImportError, OSError) as error:
            raise PlatformError(
                f"the package {wheel} is not usable ({error})", fix=f"pip install {wheel}"
            ) from error
    return found[0], found[1]
