"""Check the free memory before pruning, and explain an out-of-memory error during it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from thanos_deploy.errors import DeployError, ResourceError, is_out_of_memory, summary
from thanos_deploy.forecast.memory import DENSE, TUNED, WAITING, Memory, Term, total
from thanos_deploy.machine import devices, host_memory

# Memory for reading the texts and for temporary allocations of libraries. Some libraries end the
# process without a message when an allocation fails, so this memory has to be free beforehand.
_PASSING, _TEXTS = "texts and libraries", 128 << 20

_LARGER = "end other programs, or use a larger machine or a larger memory limit"


def require_to_begin() -> None:
    """Refuse a machine that lacks the memory even to read a model, before its needs are known.

    Raises:
        ResourceError: the host has less free memory than the texts and the libraries take.
    """
    there, needed = host_memory.free_bytes(), (Term(_PASSING, _TEXTS),)
    if there is not None and total(needed) > there:
        raise _too_little("this machine, before the model is read", needed, there, _LARGER)


def require(memory: Memory, device: torch.device) -> None:
    """Refuse a machine with less free memory than pruning needs, before anything is computed.

    Args:
        memory: peak memory of the work, on top of what the process holds already.
        device: the device that computes.

    Raises:
        ResourceError: the GPU or the host has less free memory.
    """
    there, host = host_memory.free_bytes(), (*memory.host, Term(_PASSING, _TEXTS))
    if there is not None and total(host) > there:
        raise _too_little("this machine", host, there, _LARGER)
    if device.type != "cpu" and memory.device_bytes > (free := devices.free_bytes(device)):
        other = "end other programs on the GPU, or use a larger one or --device cpu"
        raise _too_little(str(device), memory.device, free, other)


@contextmanager
def explained(memory: Memory) -> Iterator[None]:
    """Turn a failed allocation in the `with` statement into an error with the memory needed.

    Args:
        memory: peak memory of the work, on top of what the process holds already.

    Raises:
        ResourceError: an allocation failed.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DeployError) or not is_out_of_memory(error):
            raise
        where = memory.device if memory.device else memory.host
        raise ResourceError(
            f"out of memory ({summary(error)}); in addition to the memory that the process "
            f"already holds, {_gigabytes(total(where))} are needed ({_told(where)})",
            fix=_lower(where, "use a larger machine, or a larger memory limit"),
        ) from error


def _too_little(place: str, needed: Sequence[Term], free: int, other: str) -> ResourceError:
    return ResourceError(
        f"{place}: {_gigabytes(total(needed))} of memory are needed, and {_gigabytes(free)} are "
        f"free ({_told(needed)})",
        fix=_lower(needed, other),
    )


def _told(needed: Sequence[Term]) -> str:
    """The terms and their sizes for a message, the largest first."""
    largest = sorted(needed, key=lambda term: -term.bytes)
    return ", ".join(f"{term.name} {_gigabytes(term.bytes)}" for term in largest)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.3f} GB"


def _lower(needed: Sequence[Term], other: str) -> str:
    """A hint for the user: options that make these terms smaller, then other measures."""
    there = {term.name for term in needed}
    options = [
        option
        for name, option in (
            (WAITING, "--activations disk"),
            (TUNED, "--tune-steps 0"),
            (DENSE, "--preset fast, or --dense-target 0 and --tune-steps 0"),
            ("activations of one batch", "a shorter --seqlen"),
        )
        if name in there
    ]
    return f"use {'; '.join(options)}; or {other}" if options else other
