"""Thanos: block-wise pruning with a joint least-squares update of every block.

Source: Ilin and Richtarik, "Thanos: A Block-wise Pruning Algorithm for Efficient LLM
Compression", arXiv 2504.05346.

Columns are visited in blocks of B. In each block a mask is chosen from the current weights; then
the block's kept entries, and all columns to the right of it, take the values that minimise the
change of the layer's output.

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

B = 1 is SparseGPT's update, B = cols the exact masked least squares. Small blocks adapt the mask
more often, large ones update more weights jointly; `refit_steps` has both, by solving the whole
layer once more for the mask that the blocks chose. Cost for a [rows, cols] layer: cols^3 to factor,
rows cols^2 to update, 2 rows cols B per conjugate-gradient step of the blocks and 2 rows cols^2 per
step of the refit.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from thanos_deploy.errors import HessianError, UsageError
from thanos_deploy.machine.precision import products_in
from thanos_deploy.methods import Option, Preset, check_blocks, check_group
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured
from thanos_deploy.solver.elimination import Elimination
from thanos_deploy.solver.hessian import check_damping, factor
from thanos_deploy.solver.layer import (
    Factor,
    LayerProblem,
    LayerResult,
    output_energy,
    relative_error,
)
from thanos_deploy.solver.mask import cheapest, removed_count, smallest_in_groups, threshold

Score = Literal["wanda", "obs"]
SCORES: tuple[str, ...] = get_args(Score)

# Chosen on held-out C4 documents with SmolLM2-135M; see benchmarks/LOG.md.
_BEST: dict[str, Option] = {
    "block_columns": 32,
    "damping": 0.01,
    "score": "obs",
    "refit_steps": 8,
}
PRESETS = {
    "paper": Preset({"block_columns": 512}),
    "fast": Preset(_BEST, true_sequential=True),
    "best": Preset(_BEST, true_sequential=True, dense_target=0.4, tune_steps=16),
}

# Relative residual, in the preconditioned norm, at which a row counts as solved. The loss is
# quadratic in it: the float32 value costs about 1e-8 of the loss, less than rounding does.
_SOLVED = {torch.float32: 1e-4, torch.float64: 1e-12}

# The same for blocks whose weights are all fitted once more.
_REFITTED = {torch.float32: 0.1, torch.float64: 1e-12}

# Weights that are solved together, in whole rows: each step needs a few numbers beside each. As
# many as fit into the caches of a processor; a GPU needs more, to be busy.
_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}

# Steps after which the host asks whether all rows are solved. A processor knows at once; a GPU has
# to be waited for, which takes as long as some steps of one block. Rows that are solved stay as
# they are, so this changes no result.
_ASKING = {"cpu": 1, "cuda": 4}

# In so many rounds columns leave: more remove hardly better ones.
_ROUNDS = 8


def prune(
    problem: LayerProblem,
    pattern: Pattern,
    *,
    block_columns: int = 128,
    damping: float = 0.01,
    damping_mode: str = "mean",
    score: str = "wanda",
    refit_steps: int = 0,
    outlier_rows: float = 0.0,
) -> LayerResult:
    """Prune one linear layer.

    Unstructured: the global residual mask: in every block, what would go if the rest of the budget
    were spent on the whole rest of the matrix now. n:m: the mask of each block from its weights
    when it is reached. Structured: whole columns at once, no blocks.

    Args:
        problem: float32 or float64 tensors; the work is done in the weight's dtype, except for
            the factorisation, which is always float64.
        pattern: what to prune to.
        block_columns: B, the number of columns solved at once; a multiple of the group.
        damping, damping_mode: see `thanos_deploy.solver.hessian.factor`.
        score: "wanda", the paper's |W_ij| ||X_j||; or "obs", which divides W_ij^2 by the diagonal
            of the trailing inverse Hessian and so knows which neighbours can take over.
        refit_steps: conjugate-gradient steps of a last fit of all kept weights of the layer to the
            final mask.
        outlier_rows: fraction of the rows, those with the most output energy, that stay dense
            (the paper's alpha); not for `Unstructured`.

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
        damping_mode=damping_mode,
        score=score,
        refit_steps=refit_steps,
        outlier_rows=outlier_rows,
    )
    factored = factor(problem, damping, damping_mode)
    used = factored.damping
    norms = hessian.diagonal().sqrt() if score == "wanda" else None

    energy = output_energy(weight, hessian)
    outliers = removed_count(outlier_rows, len(weight))
    order = torch.sort(energy, descending=True, stable=True).indices
    active = order[outliers:].sort().values if outliers else slice(None)

    W = weight[active]
    if isinstance(pattern, Structured):
        entries = removed_count(pattern.sparsity, weight.numel())
        columns = min(weight.shape[1], math.ceil(entries / len(W)))
        pruned, removed = _prune_columns(W, norms, factored, columns)
    else:
        tolerance = (_REFITTED if refit_steps else _SOLVED)[W.dtype]
        pruned, removed = _prune_blocks(W, norms, factored, pattern, block_columns, tolerance)
        diagonal = factored.diagonal
        del factored  # which may be the last that is known of it
        if refit_steps:
            start = pruned.sub_(W)
            pruned = solve_masked(
                *(W, removed, hessian),
                diagonal=diagonal,
                start=start,
                steps=refit_steps,
                products=problem.products,
            ).add_(W)

    new_weight, mask = pruned, removed
    if outliers:
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
        relative_error=relative_error(weight, new_weight, hessian, energy=energy),
        damping=used,
    )


