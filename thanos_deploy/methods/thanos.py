"""Thanos: block-wise pruning with a joint least-squares update of every block.

Source: Ilin and Richtarik, "Thanos: A Block-wise Pruning Algorithm for Efficient LLM
Compression", arXiv 2504.05346.

Columns are visited in blocks of B. In each block a mask is chosen from the current weights and the
input norms (Wanda's score |W_ij| ||X_j||); then the block's kept entries, and all columns to the
right of it, take the values that minimise the change of the layer's output.

Three identities make this cheap. Factor the damped Hessian once as H = U U^T with U upper
triangular, and let V = U^-1. For a block bb with the columns rr to its right:

1. The Hessian of the block after the columns to the right have absorbed what they can (its Schur
   complement) is S = U_bb U_bb^T, so choosing the block's change d for every row is one
   least-squares problem of B unknowns: minimise d S d^T with d = -w on the removed entries. No
   matrix is inverted.
2. The best change of the columns to the right is then (d U_bb) V[bb, rr]: one product for all rows.
3. The loss 1/2 tr(E H E^T) of the whole layer is the sum over blocks of 1/2 ||d U_bb||^2.

All rows of a block are solved together by conjugate gradients on the masked system. It needs only
products with S, whatever the number of removed entries in each row, and on the calibration
statistics of real models it takes 5 to 15 steps because S is far better conditioned than H.

B = 1 is SparseGPT's update, B = cols the exact masked least squares. Cost for a [rows, cols] layer:
cols^3 to factor, rows cols^2 to update, 2 rows cols B per conjugate-gradient step.
"""

import math

import torch
from torch import Tensor

from thanos_deploy.errors import HessianError, ModelError, UsageError
from thanos_deploy.layer import LayerProblem, LayerResult, relative_error
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured

# Relative residual, in the preconditioned norm, at which a row counts as solved. The loss is
# quadratic in it: the float32 value costs about 1e-12 of the loss, less than rounding does.
_SOLVED = {torch.float32: 1e-6, torch.float64: 1e-12}

# A Hessian that is not numerically positive definite is damped ten times harder, at most so often.
_DAMPING_RETRIES = 4


def prune(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    block_columns: float = 128,
    damping: float = 0.01,
    outlier_rows: float = 0.0,
) -> LayerResult:
    """Prune one linear layer.

    Args:
        problem: float32 or float64 tensors; the work is done in the weight's dtype, except for
            the factorisation, which is always float64.
        pattern: `SemiStructured` (block-local mask) or `Unstructured` (global residual mask: in
            every block, what would go if the rest of the budget were spent on the whole rest of
            the matrix now).
        block_columns: B, the number of columns solved at once; a multiple of the group.
        damping: added to the Hessian's diagonal, as a fraction of the diagonal's mean.
        outlier_rows: fraction of the rows, those with the most output energy, that stay dense
            (the paper's alpha); `SemiStructured` only.

    Raises:
        HessianError: the statistics are not finite or cannot be factored.
        ModelError, UsageError: see `check`.
    """
    weight, hessian = problem.weight, problem.hessian
    check(
        problem.name,
        weight.shape[1],
        pattern,
        block_columns=block_columns,
        damping=damping,
        outlier_rows=outlier_rows,
    )
    _require_finite(problem)

    energy = ((weight @ hessian) * weight).sum(dim=1)
    outliers = removed_count(outlier_rows, len(weight))
    active = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    active[torch.sort(energy, descending=True, stable=True).indices[:outliers]] = False

    U, V, damping_used = _factor(hessian, damping, problem.name)
    pruned, removed = _prune_blocks(
        weight[active], hessian.diagonal().sqrt(), U, V, pattern, int(block_columns)
    )
    new_weight, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    new_weight[active], mask[active] = pruned, removed
    if not bool(new_weight.isfinite().all()):
        raise HessianError(
            f"{problem.name}: the solution overflows {weight.dtype}; the weights reach "
            f"{weight.abs().max().item():g} and the Hessian {hessian.abs().max().item():g}",
            fix="check the checkpoint: no trained layer has values like these",
        )
    return LayerResult(
        weight=new_weight,
        mask=mask,
        relative_error=relative_error(weight, new_weight, hessian),
        damping=damping_used,
    )


def check(
    name: str,
    cols: int,
    pattern: Pattern,
    *,
    block_columns: float = 128,
    damping: float = 0.01,
    outlier_rows: float = 0.0,
) -> None:
    """Refuse what `prune` could not do for a layer, from its width alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
        UsageError: an option is out of range or has no meaning for the pattern.
    """
    if block_columns < 1:
        raise UsageError(
            f"{name}: blocks of {block_columns:g} columns", fix="use a --block-size of at least 1"
        )
    if damping <= 0.0:
        raise UsageError(
            f"{name}: damping {damping:g} leaves the Hessian singular where inputs repeat",
            fix="use a --damp above 0, such as 0.01",
        )
    if not 0.0 <= outlier_rows < 1.0:
        raise UsageError(
            f"{name}: a fraction of {outlier_rows:g} outlier rows",
            fix="use --outlier-rows in [0, 1)",
        )
    match pattern:
        case SemiStructured(_, group):
            if cols % group:
                raise ModelError(
                    f"{name}: {cols} inputs do not divide into the groups of {group} of pattern "
                    f"{pattern}",
                    fix="use a pattern whose group divides the number of inputs",
                )
            if block_columns % group:
                raise UsageError(
                    f"{name}: blocks of {block_columns:g} columns do not divide into the groups of "
                    f"{group} of pattern {pattern}",
                    fix=f"use a --block-size that is a multiple of {group}",
                )
        case Unstructured():
            if outlier_rows:
                raise UsageError(
                    f"{name}: outlier rows {outlier_rows:g} with pattern {pattern}",
                    fix="leave --outlier-rows at 0; it has a meaning for n:m patterns only",
                )
        case Structured():
            raise UsageError(
                f"{name}: thanos does not prune to pattern {pattern} yet",
                fix="use an n:m or unstructured pattern",
            )


