"""The request of the stage prune: all of its options. Importing this module needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from thanos_deploy import methods
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration import mixture
from thanos_deploy.calibration.data import Data
from thanos_deploy.errors import UsageError
from thanos_deploy.methods import Tuning, Walk
from thanos_deploy.option import Options, chosen, keywords, option, options_of
from thanos_deploy.pattern import Pattern, Structured, parse
from thanos_deploy.pruning.budget import Budget
from thanos_deploy.pruning.recipe import METHOD, PRESET, Layers, Owl, Recipe
from thanos_deploy.shrink.options import PRESETS as CUTS
from thanos_deploy.shrink.options import Allocation as CutAllocation
from thanos_deploy.shrink.options import Cut, Fit, Sizing
from thanos_deploy.solver.grid import Grid
from thanos_deploy.solver.grid import parse as parse_grid

if TYPE_CHECKING:
    import torch

ALLOCATIONS = ("uniform", "loss", "blocks", "owl")


@dataclass(frozen=True, slots=True)
class PruneRequest(Options):
    """How to prune a model, on which text, and what to store.

    Attributes:
        how: what to set to zero (a recipe), or what to cut out.
        data: the calibration data.
        recover: number of segments to train the remaining weights on; see `recover.recover`.
        recover_text: the text of these segments: the calibration text, or text that the dense model
            generates; see `own_text`.
        recover_rank: rank of the updates that are trained, see `low_rank`; 0 trains the weights
            themselves.
        quantize: the quantisation grid, see `solver.grid`; "none" for no quantisation.
        dtype: dtype to store: "auto" (each tensor's own), "fp32", "fp16" or "bf16".
        device: device to compute on; see `devices.choose`.
        activations: where the activations of the calibration data are kept between two blocks; see
            `activations.memory_for`. No result depends on it, so the manifest does not record it.

    Raises:
        UsageError: a value is out of range.
    """

    how: Recipe | Cut
    data: Data = Data()
    recover: int = option(
        0,
        "--recover",
        "Train the remaining weights after pruning, with the dense model as the teacher, "
        "on this many segments of --seqlen tokens from anywhere in the calibration text; "
        "a text with fewer segments is repeated, but more text helps more. Zeros stay "
        "zero. Use several hundred segments. With --quantize, the scales are trained in "
        "the same way afterwards. This takes minutes, and memory for five models in "
        "float32 and for the activations of 2048 tokens. 0 trains nothing.",
        metavar="SEGMENTS",
        least=0,
    )
    recover_text: Literal["calib", "own", "chat"] = option(
        "calib",
        "--recover-text",
        "What --recover trains on. calib: the calibration text. own: text that the dense "
        "model generates, from prompts taken from the calibration text. chat: questions "
        "and answers that the dense model generates in its chat template. Generated "
        "pieces that repeat themselves, or that have more symbols than the calibration "
        "text, are dropped; the others are saved as own-text.jsonl.",
    )
    recover_rank: int = option(
        0,
        "--recover-rank",
        "With --recover, train an update of this rank for each weight matrix, masked where "
        "the weights are zero, in place of the weights themselves. This takes memory for "
        "three models in float32 instead of five. 0 trains the weights themselves.",
        metavar="RANK",
        least=0,
    )
    quantize: str = option(
        "none",
        "--quantize",
        "Quantise the linear layers of the blocks after pruning. The columns after each "
        "column compensate for its rounding error, and --tune-steps tunes the blocks; "
        "zeros stay zero. GROUP inputs of an output share one scale, or all of its inputs "
        "if GROUP is row; :asym gives each group a zero point. The checkpoint stores the "
        "dequantised weights. GROUP is 32 if it is left out.",
        metavar="int8|int4[:GROUP][:asym]",
    )
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "auto", "--dtype", "dtype of the stored checkpoint; auto keeps the model's own."
    )
    device: str = option(
        "auto",
        "--device",
        "Device on which PyTorch computes; auto is the first GPU, or the CPU if there is none.",
        metavar="auto|cpu|cuda[:N]",
    )
    activations: Literal["auto", "device", "host", "disk"] = option(
        "auto",
        "--activations",
        "Where the activations of the calibration data are kept between two blocks; auto "
        "is the GPU's memory if they easily fit there, else the disk. A copy is on disk "
        "in any case, so that an interrupted run can continue.",
    )

    @classmethod
    def of(
        cls,
        pattern: Pattern,
        *,
        method: str = METHOD,
        preset: str = PRESET,
        keep_shape: bool = False,
        allocation: str | None = None,
        **given: Any,
    ) -> PruneRequest:
        """Build a request from a preset of a method and the options that replace its defaults.

        Args:
            pattern: the sparsity pattern; a structured pattern cuts heads and channels out.
            method: name of a method.
            preset: one of `methods.PRESET_NAMES`.
            keep_shape: for a structured pattern, set columns to zero instead.
            allocation: how the sparsity is spread over layers or blocks: "uniform", the same
                everywhere; "loss" and "blocks" for what is cut out, see `Sizing`; "owl" for
                unstructured patterns, see `Owl`. None for "uniform".
            given: any other option of the command `prune` by its keyword: `block_size` for
                `--block-size`.

        Raises:
            UsageError: there is no such option, options contradict each other, or a value is out
                of range.
        """
        if allocation not in (None, *ALLOCATIONS):
            raise UsageError(
                f"--allocation {allocation!r} is not one of the possible values",
                fix=f"use one of {', '.join(ALLOCATIONS)}",
            )
        others = {name: given[name] for name in given.keys() - keywords(cls, Data)}
        kind = f"{pattern}{' and --keep-shape' if keep_shape else ''}"
        how: Recipe | Cut
        if isinstance(pattern, Structured) and not keep_shape:
            _check_cut(kind, others, method=method, allocation=allocation)
            spread = cast(CutAllocation, allocation or "uniform")
            how = Cut.of(pattern, preset=preset, allocation=spread, **others)
            recover = CUTS[preset].recover
        else:
            if keep_shape and not isinstance(pattern, Structured):
                raise _only_for_cuts("--keep-shape", str(pattern))
            _check_zeros(kind, others, method=method, allocation=allocation)
            how = Recipe.of(
                pattern, method=method, preset=preset, owl=allocation == "owl", **others
            )
            recover = methods.load(method).preset(preset).recover
        return cls(how, Data(**chosen(Data, given)), **{"recover": recover, **chosen(cls, given)})

    def __post_init__(self) -> None:
        """Check the value of each option, and refuse options of `recover` without `recover`."""
        Options.__post_init__(self)
        if self.quantize != "none":
            parse_grid(self.quantize)
        if self.recover_text != "calib" and not self.recover:
            raise UsageError(
                f"--recover-text {self.recover_text} without --recover",
                fix="give the number of training segments with --recover, or leave "
                "--recover-text out",
            )
        if self.recover_rank and not self.recover:
            raise UsageError(
                f"--recover-rank {self.recover_rank} without --recover",
                fix="give the number of training segments with --recover, or leave "
                "--recover-rank out",
            )

    @property
    def grid(self) -> Grid | None:
        """The quantisation grid; None for no quantisation."""
        return None if self.quantize == "none" else parse_grid(self.quantize)

    @property
    def chosen_device(self) -> torch.device:
        """The device of this machine that `device` names.

        Raises:
            UsageError, PlatformError: see `devices.choose`.
        """
        from thanos_deploy.machine import devices

        return devices.choose(self.device)

    @property
    def forward(self) -> str:
        """Precision in which blocks run on calibration data on this machine: "fp32" or "bf16"."""
        return self.how.forward_on(self.chosen_device)

    def to_json(self) -> Json:
        """Return the options for the manifest: resolved, flat, and with file names, not paths."""
        from thanos_deploy.machine import devices

        how: Json = {"pattern": str(self.how.pattern), "method": self.how.method}
        match self.how:
            case Cut(_, sizing, fit, tuning):
                how |= {"cut": True, **encode(sizing), **encode(fit)}
                how |= encode(tuning) if tuning.tune_steps else {}
            case Recipe(_, _, options, walk, layers, owl, _, budget):
                how |= {**encode(options), **encode(walk), "calib_forward": self.forward}
                if owl is not None:
                    how |= {"allocation": "owl"}
                    how |= {_OWL + name: value for name, value in encode(owl).items()}
                how |= {name: value for name, value in encode(layers).items() if value}
                if layers.sparsity_file:
                    how["sparsity_file"] = Path(layers.sparsity_file).name
                if budget is not None:
                    how |= {one.keyword: getattr(budget, one.name) for one in options_of(Budget)}
                    measured = budget.measured
                    how["budget_measured"] = Path(measured).name if measured else None
        return {
            **how,
            **_recorded(self.data),
            "dtype": self.dtype,
            **({"recover": self.recover} if self.recover else {}),
            **({} if self.recover_text == "calib" else {"recover_text": self.recover_text}),
            **({"recover_rank": self.recover_rank} if self.recover_rank else {}),
            **({} if self.grid is None else {"quantize": str(self.grid)}),
            **devices.recorded(self.device),
        }

    @classmethod
    def from_json(cls, options: Json) -> PruneRequest:
        """Rebuild a request from what `to_json` returned.

        Raises:
            ValueError: `options` is not such a record; see `codec.decode`.
        """
        pattern = parse(options["pattern"])
        how: Recipe | Cut
        if options.get("cut"):
            assert isinstance(pattern, Structured)
            how = Cut(pattern, _part(Sizing, options), _part(Fit, options), _part(Tuning, options))
        else:
            owl = {name.removeprefix(_OWL): value for name, value in options.items()}
            how = Recipe(
                pattern,
                options["method"],
                _part(methods.load(options["method"]).options, options),
                _part(Walk, options),
                _part(Layers, options),
                _part(Owl, owl) if options.get("allocation") == "owl" else None,
                options["calib_forward"],
                Budget(**chosen(Budget, options)) if "budget" in options else None,
            )
        return cls(
            how,
            _part(Data, options),
            recover=options.get("recover", 0),
            recover_text=options.get("recover_text", "calib"),
            recover_rank=options.get("recover_rank", 0),
            quantize=options.get("quantize", "none"),
            dtype=options["dtype"],
            device=options.get("device", "cpu"),
        )


_OWL = "owl_"


def _recorded(data: Data) -> Json:
    """Return the calibration data for the manifest.

    Options that older records do not have are left out while they have their defaults.
    """
    usual = encode(Data())
    newer = {name for name in ("calib_rows", "calib_cut") if getattr(data, name) == usual[name]}
    found = {name: value for name, value in encode(data).items() if name not in newer}
    return {**found, "calib": mixture.title(data.calib)}


def _part(cls: type[Any], options: Mapping[str, Any]) -> Any:
    """Decode a dataclass from the options that have the names of its fields; ignore all others."""
    own = {field.name for field in fields(cls)}
    return decode(cls, {name: value for name, value in options.items() if name in own})


def _check_cut(
    kind: str,
    given: Mapping[str, Any],
    *,
    method: str,
    allocation: str | None,
) -> None:
    """Refuse options that have no meaning when heads and channels are cut out.

    Raises:
        UsageError: such an option is given.
    """
    if allocation == "owl":
        raise UsageError(
            f"--allocation owl with pattern {kind}: it gives every block its own sparsity, "
            "which is not possible where heads and channels are cut out",
            fix="use --pattern unstructured:FRACTION; for structured, --allocation loss",
        )
    for one in (*options_of(Layers), *options_of(Budget)):
        if given.get(one.keyword):
            raise UsageError(
                f"{one.declared.flag} with {kind}: a head or channel is cut out of every "
                "layer that produces or reads it, so layers cannot be chosen one by one",
                fix="leave it out, or use --keep-shape for columns of zeros",
            )
    if method != Cut.METHOD:
        raise UsageError(
            f"--method {method} with {kind}: only the method {Cut.METHOD} cuts out heads "
            "and channels",
            fix=f"use --method {Cut.METHOD}, or --keep-shape for columns of zeros by this method",
        )
    unused = [
        _flag(name)
        for name in sorted(given.keys() - keywords(Sizing, Fit, Tuning))
        if given[name] not in ((), None, "auto")
    ]
    if unused:
        raise UsageError(
            f"{kind} with {', '.join(unused)}: not possible where heads and channels are cut out",
            fix="leave it out, or use --keep-shape for columns of zeros",
        )


def _check_zeros(
    kind: str, given: Mapping[str, Any], *, method: str, allocation: str | None
) -> None:
    """Refuse options that have no meaning when weights are set to zero.

    Raises:
        UsageError: such an option is given.
    """
    if allocation in ("loss", "blocks"):
        raise _only_for_cuts(f"--allocation {allocation}", kind)
    own = methods.load(method).options
    for name in given:
        if name in keywords(Sizing):
            raise _only_for_cuts(_flag(name), kind)
        if name in keywords(Owl) and allocation != "owl":
            raise UsageError(
                f"{_flag(name)} without --allocation owl",
                fix="give --allocation owl as well, or leave it out",
            )
        if name in keywords(Budget) and "budget" not in given:
            raise UsageError(
                f"{_flag(name)} without --budget", fix="give --budget as well, or leave it out"
            )
        if name not in keywords(Owl, Budget, own, Walk, Layers, Recipe):
            takes = ", ".join(one.declared.flag for one in options_of(own)) or "none"
            raise UsageError(
                f"method {method} has no option {_flag(name)}",
                fix=f"leave it out; {method} takes {takes}",
            )


def _only_for_cuts(flag: str, kind: str) -> UsageError:
    return UsageError(
        f"{flag} with pattern {kind}",
        fix="leave it out; it is for structured patterns that cut heads and channels out",
    )


def _flag(keyword: str) -> str:
    return f"--{keyword.replace('_', '-')}"
