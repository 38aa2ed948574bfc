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
more often, large blocks update more weights jointly. `refit_steps` combines both advantages: it
solves the whole layer once more for the mask that the blocks chose. Cost for a [rows, cols] layer:
cols^3 to factor, rows cols^2 to update, 2 rows cols B per conjugate-gradient step of the blocks and
2 rows cols^2 per step of the refit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from thanos_deploy.errors import HessianError, UsageError
from thanos_deploy.methods import Preset, Walk, check_group
from thanos_deploy.methods._blocks import Blocks
from thanos_deploy.option import option
from thanos_deploy.pattern import Pattern, SemiStructured, Structured, Unstructured

if TYPE_CHECKING:
    from torch import Tensor

    from thanos_deploy.solver.division import Division
    from thanos_deploy.solver.layer import Factor, LayerProblem, LayerResult


@dataclass(frozen=True, slots=True)
class Options(Blocks):
    """Options of Thanos, apart from the pattern.

    Attributes:
        block_columns: B, the number of columns solved at once.
        score: "wanda", the paper's |W_ij| ||X_j||; or "obs", which divides W_ij^2 by the diagonal
            of the trailing inverse Hessian and so accounts for neighbours that can compensate.
        refit_steps: number of conjugate-gradient steps of the refit of all kept weights of the
            layer, once the blocks have chosen the mask and after each of the `mask_passes`.
        mask_passes: number of passes that choose every group's mask again given all others, for n:m
            patterns with at most 128 masks of a group; see `polish.polish`.
        outlier_rows: fraction of the rows, those with the most output energy, that stay dense
            (the paper's alpha); not for `Unstructured`.
    """

    score: Literal["wanda", "obs"] = option(
        "wanda", "--score", "Score that chooses the weights to remove."
    )
    refit_steps: int = option(
        0,
        "--refit-steps",
        "Conjugate-gradient steps of the final fit of all kept weights of a layer.",
        least=0,
    )
    mask_passes: int = option(
        0,
        "--mask-passes",
        "Number of passes that choose the mask of every group of an n:m pattern again, "
        "exactly, given the masks of all other groups. Only patterns with at most 128 "
        "masks for a group, such as 2:4 (6 masks) and 4:8 (70 masks), have such passes; "
        "other patterns keep their first masks.",
        least=0,
        later=True,
    )
    outlier_rows: float = option(
        0.0,
        "--outlier-rows",
        "Fraction of each layer's rows that stay dense; the pattern does not hold in these rows.",
        least=0.0,
        below=1.0,
    )


# Chosen on held-out C4 documents with SmolLM2-135M; see benchmarks/LOG.md.
_FAST = Options(block_columns=32, score="obs", refit_steps=8)
_BEST = replace(_FAST, mask_passes=1)
_TUNED = Walk(true_sequential=True, dense_target=0.4, tune_steps=240, tune_nsamples=224)
PRESETS = {
    "paper": Preset(Options(block_columns=512)),
    "fast": Preset(_FAST, Walk(true_sequential=True)),
    "best": Preset(_BEST, _TUNED),
    "max": Preset(_BEST, _TUNED, recover=1024),
}

# Rounds in which columns are removed; new prices after every single removal are 2 % better at most.
_ROUNDS = 8