def _prune_blocks(
    W: Tensor, norms: Tensor, U: Tensor, V: Tensor, pattern: Pattern, B: int
) -> tuple[Tensor, Tensor]:
    """The block loop. Returns the new weights and the mask, both [rows, cols]."""
    W = W.clone()
    rows, cols = W.shape
    M = torch.zeros_like(W, dtype=torch.bool)
    budget = removed_count(pattern.sparsity, rows * cols)
    for start in range(0, cols, B):
        stop = min(start + B, cols)
        match pattern:
            case SemiStructured(kept, group):
                mask = smallest_in_groups(W[:, start:stop].abs() * norms[start:stop], kept, group)
            case _:
                scores = W[:, start:].abs() * norms[start:]
                mask = smallest_in_matrix(scores, budget)[:, : stop - start]
                budget -= int(mask.sum())
        U_block = U[start:stop, start:stop]
        change = solve_block(W[:, start:stop], mask, U_block @ U_block.T)
        W[:, stop:] += (change @ U_block) @ V[start:stop, stop:]
        W[:, start:stop] = torch.where(mask, 0.0, W[:, start:stop] + change)
        M[:, start:stop] = mask
    return W, M


def solve_block(w: Tensor, mask: Tensor, S: Tensor) -> Tensor:
    """For every row, the d with d = -w on the mask that minimises d S d^T.

    Conjugate gradients with the diagonal of S as preconditioner, all rows at once. The objective
    falls with every step, so stopping at the step limit (2 B; exact arithmetic needs at most B)
    still never leaves a row worse than it would be without an update.

    Args:
        w: [rows, B], the block's weights.
        mask: bool[rows, B], True = removed.
        S: [B, B], symmetric positive definite.

    Returns:
        [rows, B].
    """
    keep = (~mask).to(w.dtype)
    preconditioner = keep / S.diagonal()
    d = torch.where(mask, -w, 0.0)
    residual = -(d @ S) * keep
    z = residual * preconditioner
    direction = z
    rz = (residual * z).sum(dim=1, keepdim=True)
    solved = rz * _SOLVED[w.dtype] ** 2
    for _ in range(2 * w.shape[1]):
        if bool((rz <= solved).all()):
            break
        image = (direction @ S) * keep
        step = _ratio(rz, (direction * image).sum(dim=1, keepdim=True))
        d = d + step * direction
        residual = residual - step * image
        z = residual * preconditioner
        rz_next = (residual * z).sum(dim=1, keepdim=True)
        direction = z + _ratio(rz_next, rz) * direction
        rz = rz_next
    return d


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where a row is finished and both have vanished."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def smallest_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """In each row and each `group` consecutive columns, mark all but the `kept` largest scores.

    Equal scores go in column order, the lower column first.

    Args:
        scores: [rows, cols], cols a multiple of `group`.

    Returns:
        bool[rows, cols], True = removed.
    """
    grouped = scores.reshape(scores.shape[0], -1, group)
    order = torch.sort(grouped, dim=-1, stable=True).indices
    mask = torch.zeros_like(grouped, dtype=torch.bool)
    mask.scatter_(-1, order[..., : group - kept], True)
    return mask.reshape(scores.shape)


def smallest_in_matrix(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest scores of the whole matrix.

    Equal scores go in column order, then in row order.

    Args:
        scores: [rows, cols], finite.

    Returns:
        bool[rows, cols] with exactly `count` True.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.flatten().kthvalue(count).values
    below = scores < threshold
    ties = (scores == threshold).T  # transposed, so that counting runs down the columns
    rank = ties.flatten().cumsum(dim=0).reshape(ties.shape)
    return below | (ties & (rank <= count - int(below.sum()))).T


def removed_count(fraction: float, entries: int) -> int:
    """floor(fraction * entries), safe from binary fractions that fall just short of an integer."""
    return min(entries, math.floor(fraction * entries + 1e-6))


def _factor(hessian: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor, float]:
    """U and V = U^-1, upper triangular with H + damping = U U^T, and the damping that it took.

    Inputs that calibration never saw have a zero row and column in H; damping gives them a
    diagonal of their own, so they stay uncoupled from the rest.
    """
    H = hessian.double()
    # An input that is dead altogether leaves nothing to scale the damping by.
    scale = H.diagonal().mean().item() or 1.0
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    for attempt in range(_DAMPING_RETRIES + 1):
        used = damping * 10**attempt
        # Reversing rows and columns turns the usual lower factor into the upper one.
        lower, info = torch.linalg.cholesky_ex((H + used * scale * identity).flip(0, 1))
        if int(info) == 0:
            U = lower.flip(0, 1)
            V = torch.linalg.solve_triangular(U, identity, upper=True)
            return U.to(hessian.dtype), V.to(hessian.dtype), used
    raise HessianError(
        f"{name}: the Hessian of {len(H)} inputs is not positive definite, even with damping "
        f"{used:g}",
        fix="use more calibration samples (--nsamples) or more damping (--damp)",
    )


def _require_finite(problem: LayerProblem) -> None:
    for what, tensor in (("weight", problem.weight), ("Hessian", problem.hessian)):
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise HessianError(
                f"{problem.name}: {bad} of {tensor.numel()} entries of the {what} are NaN or "
                "infinite",
                fix="check the checkpoint for NaN; if it is clean, use other calibration text",
            )
