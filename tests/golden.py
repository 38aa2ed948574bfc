"""The golden instance: a fixed small layer whose losses were computed independently.

The reference losses are 1/2 tr(E H E^T) with the damped H = 2 X X^T + 0.01 mean(diag) I, in
float64. They were computed with an explicit inverse of every trailing Hessian, not with a
factorisation.
"""

import numpy as np
import torch
from torch import Tensor

from thanos_deploy.solver.layer import LayerProblem


def golden_problem() -> LayerProblem:
    """Return a float64 weight [16, 64] and H0 = 2 X X^T from 256 correlated tokens."""
    rng = np.random.default_rng(0)
    rows, cols, tokens = 16, 64, 256
    x = rng.standard_normal((cols, tokens))
    for j in range(1, cols):
        x[j] = 0.8 * x[j - 1] + 0.6 * x[j]
    x *= np.exp(0.5 * rng.standard_normal((cols, 1)))
    weight = rng.standard_normal((rows, cols))
    assert np.isclose(x.sum(), 288.698036)
    assert np.isclose(weight.sum(), -13.383162)
    return LayerProblem(torch.tensor(weight), torch.tensor(2 * x @ x.T), "golden")


def damped(hessian: Tensor) -> Tensor:
    """Return H0 + 0.01 mean(diag H0) I."""
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)


def loss(problem: LayerProblem, new_weight: Tensor) -> float:
    """Return 1/2 tr(E H E^T) with the damped H."""
    change = new_weight - problem.weight
    return 0.5 * ((change @ damped(problem.hessian)) * change).sum().item()


def random_problem(seed: int, rows: int = 6, cols: int = 16, tokens: int = 64) -> LayerProblem:
    """Return a random float64 layer; its inputs are correlated and differ in scale."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g, dtype=torch.float64)
    x = mix @ torch.randn(cols, tokens, generator=g, dtype=torch.float64)
    weight = torch.randn(rows, cols, generator=g, dtype=torch.float64)
    return LayerProblem(weight, x @ x.T, f"random {seed}")
