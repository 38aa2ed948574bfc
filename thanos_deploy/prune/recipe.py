"""What a user asks for, stage by stage: values that the command line makes and `stages` obey."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch

from thanos_deploy import methods
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.errors import UsageError
from thanos_deploy.machine import devices
from thanos_deploy.machine.precision import multiplies_bfloat16
from thanos_deploy.methods import Option
from thanos_deploy.pattern import Pattern, Structured, Unstructured
from thanos_deploy.prune import owl


class SizingOptions(TypedDict):
    """Keyword arguments of `sizing.plan`."""

    part: str
    multiple: int | None
    allocation: str


class FitOptions(TypedDict):
    """Keyword arguments of `cut.shrink`."""

    damping: float
    damping_mode: str
    dense_target: float


class OwlOptions(TypedDict):
    """Keyword arguments of `owl.check`."""

    threshold: float
    spread: float


class WalkOptions(TypedDict):
    """Keyword arguments of `layers.prune` that a preset can set."""

    true_sequential: bool
    dense_target: float
    tune_steps: int


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What to prune to, how, and on which text.

    Attributes:
        pattern: the sparsity pattern.
        method: name of the method.
        preset: one of `methods.PRESET_NAMES`, the setting of the method; see `methods.Method`.
        options: what the method is told otherwise.
        true_sequential, dense_target, tune_steps: see `layers.prune`; None for the preset's.
        calib: "builtin" or the path of a text.
        text_field: the field of a JSON Lines row that holds the text.
        nsamples, seqlen: calibration segments and tokens of each.
        seed: picks the segments.
        calib_forward: what blocks run in on calibration data, "fp32" or "bf16"; "auto" is
            bf16 where the processor does it natively.
        dtype: "auto" (each tensor's own), "fp32", "fp16" or "bf16".
        keep_shape: for a structured pattern: set columns to zero instead of cutting heads and
            channels out.
        shrink: what to cut out: "heads", "ffn" or "both"; None for both.
        ffn_multiple: see `sizing.plan`; None for its default.
        allocation: how much each layer or block loses: "uniform", all alike; "loss" for widths,
            see `sizing.plan`; "owl" for unstructured patterns, see `owl`. None for uniform.
        owl_threshold, owl_spread: see `owl`; None for the paper's.
        include, ignore: layers to prune, None of them for all, and layers to leave dense; see
            `assignment.assign`.
        sparsity_file: path of a file of layers with patterns of their own, or None.
        recover: on how many segments of the calibration text to train what is left; see
            `recover.recover`.
        device: where to do it; see `devices.choose`.
    """

    pattern: Pattern
    method: str = "thanos"
    preset: str = "best"
    options: Mapping[str, Option] = field(default_factory=dict)
    true_sequential: bool | None = None
    dense_target: float | None = None
    tune_steps: int | None = None
    calib: str = BUILTIN
    text_field: str = "text"
    nsamples: int = 32
    seqlen: int = 512
    seed: int = 0
    calib_forward: str = "auto"
    dtype: str = "auto"
    keep_shape: bool = False
    shrink: str | None = None
    ffn_multiple: int | None = None
    allocation: str | None = None
    owl_threshold: float | None = None
    owl_spread: float | None = None
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    sparsity_file: str | None = None
    recover: int = 0
    device: str = "auto"

    @property
    def shrinks(self) -> bool:
        """Heads and channels are cut out."""
        return isinstance(self.pattern, Structured) and not self.keep_shape

    @property
    def surveys(self) -> bool:
        """A walk through the dense model decides what each block loses."""
        return self.shrinks or self.allocation == "owl"

    @property
    def sizing_options(self) -> SizingOptions:
        """How to choose the widths of a shrunk model."""
        return {
            "part": self.shrink or "both",
            "multiple": self.ffn_multiple,
            "allocation": self.allocation or "uniform",
        }

    @property
    def owl_options(self) -> OwlOptions:
        """How OWL spreads the sparsity: given, else the paper's."""
        return {
            "threshold": owl.THRESHOLD if self.owl_threshold is None else self.owl_threshold,
            "spread": owl.SPREAD if self.owl_spread is None else self.owl_spread,
        }

    @property
    def fit_options(self) -> FitOptions:
        """How to refit a shrunk model: given, else what measured best; see benchmarks/LOG.md."""
        return {
            "damping": float(self.options.get("damping", 0.01)),
            "damping_mode": str(self.options.get("damping_mode", "mean")),
            "dense_target": self.dense_target or 0.0,
        }

    def check(self) -> None:
        """Refuse options that have no meaning together.

        Raises:
            UsageError: they have none.
            PlatformError: the device is not there.
        """
        devices.choose(self.device)
        self._check_allocation()
        if not self.shrinks:
            for name, value in (
                ("--shrink", self.shrink),
                ("--ffn-multiple", self.ffn_multiple),
                ("--keep-shape", self.keep_shape and not isinstance(self.pattern, Structured)),
            ):
                if value:
                    raise UsageError(
                        f"{name} with pattern {self._kind}",
                        fix="leave it out; it is for structured patterns that cut heads and "
                        "channels out",
                    )
            return
        for name, layers in (
            ("--include", self.include),
            ("--ignore", self.ignore),
            ("--sparsity-file", self.sparsity_file),
        ):
            if layers:
                raise UsageError(
                    f"{name} with {self.pattern}: a head or channel that is cut out goes from "
                    "every layer that makes or reads it",
                    fix="leave it out, or use --keep-shape for columns of zeros",
                )
        if self.method != "thanos":
            raise UsageError(
                f"--method {self.method} with {self.pattern}: heads and channels are chosen and "
                "what reads them is refitted by thanos only",
                fix="use --method thanos, or --keep-shape for columns of zeros by this method",
            )
        if self.options.get("outlier_rows"):
            raise UsageError(
                f"--outlier-rows {self.options['outlier_rows']:g} with {self.pattern}: rows that "
                "stay dense read every input, so nothing could be cut out",
                fix="leave --outlier-rows out, or use --keep-shape for columns of zeros",
            )
        if self.preset == "paper":
            raise UsageError(
                f"--preset paper with {self.pattern}: the paper sets columns to zero and "
                "cuts nothing out",
                fix="use --keep-shape for columns of zeros, or leave --preset out",
            )
        unused = [
            name.replace("_", " ")
            for name in self.options
            if name not in ("damping", "damping_mode", "outlier_rows")
        ]
        if self.true_sequential is not None:
            unused.append("true sequential")
        if self.preset != "best":
            unused.append(f"preset {self.preset}")
        if self.tune_steps is not None:
            unused.append("tune steps")
        if self.calib_forward != "auto":
            unused.append("calib forward")
        if unused:
            raise UsageError(
                f"{self.pattern} with {', '.join(unused)}: it has no meaning "
                "where heads and channels are cut out",
                fix="leave it out, or use --keep-shape for columns of zeros",
            )

    def _check_allocation(self) -> None:
        """Refuse an allocation that the pattern does not have."""
        match self.allocation:
            case "loss" if not self.shrinks:
                raise UsageError(
                    f"--allocation loss with pattern {self._kind}",
                    fix="leave it out; it is for structured patterns that cut heads and channels "
                    "out",
                )
            case "owl" if not isinstance(self.pattern, Unstructured):
                raise UsageError(
                    f"--allocation owl with pattern {self._kind}: it gives every block a fraction "
                    "of its own, which widths and the few steps of n:m do not have",
                    fix="use --pattern unstructured:FRACTION; for structured, --allocation loss",
                )
            case "owl" if self.sparsity_file:
                raise UsageError(
                    "--allocation owl with --sparsity-file: both say how much a layer loses",
                    fix="leave one of them out",
                )
            case "owl":
                owl.check(self.pattern.sparsity, **self.owl_options)
            case _ if (self.owl_threshold, self.owl_spread) != (None, None):
                raise UsageError(
                    "--owl-threshold or --owl-spread without --allocation owl",
                    fix="give --allocation owl as well, or leave them out",
                )

    @property
    def _kind(self) -> str:
        """The pattern, and whether it leaves the shapes."""
        return f"{self.pattern}{' and --keep-shape' if self.keep_shape else ''}"

    @property
    def resolved_options(self) -> dict[str, Option]:
        """All of the method's options: given, else the preset's, else the method's defaults.

        Raises:
            UsageError: the method has no such option.
        """
        chosen = methods.preset(self.method, self.preset)
        return methods.resolve(self.method, {**chosen.options, **self.options})

    @property
    def walk_options(self) -> WalkOptions:
        """How to walk through the model: given, else the preset's.

        Columns of zeros are fitted as a whole when they are chosen, and steps that a preset would
        have taken after that made them worse on held-out text; see benchmarks/LOG.md.
        """
        chosen = methods.preset(self.method, self.preset)
        tune_steps = 0 if isinstance(self.pattern, Structured) else chosen.tune_steps
        return {
            "true_sequential": chosen.true_sequential
            if self.true_sequential is None
            else self.true_sequential,
            "dense_target": chosen.dense_target if self.dense_target is None else self.dense_target,
            "tune_steps": tune_steps if self.tune_steps is None else self.tune_steps,
        }

    @property
    def walks_dense(self) -> bool:
        """The calibration data passes the dense model as well."""
        if self.shrinks:
            return self.fit_options["dense_target"] > 0.0
        walk = self.walk_options
        return walk["dense_target"] > 0.0 or walk["tune_steps"] > 0

    @property
    def resolved_forward(self) -> str:
        """The calibration's "fp32" or "bf16" on this machine; cutting needs "fp32"."""
        if self.shrinks:
            return "fp32"
        if self.calib_forward != "auto":
            return self.calib_forward
        return "bf16" if multiplies_bfloat16(self.resolved_device) else "fp32"

    @property
    def resolved_device(self) -> torch.device:
        """The device of this machine.

        Raises:
            UsageError, PlatformError: see `devices.choose`.
        """
        return devices.choose(self.device)

    def to_json(self) -> Json:
        """For the manifest: the text by its name, not its path."""
        how: Json = (
            {"cut": True, **self.sizing_options, **self.fit_options}
            if self.shrinks
            else {
                **self.resolved_options,
                **self.walk_options,
                "calib_forward": self.resolved_forward,
            }
        )
        chosen = {
            "include": list(self.include),
            "ignore": list(self.ignore),
            "sparsity_file": Path(self.sparsity_file).name if self.sparsity_file else None,
        }
        if self.allocation == "owl":
            how |= {"allocation": "owl"}
            how |= {f"owl_{name}": value for name, value in self.owl_options.items()}
        return {
            "pattern": str(self.pattern),
            "method": self.method,
            **how,
            **{name: value for name, value in chosen.items() if value},
            "calib": Path(self.calib).name,
            "text_field": self.text_field,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "dtype": self.dtype,
            **({"recover": self.recover} if self.recover else {}),
            **devices.recorded(self.device),
        }
