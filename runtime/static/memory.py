"""Turn PyTorch's out-of-memory errors into errors that name what needed the memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from thanos_deploy.errors import ResourceError


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory exception into an error of this project.

    Args:
        what: what the `with` statement does, and the bytes that are known to be needed, for the
            message.

    Raises:
        ResourceError: the GPU has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise ResourceError(
            f"out of GPU memory: {what}; {free} of {total} bytes are free "
            f"({str(error).splitlines()[0]})",
            fix="use fewer or shorter sequences, a smaller model, or a GPU with more memory",
        ) from error
