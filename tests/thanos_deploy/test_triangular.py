import pytest
import torch

from thanos_deploy.triangular import cholesky_, invert_


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


def test_an_indefinite_matrix_has_no_factor() -> None:
    H = symmetric(20)
    H[13, 13] = -1.0
    assert cholesky_(H) is None