def prune(problem: LayerProblem, pattern: Pattern, options: Options) -> LayerResult:
    """Prune one linear layer.

    Unstructured: the global residual mask. Each block loses the weights that would be removed if
    the rest of the budget were spent now on the block and all columns to its right. n:m: the mask
    of each block is chosen from its weights when it is reached. Structured: whole columns are
    removed at once, without blocks.

    Args:
        problem: float32 or float64 tensors; the work is done in the weight's dtype, except for
            the factorisation, which is always float64.
        pattern: the pattern to prune to.
        options: see `Options`.

    Raises:
        HessianError: the weight or the Hessian is not finite, the Hessian cannot be factored, or
            the solution overflows its dtype.
        ModelError, UsageError: see `check`.
    """
    import torch

    from thanos_deploy.solver.division import Division
    from thanos_deploy.solver.hessian import factor
    from thanos_deploy.solver.layer import LayerResult, output_energy
    from thanos_deploy.solver.mask import removed_count
    from thanos_deploy.solver.masked import solve_masked
    from thanos_deploy.solver.polish import few_masks, polish

    weight, hessian = problem.weight, problem.hessian
    check(problem.name, weight.shape[1], pattern, options)
    factored = factor(problem, options)
    used = factored.damping
    norms = hessian.diagonal().sqrt() if options.score == "wanda" else None

    division = problem.division
    energy = output_energy(weight, hessian, division)
    outliers = removed_count(options.outlier_rows, len(weight))
    order = torch.sort(energy, descending=True, stable=True).indices
    active = order[outliers:].sort().values if outliers else slice(None)

    W = weight[active]
    if isinstance(pattern, Structured):
        entries = removed_count(pattern.sparsity, weight.numel())
        columns = min(weight.shape[1], math.ceil(entries / len(W)))
        pruned, removed = _prune_columns(W, hessian, factored, columns, options.score)
    else:
        if outliers:
            division = Division.whole(len(W))
        pruned, removed = _prune_until_solved(W, norms, factored, pattern, options, division)
        diagonal = factored.diagonal
        del factored  # frees the factor before the refit, unless `problem.factors` keeps it
        refit = partial(
            solve_masked,
            W,
            S=hessian,
            diagonal=diagonal,
            steps=options.refit_steps,
            products=problem.products,
            division=division,
        )
        if options.refit_steps:
            pruned = refit(mask=removed, start=pruned.sub_(W)).add_(W)
        if few_masks(pattern):
            for _ in range(options.mask_passes):
                for run in division.runs:
                    pruned[run], removed[run] = polish(
                        W[run], hessian, diagonal, pruned[run], pattern
                    )
                if options.refit_steps:
                    pruned = refit(mask=removed, start=pruned.sub_(W)).add_(W)

    new_weight, mask = pruned, removed
    if outliers:
        new_weight, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
        new_weight[active], mask[active] = pruned, removed
    if problem.division.not_finite(new_weight):
        raise HessianError(
            f"{problem.name}: the solution overflows {weight.dtype}; the Hessian reaches "
            f"{hessian.abs().max().item():g}",
            fix="check the checkpoint: no trained layer has values like these",
        )
    return LayerResult.of(problem, new_weight, mask, damping=used, energy=energy)


def divisible(pattern: Pattern, options: Options) -> bool:
    """Return whether ranks can prune the rows of a layer separately.

    The threshold of an unstructured pattern is found from counts, and n:m groups lie within rows.
    Whole columns and outlier rows are chosen from all rows.
    """
    return not isinstance(pattern, Structured) and not options.outlier_rows


def check(name: str, cols: int, pattern: Pattern, options: Options) -> None:
    """Refuse a layer that `prune` cannot handle, judged by its number of inputs alone.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
        UsageError: an option does not fit the pattern.
    """
    check_group(name, cols, pattern)
    options.check_pattern(name, pattern)
    outlier_rows = options.outlier_rows
    if outlier_rows and isinstance(pattern, Unstructured):
        raise UsageError(
            f"{name}: --outlier-rows {outlier_rows:g} has no effect with pattern {pattern}",
            fix="leave --outlier-rows at 0; it applies only to n:m and structured patterns",
        )
    if isinstance(pattern, Structured) and pattern.sparsity > 1.0 - outlier_rows:
        raise UsageError(
            f"{name}: {pattern} cannot be reached with {outlier_rows:g} of the rows left dense",
            fix="use fewer --outlier-rows or remove less",
        )


def _prune_until_solved(
    W: Tensor,
    norms: Tensor | None,
    H: Factor,
    pattern: Unstructured | SemiStructured,
    options: Options,
    division: Division,
) -> tuple[Tensor, Tensor]:
    """Prune block by block, again with more steps if rows were left unsolved.

    Returns:
        the new weight and the mask, both [rows, cols].
    """
    import torch

    from thanos_deploy.solver.masked import attempts

    # Read once, after all blocks, so that no block waits for the block before it.
    refitted = options.refit_steps > 0
    unsolved = torch.zeros((), dtype=torch.int64, device=W.device)
    *first, last = attempts(W.device, options.block_columns, refitted=refitted)
    for steps in first:
        found = _prune_blocks(W, norms, H, pattern, options, division, steps, unsolved.zero_())
        if not int(division.sum(unsolved)):
            return found
    return _prune_blocks(W, norms, H, pattern, options, division, last, unsolved)


