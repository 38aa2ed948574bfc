"""What is to be cut out of a model, and how: values that need no PyTorch."""

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
        multiple: what the number of feed-forward channels of a block is a multiple of; None for
            the largest power of two up to `steps.FRIENDLY_MULTIPLE` that divides the model's own.
        allocation: "uniform", the same widths in every block; "loss", each block its own, for the
            same number of parameters in all; or "blocks", whole blocks go, see `depth`.

    Raises:
        UsageError: whole blocks are to go, and what of a block may go as well.
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
        """Refuse what no option has, and what has no meaning together."""
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
        """Whole blocks go."""
        return self.allocation == "blocks"


@dataclass(frozen=True, slots=True)
class Fit(Damping):
    """How what is left of a model is refitted.

    Attributes:
        dense_target: how far every linear layer, cut or not, aims at the output that it has in the
            dense model; see `hessian.retarget`. What measured best; see benchmarks/LOG.md.
    """

    dense_target: float = option(
        0.0, "--dense-target", "How far each layer aims at the dense model.", least=0.0, most=1.0
    )


@dataclass(frozen=True, slots=True)
class Preset:
    """A way to cut.

    Attributes:
        tuning: steps of all that is left of a block.
        recover: segments to train the remaining weights on afterwards; see `recover.recover`.
    """

    tuning: Tuning = NO_TUNING
    recover: int = 0


# What measured best; see benchmarks/LOG.md. The presets of pruning have the same names.
PRESETS = {
    "fast": Preset(),
    "best": Preset(Tuning(tune_steps=240, tune_nsamples=224)),
    "max": Preset(Tuning(tune_steps=240, tune_nsamples=224), recover=1024),
}


@dataclass(frozen=True, slots=True)
class Cut:
    """What to cut out, and how.

    Attributes:
        pattern: the fraction of the blocks' parameters to remove.
        sizing: how to choose the widths.
        fit: how to refit what is left.
        tuning: steps of all that is left of a block.
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
        """A preset, but for what is given.

        Args:
            pattern: the fraction.
            preset: one of `PRESETS`.
            allocation: see `Sizing`.
            given: options of `Sizing`, `Fit` and `Tuning`, by their keywords; see `option.Option`.

        Raises:
            UsageError: a value is out of range.
        """
        if preset not in PRESETS:
            raise UsageError(
                f"--preset {preset} with {pattern}: the paper sets columns to zero and cuts "
                "nothing out",
                fix=f"use one of {', '.join(PRESETS)}, or --keep-shape for columns of zeros",
            )
        sizing = Sizing(**chosen(Sizing, given), allocation=allocation)
        tuning = replace(PRESETS[preset].tuning, **chosen(Tuning, given))
        return cls(pattern, sizing, Fit(**chosen(Fit, given)), tuning)

    @property
    def method(self) -> str:
        """The method whose update refits what is left."""
        return self.METHOD

    @property
    def surveys(self) -> bool:
        """A walk through the dense model decides what each block loses."""
        return True

    @property
    def walks_dense(self) -> bool:
        """The calibration data passes the dense model as well."""
        return self.fit.dense_target > 0.0 or self.tuning.tune_steps > 0

    def forward_on(self, device: torch.device) -> str:
        """What blocks run in on calibration data; statistics of cutting need float32."""
        return "fp32"
