"""Triton's interpreter stands in for a GPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.runtime.kernels.interpreter import multiplying_bfloat16


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: on a GPU if there is one, or else interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _products_of_bfloat16() -> Iterator[None]:
    with multiplying_bfloat16():
        yield
