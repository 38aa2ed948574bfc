"""Triton's interpreter stands in for a GPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.runtime.kernels import interpreter


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: on a GPU if there is one, or else interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _mended_interpreter() -> Iterator[None]:
    with interpreter.mended():
        yield
