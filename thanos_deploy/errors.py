"""The errors that the user can act on, and their exit codes.

    DeployError
    ├── UsageError             2  the command cannot mean what was asked
    │   └── PatternError       2  a sparsity pattern that cannot be read or built
    ├── InputError             3  the input is missing, corrupt or unsupported
    │   ├── ModelError         3  checkpoint, configuration or weights
    │   ├── CalibrationError   3  calibration or evaluation text
    │   └── HessianError       3  calibration statistics that no damping can save
    ├── PlatformError          4  the machine lacks a package, a GPU or the network, or another
    │                             process holds an address or a folder that is needed
    ├── ResourceError          5  out of memory or disk
    ├── GateError              6  a measurement missed a stated limit
    └── IntegrityError         7  a file differs from the one whose hash was recorded

The number is the exit code of `thanos-deploy`. Anything else that escapes is a bug: it exits 1
and keeps its traceback. An interrupted run exits 130 and resumes when the command is repeated.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Parts of the messages of out-of-memory errors. PyTorch's CPU allocator raises a plain
# RuntimeError, its GPU allocator a type of its own; libraries in Rust and C++ pass on the system's
# message.
_OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "CUDA out of memory", "std::bad_alloc"),
    *("Cannot allocate memory", "failed to map segment", "can't start new thread"),
)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class DeployError(Exception):
    """A failure that the user can act on.

    Args:
        message: what failed and where, with the value seen.
        fix: what to do next, as an instruction.
    """

    exit_code: ClassVar[int]

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  What to do: {self.fix}"


class UsageError(DeployError):
    """The options contradict each other, or contradict what is already on disk."""

    exit_code = 2


class PatternError(UsageError):
    """A sparsity pattern that cannot be read or built."""


class InputError(DeployError):
    """The input is missing, corrupt or unsupported."""

    exit_code = 3


class ModelError(InputError):
    """A checkpoint that cannot be read, is not supported, or does not fit the pattern."""


class CalibrationError(InputError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class HessianError(InputError):
    """Calibration statistics that are not finite, or that no damping makes positive definite."""


class PlatformError(DeployError):
    """This machine lacks something that the command needs, or another process holds it."""

    exit_code = 4


class ResourceError(DeployError):
    """Not enough memory or disk."""

    exit_code = 5


class GateError(DeployError):
    """A measurement missed a stated limit."""

    exit_code = 6


class IntegrityError(DeployError):
    """A file differs from the one whose hash was recorded."""

    exit_code = 7


def translate_system_error(error: Exception) -> DeployError | None:
    """Translate an exception of the operating system or of PyTorch into an error with a fix.

    Returns:
        None if the exception is a `DeployError` already, or is not recognised and so is a bug.
    """
    if isinstance(error, DeployError):
        return None
    if isinstance(error, OSError) and error.errno in _FULL:
        return ResourceError(
            f"{error.filename or 'a file'}: {os.strerror(error.errno).lower()}",
            fix="free some space and repeat the command; finished work is kept",
        )
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        if _is_unreadable(error.filename):
            return PlatformError(
                f"{error.filename}: the current user is not allowed to read this file "
                f"({error.strerror})",
                fix="allow reading with chmod or chown, or run the command as the user who "
                "owns the file",
            )
        return PlatformError(
            f"{error.filename}: {error.strerror}",
            fix="give a folder that can be written to, with -o or $THANOS_DEPLOY_CACHE",
        )
    if is_out_of_memory(error):
        return ResourceError(
            f"out of memory ({error})",
            fix="use fewer or shorter segments (--seqlen, --eval-seqlen), a larger machine, or "
            "--device cpu if the GPU ran out of memory",
        )
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of the system, PyTorch or another library is a failed allocation."""
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return True
    return any(said in str(error) for said in _OUT_OF_MEMORY)


@contextmanager
def boundary(kind: type[DeployError], what: str, *, fix: str) -> Iterator[None]:
    """Turn any exception of a library call into an error that says what failed and what to do.

    Libraries index and call whatever a file says, so a file can make them raise any exception.

    Args:
        kind: type of the error to raise instead. Errors of this project, and those of the system
            that `translate_system_error` recognises, pass unchanged.
        what: what did not work, and where.
        fix: what to do next, as an instruction.

    Raises:
        DeployError: of type `kind`, with the original exception as its cause.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DeployError) or translate_system_error(error) is not None:
            raise
        raise kind(f"{what} ({summary(error)})", fix=fix) from error


def summary(error: Exception) -> str:
    """Return the type of an exception and the first paragraph of its text, in one line."""
    text = " ".join(str(error).strip().partition("\n\n")[0].split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_unreadable(path: str | bytes | None) -> bool:
    """Return whether a path exists but may not be read, or a folder on the way not be entered."""
    if not path:
        return False
    if os.path.exists(path):
        return not os.access(path, os.R_OK)
    # What is in a folder that may not be entered looks as if it did not exist.
    folder = os.path.dirname(os.path.abspath(os.fsdecode(path)))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return not os.access(folder, os.X_OK)