def _prune_blocks(
    W: Tensor,
    norms: Tensor | None,
    H: Factor,
    pattern: Unstructured | SemiStructured,
    options: Options,
    division: Division,
    steps: int,
    unsolved: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the block loop once; for `steps` and `unsolved` see `solve_masked`."""
    import torch

    from thanos_deploy.solver.mask import removed_count, smallest_in_groups
    from thanos_deploy.solver.masked import solve_masked, tolerance_of
    from thanos_deploy.solver.threshold import threshold

    B = options.block_columns
    tolerance = tolerance_of(W.dtype, refitted=options.refit_steps > 0)
    W = W.clone()
    cols = W.shape[1]
    M = torch.zeros_like(W, dtype=torch.bool)
    # The budget stays on the device, so that no block waits for the count of the block before it.
    entries = removed_count(pattern.sparsity, division.rows * cols)
    budget = torch.tensor(entries, device=W.device)
    diagonals = H.trailing_inverse_diagonals(B) if norms is None else None
    for start in range(0, cols, B):
        stop = min(start + B, cols)
        # An n:m mask depends only on scores of the block.
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
                found = threshold(scores, budget, division)
                mask, gone = found.mark_and_count(scores[:, : stop - start])
                budget = budget - gone
        U_block = H.upper(slice(start, stop))
        change = solve_masked(
            W[:, start:stop],
            mask,
            U_block @ U_block.T,
            steps=min(steps, 2 * (stop - start)),
            tolerance=tolerance,
            unsolved=unsolved,
            division=division,
        )
        for run in division.runs:
            W[run, stop:].addmm_(change[run] @ U_block, H.V[start:stop, stop:])
        W[:, start:stop] += change  # exactly +0.0 where a weight is removed
        M[:, start:stop] = mask
    return W, M


def _prune_columns(
    W: Tensor, hessian: Tensor, H: Factor, count: int, score: Literal["wanda", "obs"]
) -> tuple[Tensor, Tensor]:
    """Remove whole columns at once and refit the rest; return the new weight and the mask.

    Prices by "obs" count the damping as if it were part of the output. Where a few inputs are much
    larger than the others, as in the first block of most models, the damping exceeds the true price
    of some columns, and the damped prices choose worse columns than Wanda's score does. So both
    choices are tried, and the one that loses less of the output is taken.
    """
    import torch

    from thanos_deploy.solver.elimination import Elimination
    from thanos_deploy.solver.layer import output_energy
    from thanos_deploy.solver.mask import cheapest

    by_score = Elimination(W, H)
    scores = W.square().sum(dim=0) * hessian.diagonal()
    by_score.remove(cheapest(scores, count), last=True)
    weight, left = by_score.weight.to(W.dtype), by_score.left
    if score == "wanda":
        by_score.require_solved()
    else:
        priced = Elimination(W, H)
        for part in _even_parts(count, _ROUNDS):  # priced anew in view of the columns that are gone
            priced.remove(cheapest(priced.costs(), part))
        priced.require_solved()
        other = priced.weight.to(W.dtype)
        # Compared on the device, so that nothing waits for it. A solution by Wanda's score that
        # failed has a larger loss, or NaN, and is not taken.
        lost, less = (output_energy(one - W, hessian).sum() for one in (weight, other))
        keep = lost < less
        weight, left = torch.where(keep, weight, other), torch.where(keep, left, priced.left)
    return weight, (~left).expand_as(W).clone()


def _even_parts(count: int, parts: int) -> list[int]:
    """Split a count into at most `parts` positive integers that differ by at most one."""
    return [part for k in range(parts) if (part := count * (k + 1) // parts - count * k // parts)]
