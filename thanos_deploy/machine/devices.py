"""The device of a computation: the processor, or one GPU."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from thanos_deploy.errors import PlatformError, ResourceError, UsageError

CPU = torch.device("cpu")

_SPELLING = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_ASKED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


def check(name: str) -> None:
    """Refuse a name that is not one of "auto", "cpu", "cuda" and "cuda:N".

    Raises:
        UsageError: the name is none of these.
    """
    if not _SPELLING.fullmatch(name):
        raise UsageError(
            f"--device {name!r} is not a device", fix="use auto, cpu, cuda or cuda:N such as cuda:0"
        )


def choose(name: str) -> torch.device:
    """Return the device that a user asks for: "auto" is the first GPU, or the CPU without a GPU.

    In one of several processes started by torchrun, "auto" and "cuda" are the GPU whose index is
    the process's local rank.

    Raises:
        UsageError: the name is not that of a device, or it is "cuda:N" in one of several processes.
        PlatformError: PyTorch does not see that GPU.
    """
    check(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return CPU
    own = _local_rank()
    if own is not None and name.startswith("cuda:"):
        raise UsageError(
            f"--device {name} with several processes, each of which needs a GPU of its own",
            fix="use --device cuda, and list the GPUs to use in CUDA_VISIBLE_DEVICES",
        )
    device = torch.device("cuda", int(name[5:]) if name.startswith("cuda:") else own or 0)
    if device.index >= count:
        raise PlatformError(
            f"--device {name}: PyTorch {torch.__version__} sees {count} GPUs"
            + ("" if torch.version.cuda else " (it was built without CUDA)"),
            fix="use --device cpu; or a CUDA build of PyTorch on a machine with an NVIDIA GPU, its "
            "driver, and that number of GPUs in CUDA_VISIBLE_DEVICES",
        )
    return device


def _local_rank() -> int | None:
    """The local rank of this process; None if it is the only process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return int(os.environ.get("LOCAL_RANK", "0"))


def describe(device: torch.device) -> str:
    """Return a device's name for messages: "cpu" or "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Bytes of GPU memory that this process can still allocate.

    This includes the memory of freed tensors that PyTorch's allocator has kept for reuse.

    Args:
        device: a GPU.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error of a GPU into one that says what was being done.

    Args:
        what: the work in the `with` statement, for the message.

    Raises:
        ResourceError: the GPU ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = _ASKED.search(str(error))
        raise ResourceError(
            f"{what}: the GPU ran out of memory when {asked[1] if asked else 'more'} was asked for",
            fix="use shorter segments (--seqlen, --eval-seqlen), because at least one whole "
            "segment runs through a block at a time; for pruning, use --activations disk "
            "or --preset fast (--dry-run prints the memory that they need); end other "
            "programs on the GPU; or use --device cpu. Finished blocks are kept",
        ) from error


def recorded(wish: str) -> dict[str, str]:
    """Return the manifest's entry for a device: its type if it is a GPU, nothing for the CPU.

    A GPU rounds differently from a CPU, so a record says whether its result was made on a GPU.

    Args:
        wish: the device as the user named it; see `choose`.

    Raises:
        UsageError, PlatformError: see `choose`.
    """
    chosen = choose(wish)
    return {} if chosen.type == "cpu" else {"device": chosen.type}
