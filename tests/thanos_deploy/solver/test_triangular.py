from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import pytest
import torch

from thanos_deploy.solver.triangular import cholesky_, invert_, narrow_, turn_


def symmetric(n: int) -> torch.Tensor:
    X = torch.randn(n, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return X @ X.T


@pytest.mark.parametrize("n", [1, 7, 512, 513, 1300])
def test_factor_and_inverse_take_the_memory_of_the_matrix(n: int) -> None:
    H = symmetric(n)
    memory = H.clone()
    lower = cholesky_(memory)
    assert lower is not None
    assert lower.data_ptr() == memory.data_ptr()
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ lower.T, H)
    factor = lower.clone()
    invert_(lower)
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ factor, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_helpers_change_no_bit_of_an_inverse(size: int) -> None:
    lower = cholesky_(symmetric(1100))
    assert lower is not None
    alone = lower.clone()
    invert_(alone)
    told: dict[int, torch.Tensor] = {}
    barrier = Barrier(size)

    @dataclass(frozen=True)
    class Helper:
        rank: int
        size: int

        def broadcast(self, tensor: torch.Tensor, source: int) -> None:
            assert tensor.is_contiguous()
            told[self.rank] = tensor
            barrier.wait(60)
            made = told[source].clone()
            barrier.wait(60)
            tensor.copy_(made)

    def invert(rank: int) -> torch.Tensor:
        own = lower.clone()
        invert_(own, Helper(rank, size))
        return own

    with ThreadPoolExecutor(size) as pool:
        for inverse in pool.map(invert, range(size)):
            assert torch.equal(inverse, alone)


@pytest.mark.parametrize("n", [1, 2, 64, 129, 131, 200])
def test_rows_and_columns_are_turned_round_and_narrowed_where_they_are(n: int) -> None:
    matrix = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    memory = matrix.clone()
    assert torch.equal(turn_(memory), matrix.flip(0, 1))
    for dtype in (torch.float64, torch.float32):
        narrow = narrow_(memory, dtype)
        assert narrow.data_ptr() == memory.data_ptr()
        assert torch.equal(narrow, matrix.flip(0, 1).to(dtype))


def test_an_indefinite_matrix_has_no_factor() -> None:
    H = symmetric(20)
    H[13, 13] = -1.0
    assert cholesky_(H) is None