def check(
    name: str,
    cols: int,
    pattern: Pattern,
    *,
    block_columns: int = 128,
    damping: float = 0.01,
    damping_mode: str = "mean",
    score: str = "wanda",
    refit_steps: int = 0,
    outlier_rows: float = 0.0,
) -> None:
    """Refuse what `prune` could not do for a layer, from its width alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
        UsageError: an option is out of range or has no meaning for the pattern.
    """
    check_damping(name, damping, damping_mode)
    check_group(name, cols, pattern)
    check_blocks(name, block_columns, pattern)
    if score not in SCORES:
        raise UsageError(f"{name}: score {score!r}", fix=f"use one of {', '.join(SCORES)}")
    if refit_steps < 0:
        raise UsageError(f"{name}: {refit_steps} refit steps", fix="use 0 or more")
    if not 0.0 <= outlier_rows < 1.0:
        raise UsageError(
            f"{name}: a fraction of {outlier_rows:g} outlier rows",
            fix="use --outlier-rows in [0, 1)",
        )
    if outlier_rows and isinstance(pattern, Unstructured):
        raise UsageError(
            f"{name}: outlier rows {outlier_rows:g} with pattern {pattern}",
            fix="leave --outlier-rows at 0; it has a meaning for n:m and structured patterns",
        )
    if isinstance(pattern, Structured) and pattern.sparsity > 1.0 - outlier_rows:
        raise UsageError(
            f"{name}: {pattern} cannot be reached with {outlier_rows:g} of the rows left dense",
            fix="use fewer --outlier-rows or remove less",
        )


