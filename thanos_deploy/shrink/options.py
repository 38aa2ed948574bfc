"""Options of structured pruning: what to cut out of a model, and how. They need no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from thanos_deploy.errors import UsageError
from thanos_deploy.methods import NO_TUNING, Tuning
from thanos_deploy.option import Options, chosen, option
from thanos_deploy.pattern import Structured
from thanos_deploy.solver.damping import Damping

if TYPE_CHECKING:
    import torch

Part = Literal["heads", "ffn", "both", "experts"]
Allocation = Literal["uniform", "loss", "blocks"]


@dataclass(frozen=True, slots=True)
class Sizing(Options):
    """How to choose the widths of the blocks; see `sizing.plan`.

    Attributes:
        part: what may be cut.
        multiple: the number of feed-forward channels that stay is a multiple of this; None for the
            largest power of two up to `steps.FRIENDLY_MULTIPLE` that divides the dense model's
            number.
        allocation: "uniform" for the same widths in every block; "loss" for different widths by
            block, with the same total number of parameters; or "blocks" to remove whole blocks, see
            `depth`.

    Raises:
        UsageError: a value is out of range, or whole blocks are to be removed and `part` or
            `multiple` is set as well.
    """

    part: Part = option(
        "both",
        "--shrink",
        "structured: what to cut out. In a model with experts, both means whole experts, "
        "and ffn means channels of every expert.",
    )
    multiple: int | None = option(
        None,
        "--ffn-multiple",
        "structured: the number of feed-forward channels that stay is a multiple of this. "
        " [default: 64, or the largest smaller power of two that divides the dense "
        "model's number of channels]",
    )
    allocation: Allocation = "uniform"

    def __post_init__(self) -> None:
        """Refuse values out of range, and options that exclude each other."""
        Options.__post_init__(self)
        if self.drops_blocks and (self.part != "both" or self.multiple is not None):
            unused = "--shrink" if self.part != "both" else "--ffn-multiple"
            raise UsageError(
                f"--allocation blocks with {unused}: whole blocks are removed, and the "
                "others keep their heads and channels",
                fix="leave one of them out",
            )

    @property
    def drops_blocks(self) -> bool:
        """Whether whole blocks are removed."""
        return self.allocation == "blocks"


@dataclass(frozen=True, slots=True)
class Fit(Damping):
    """How the layers of a cut model are refitted.

    Attributes:
        dense_target: how far the target of every linear layer, cut or not, is moved towards its
            output in the dense model, 0 to 1; see `hessian.retarget`. The default measured best;
            see benchmarks/LOG.md.
    """

    dense_target: float = option(
        0.0, "--dense-target", "How far each layer aims at the dense model.", least=0.0, most=1.0
    )


@dataclass(frozen=True, slots=True)
class Preset:
    """A preset for structured pruning.

    Attributes:
        tuning: how to tune each block as a whole after its cut.
        recover: number of segments on which to train the remaining weights of the model afterwards;
            see `recover.recover`.
    """

    tuning: Tuning = NO_TUNING
    recover: int = 0


# The values that measured best; see benchmarks/LOG.md. The presets of pruning have the same names.
PRESETS = {
    "fast": Preset(),
    "best": Preset(Tuning(tune_steps=240, tune_nsamples=224)),
    "max": Preset(Tuning(tune_steps=240, tune_nsamples=224), recover=1024),
}


@dataclass(frozen=True, slots=True)
class Cut:
    """What to cut out of a model, and how.

    Attributes:
        pattern: the fraction of the blocks' parameters to remove.
        sizing: how to choose the widths.
        fit: how to refit the layers.
        tuning: how to tune each block as a whole after its cut.
    """

    METHOD: ClassVar[str] = "thanos"

    pattern: Structured
    sizing: Sizing = Sizing()
    fit: Fit = Fit()
    tuning: Tuning = NO_TUNING

    @classmethod
    def of(
        cls,
        pattern: Structured,
        *,
        preset: str = "fast",
        allocation: Allocation = "uniform",
        **given: Any,
    ) -> Cut:
        """Return a preset with some of its options replaced.

        Args:
            pattern: the fraction of the blocks' parameters to remove.
            preset: one of `PRESETS`.
            allocation: see `Sizing`.
            given: options of `Sizing`, `Fit` and `Tuning`, by their keywords; see `option.Option`.

        Raises:
            UsageError: the preset does not exist, a value is out of range, or options exclude each
                other.
        """
        if preset not in PRESETS:
            raise UsageError(
                f"--preset {preset} is not available with {pattern}, which cuts heads and channels "
                "out",
                fix=f"use one of {', '.join(PRESETS)}; the papers set columns to zero instead, "
                "which --keep-shape does",
            )
        sizing = Sizing(**chosen(Sizing, given), allocation=allocation)
        tuning = replace(PRESETS[preset].tuning, **chosen(Tuning, given))
        return cls(pattern, sizing, Fit(**chosen(Fit, given)), tuning)

    @property
    def method(self) -> str:
        """The method whose update refits the layers."""
        return self.METHOD

    @property
    def surveys(self) -> bool:
        """Whether a walk through the dense model measures the losses before the cut; always."""
        return True

    @property
    def walks_dense(self) -> bool:
        """Whether the calibration data passes the dense model as well."""
        return self.fit.dense_target > 0.0 or self.tuning.tune_steps > 0

    def forward_on(self, device: torch.device) -> str:
        """The dtype in which blocks run on calibration data; cutting needs float32 statistics."""
        return "fp32"
