"""Turn PyTorch's out-of-memory errors into errors that name what needed the memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from thanos_deploy.errors import ResourceError


@contextmanager
def needed(what: str, size: int) -> Iterator[None]:
    """Turn PyTorch's out-of-memory exception into an error of this project.

    Args:
        what: what the `with` statement does or makes, for the message.
        size: bytes of GPU memory that it takes at least, for the message.

    Raises:
        ResourceError: the GPU has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise ResourceError(
            f"{what} takes at least {size} bytes of GPU memory; {free} of {total} are free "
            f"({str(error).splitlines()[0]})",
            fix="use fewer or shorter sequences, a smaller model, or a GPU with more memory",
        ) from error