def _prune_blocks(
    W: Tensor,
    norms: Tensor | None,
    H: Factor,
    pattern: Unstructured | SemiStructured,
    B: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """The block loop. Returns the new weights and the mask, both [rows, cols]."""
    W = W.clone()
    rows, cols = W.shape
    M = torch.zeros_like(W, dtype=torch.bool)
    # On the device of the weights, so that no block waits for the count of the one before.
    budget = torch.tensor(removed_count(pattern.sparsity, rows * cols), device=W.device)
    diagonals = H.trailing_inverse_diagonals(B) if norms is None else None
    for start in range(0, cols, B):
        stop = min(start + B, cols)
        # A pattern of groups looks no further than the block.
        seen = slice(start, stop if isinstance(pattern, SemiStructured) else cols)
        if diagonals is not None:
            scores = W[:, seen].square().div_(diagonals[start // B, seen])
        else:
            assert norms is not None
            scores = W[:, seen].abs().mul_(norms[seen])
        match pattern:
            case SemiStructured(kept, group):
                mask = smallest_in_groups(scores, kept, group)
            case Unstructured():
                mask = threshold(scores, budget).mark(scores[:, : stop - start])
                budget = budget - mask.sum()
        U_block = H.upper(slice(start, stop))
        change = solve_masked(W[:, start:stop], mask, U_block @ U_block.T, tolerance=tolerance)
        W[:, stop:].addmm_(change @ U_block, H.V[start:stop, stop:])
        W[:, start:stop] += change  # +0.0 where it takes a weight away
        M[:, start:stop] = mask
    return W, M


def _prune_columns(W: Tensor, norms: Tensor | None, H: Factor, count: int) -> tuple[Tensor, Tensor]:
    """Remove whole columns at once and refit the rest. Returns the new weights and the mask."""
    elimination = Elimination(W, H)
    if norms is None:  # priced anew after every part, in view of the columns that are gone
        for part in _even_parts(count, _ROUNDS):
            elimination.remove(cheapest(elimination.costs(), part))
    else:
        scores = W.square().sum(dim=0) * norms.square()
        elimination.remove(cheapest(scores, count))
    removed = ~elimination.left
    return elimination.weight.to(W.dtype), removed.expand_as(W).clone()


def _even_parts(count: int, parts: int) -> list[int]:
    """A number as a sum of so many, or fewer, that differ by one at most."""
    return [part for k in range(parts) if (part := count * (k + 1) // parts - count * k // parts)]


def solve_masked(
    w: Tensor,
    mask: Tensor,
    S: Tensor,
    *,
    diagonal: Tensor | None = None,
    start: Tensor | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    products: torch.dtype = torch.float32,
) -> Tensor:
    """For every row, the d with d = -w on the mask that minimises d S d^T.

    Conjugate gradients with the diagonal of S as preconditioner, all rows at once. The objective
    falls with every step, so stopping early never leaves a row worse than it was at the start. A
    row that is solved stays as it is, whatever the others need.

    Args:
        w: [rows, B], the weights.
        mask: bool[rows, B], True = removed.
        S: [B, B], symmetric positive definite.
        diagonal: [B], that of S where S itself has another one.
        start: [rows, B], where to start on the kept entries; zero if None.
        steps: the most steps; if None, 2 B (exact arithmetic needs at most B).
        tolerance: relative residual, in the preconditioned norm, at which a row is done; if None,
            that of the dtype.
        products: bfloat16 lets the steps round what they multiply where that is faster. It is the
            change from `start` that is rounded, which another step makes up for in less time.

    Returns:
        [rows, B], exactly -w on the mask.
    """
    # In units in which the diagonal of S is 1, there is nothing left to precondition.
    unit = (S.diagonal() if diagonal is None else diagonal).rsqrt()
    S = (S * unit).mul_(unit[:, None])
    S.diagonal().fill_(1.0)
    tolerance = _SOLVED[w.dtype] if tolerance is None else tolerance
    steps = 2 * w.shape[1] if steps is None else steps
    result = torch.empty_like(w)
    together = max(1, _ENTRIES[w.device.type] // w.shape[1])
    for rows in (slice(at, at + together) for at in range(0, len(w), together)):
        keep = (~mask[rows]).to(w.dtype)
        fixed = w[rows] * (keep - 1.0)
        d = (fixed if start is None else fixed + start[rows] * keep).div(unit)
        _conjugate_gradients(d, keep, S, steps, tolerance, products)
        torch.mul(d, unit, out=result[rows]).mul_(keep).add_(fixed)
    return result


def _conjugate_gradients(
    d: Tensor, keep: Tensor, S: Tensor, steps: int, tolerance: float, products: torch.dtype
) -> None:
    """Minimise d S d^T on the kept entries, in place, from the values that they have.

    Args:
        d: [rows, cols].
        keep: [rows, cols], 1 for what may change and 0 for what may not.
        S: [cols, cols], with ones on its diagonal.
        steps: the most steps.
        tolerance, products: see `solve_masked`.
    """
    residual = torch.mm(d, S).mul_(keep).neg_()
    direction, image, product = residual.clone(), torch.empty_like(d), torch.empty_like(d)
    rr = torch.mul(residual, residual, out=product).sum(dim=1, keepdim=True)
    solved = rr * tolerance**2
    every = _ASKING[d.device.type]
    with products_in(products):
        for number in range(1, steps + 1):
            if number % every == 0 and bool((rr <= solved).all()):
                break
            torch.mm(direction, S, out=image).mul_(keep)
            curvature = torch.mul(direction, image, out=product).sum(dim=1, keepdim=True)
            step = torch.where(rr > solved, rr / curvature, 0.0)
            d.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1.0)
            rr_next = torch.mul(residual, residual, out=product).sum(dim=1, keepdim=True)
            direction.mul_(torch.where(rr > solved, rr_next / rr, 0.0)).add_(residual)
            rr = rr_next
