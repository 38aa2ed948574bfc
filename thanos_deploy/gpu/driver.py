"""The NVIDIA GPUs of this machine, from the driver. Standard library only.

Installed libraries do not show whether there is a GPU. On machines without GPU and driver, ONNX
Runtime lists its CUDA provider, and ORT-GenAI says that CUDA is available. So this module asks the
driver itself.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from uuid import UUID

from thanos_deploy.errors import PlatformError

_DRIVER = "libcuda.so.1"
_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

# The first GPUs with sparse tensor cores: NVIDIA, "Accelerating Sparse Deep Neural Networks",
# arXiv 2104.08378.
SPARSE_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that is visible to this process.

    Attributes:
        name: product name, from the driver.
        capability: compute capability, major and minor.
        memory_bytes: total memory.
        uuid: UUID of this device, such as "123e4567-e89b-12d3-a456-426614174000".
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    uuid: str = ""

    @property
    def arch(self) -> str:
        """The compute capability as compilers spell it, such as "sm90"."""
        return "sm{}{}".format(*self.capability)

    @property
    def has_sparse_tensor_cores(self) -> bool:
        """Whether the GPU has tensor cores for 2:4 sparsity."""
        return self.capability >= SPARSE_CAPABILITY


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver and the GPUs that it shows.

    Attributes:
        cuda: the newest CUDA version that the driver supports, such as "13.0"; None without a
            driver.
        gpus: the GPUs that are visible to this process (CUDA_VISIBLE_DEVICES counts).
        problem: why there is no GPU; empty if there is one.
    """

    cuda: str | None
    gpus: tuple[Gpu, ...]
    problem: str


@cache
def probe() -> Driver:
    """Query the driver; the answer is cached for the life of the process."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return Driver(None, (), f"no NVIDIA driver: {_DRIVER} was not found")
    number = ctypes.c_int()
    if code := cuda.cuInit(0):
        return Driver(None, (), f"the NVIDIA driver does not start (cuInit returned {code})")
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    cuda.cuDeviceGetCount(ctypes.byref(number))
    gpus = tuple(_gpu(cuda, index) for index in range(number.value))
    return Driver(version, gpus, "" if gpus else "the driver shows no GPU to this process")


def require() -> Gpu:
    """Return the first GPU.

    Raises:
        PlatformError: there is no GPU.
    """
    found = probe()
    if not found.gpus:
        raise PlatformError(
            f"no GPU ({found.problem})",
            fix="run this on a machine with an NVIDIA GPU and its driver",
        )
    return found.gpus[0]


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    identity = (ctypes.c_ubyte * 16)()
    cuda.cuDeviceGetUuid_v2(identity, device)
    return Gpu(
        name.value.decode(),
        (major.value, minor.value),
        memory.value,
        str(UUID(bytes=bytes(identity))),
    )
