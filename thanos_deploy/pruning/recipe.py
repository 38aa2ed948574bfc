"""Options for setting weights to zero; importing this module needs no PyTorch.

Options for cutting out heads and channels are in `thanos_deploy.shrink.options.Cut`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from thanos_deploy import methods
from thanos_deploy.errors import UsageError
from thanos_deploy.methods import Tuning, Walk
from thanos_deploy.option import Options, chosen, option
from thanos_deploy.pattern import Pattern, Structured, Unstructured
from thanos_deploy.pruning.budget import Budget

if TYPE_CHECKING:
    import torch

METHOD, PRESET = "thanos", "best"

Forward = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Layers(Options):
    """Which linear layers are pruned; see `thanos_deploy.model.assignment.assign`.

    Attributes:
        include: selectors of the layers that may be pruned; empty for all.
        ignore: selectors of layers that stay dense.
        sparsity_file: path of a JSON file that gives layers their own patterns, or None.
        keep_dense: fraction of the weights to be pruned that stays dense instead, in the layers
            whose pruning changes the model most for what it saves; see `pruning.sensitivity`.
    """

    include: tuple[str, ...] = option(
        (),
        "--include",
        "Prune only these layers: a full name, or re: and a regular expression that matches the "
        "full name. Embeddings and the output head (lm_head) are never pruned.",
        metavar="LAYER",
    )
    ignore: tuple[str, ...] = option(
        (),
        "--ignore",
        "Leave these layers unchanged; they are named as for --include.",
        metavar="LAYER",
    )
    sparsity_file: str | None = option(
        None,
        "--sparsity-file",
        'File with a JSON object that gives layers their own patterns: {"re:.*down_proj": '
        '"dense", "model.layers.0.mlp.up_proj": "unstructured:0.3"}.',
        metavar="PATH",
    )
    keep_dense: float = option(
        0.0,
        "--keep-dense",
        "Leave this fraction of the weights dense, such as 0.2. The layers that stay "
        "dense are those whose pruning would change the model most for each weight that "
        "it removes. This takes one more pass over all blocks of the model.",
        metavar="FRACTION",
        least=0.0,
        below=1.0,
    )


@dataclass(frozen=True, slots=True)
class Owl(Options):
    """How OWL spreads the sparsity over the blocks; see `thanos_deploy.pruning.owl`.

    The defaults are the paper's.

    Attributes:
        threshold: M, the multiple of a block's mean score above which a score is an outlier.
        spread: lambda, the largest difference between the sparsity of a block and of the pattern.
    """

    threshold: float = option(
        5.0,
        "--owl-threshold",
        "owl: a Wanda score of more than this many times the block's mean is an outlier.",
        above=0.0,
    )
    spread: float = option(
        0.08,
        "--owl-spread",
        "owl: largest difference between the sparsity of a block and the sparsity of the pattern.",
    )

    def check(self, sparsity: float) -> None:
        """Refuse a spread that could put the sparsity of a block outside 0 to 1.

        Raises:
            UsageError: the spread is negative or too large.
        """
        room = min(sparsity, 1.0 - sparsity)
        if not 0.0 <= self.spread <= room:
            raise UsageError(
                f"--owl-spread {self.spread:g} around a sparsity of {sparsity:g}: the "
                "sparsity of a block has to stay between 0 and 1",
                fix=f"use a spread from 0 to {room:g}",
            )


@dataclass(frozen=True, slots=True)
class Recipe(Options):
    """How to prune a model by setting weights to zero.

    Attributes:
        pattern: the sparsity pattern.
        method: name of the method.
        options: the method's `Options`.
        walk: how to walk through the model.
        layers: which layers to prune.
        owl: how blocks get sparsities of their own; None for the pattern's sparsity everywhere.
        forward: precision in which blocks run on calibration data; "auto" is bf16 if the device
            multiplies it natively.
        budget: speed required of the pruned model; layers that need not be pruned for it stay
            dense. None to prune all layers.

    Raises:
        UsageError: options exclude each other, or a value is out of range.
        TypeError: `options` are not options of the method.
    """

    pattern: Pattern
    method: str
    options: Options
    walk: Walk = Walk()
    layers: Layers = Layers()
    owl: Owl | None = None
    forward: Forward = option(
        "auto",
        "--calib-forward",
        "Precision in which the blocks run on calibration data; auto is bf16 if the "
        "processor or GPU has instructions for it.",
    )
    budget: Budget | None = None

    def __post_init__(self) -> None:
        """Refuse options that exclude each other."""
        Options.__post_init__(self)
        if not isinstance(self.options, methods.load(self.method).options):
            raise TypeError(f"{type(self.options)} are not options of method {self.method}")
        if self.budget is not None:
            self._check_budget(self.budget)
        if self.owl is None:
            return
        if self.layers.keep_dense:
            raise UsageError(
                f"--allocation owl with --keep-dense {self.layers.keep_dense:g}: both "
                "choose the sparsity of each layer",
                fix="leave one of them out",
            )
        if not isinstance(self.pattern, Unstructured):
            raise UsageError(
                f"--allocation owl with pattern {self.pattern}: it gives each block its own "
                "fraction, which n:m and structured patterns cannot express",
                fix="use --pattern unstructured:FRACTION; for structured, --allocation loss",
            )
        if self.layers.sparsity_file:
            raise UsageError(
                "--allocation owl with --sparsity-file: both set the sparsity of layers",
                fix="leave one of them out",
            )
        self.owl.check(self.pattern.sparsity)

    def _check_budget(self, budget: Budget) -> None:
        """Refuse options that a speed budget excludes.

        Raises:
            UsageError: there is such an option.
        """
        if self.owl is not None or self.layers.keep_dense:
            other = "--allocation owl" if self.owl is not None else "--keep-dense"
            raise UsageError(
                f"--budget {budget.goal} with {other}: both choose the sparsity of each layer",
                fix="leave one of them out",
            )
        if getattr(self.options, "outlier_rows", 0.0):
            raise UsageError(
                f"--budget {budget.goal} with --outlier-rows: a layer with dense rows is "
                "not 2:4, so no sparse kernel can run it",
                fix="leave one of them out",
            )

    @classmethod
    def of(
        cls,
        pattern: Pattern,
        *,
        method: str = METHOD,
        preset: str = PRESET,
        owl: bool = False,
        **given: Any,
    ) -> Recipe:
        """Build a recipe from a preset of a method, overridden by the given options.

        A structured pattern does not take over the preset's tuning steps. Its columns are fitted as
        a whole when they are chosen, and tuning them afterwards made the model worse on held-out
        text; see benchmarks/LOG.md.

        Args:
            pattern: the sparsity pattern.
            method: name of the method.
            preset: one of `methods.PRESET_NAMES`.
            owl: give every block a sparsity of its own.
            given: options of the method, of `Walk`, `Layers`, `Owl`, `Budget` and this class, by
                keyword; see `option.Option`.

        Raises:
            UsageError: options exclude each other, or a value is out of range.
        """
        taken = methods.load(method)
        walk = taken.preset(preset).walk
        if isinstance(pattern, Structured):
            walk = replace(walk, tune_steps=0, tune_nsamples=0)
        return cls(
            pattern,
            method,
            taken.choose(preset, given),
            replace(walk, **chosen(Walk, given)),
            Layers(**chosen(Layers, given)),
            Owl(**chosen(Owl, given)) if owl else None,
            **chosen(cls, given),
            budget=Budget(**chosen(Budget, given)) if "budget" in given else None,
        )

    @property
    def tuning(self) -> Tuning:
        """The steps that tune all pruned layers of a block together."""
        return self.walk

    @property
    def surveys(self) -> bool:
        """Whether a walk through the dense model decides how much each block or layer loses."""
        return self.owl is not None or self.tries_layers

    @property
    def tries_layers(self) -> bool:
        """Whether a walk through the dense model measures what pruning each group would change."""
        return self.budget is not None or self.layers.keep_dense > 0.0

    @property
    def walks_dense(self) -> bool:
        """Whether the calibration data also passes through the dense model."""
        return self.walk.with_dense

    def forward_on(self, device: torch.device) -> str:
        """Return the precision in which blocks run on calibration data: "fp32" or "bf16"."""
        from thanos_deploy.machine.precision import multiplies_bfloat16

        if self.forward != "auto":
            return self.forward
        return "bf16" if multiplies_bfloat16(device) else "fp32"
