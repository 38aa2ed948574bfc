"""What a user asks for, stage by stage: values that the command line makes and `stages` obey."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TypedDict

import torch

from runtime.latency import Decode, Generate, OpenLoop, Prefill, Scenario
from thanos_deploy import devices, methods, owl
from thanos_deploy.artifact import Json, sha256
from thanos_deploy.errors import UsageError
from thanos_deploy.methods import Option
from thanos_deploy.pattern import Pattern, Structured, Unstructured
from thanos_deploy.precision import multiplies_bfloat16
from thanos_deploy.texts import BUILTIN

_RUN = re.compile(r"[A-Za-z0-9_-]+")


def _where(device: str) -> Json:
    """For the manifest: a GPU rounds otherwise than a processor, so a result says if it is of one.

    Raises:
        UsageError, PlatformError: see `devices.choose`.
    """
    chosen = devices.choose(device)
    return {} if chosen.type == "cpu" else {"device": chosen.type}


class SizingOptions(TypedDict):
    """Keyword arguments of `sizing.plan`."""

    part: str
    multiple: int | None
    allocation: str


class FitOptions(TypedDict):
    """Keyword arguments of `shrink.shrink`."""

    damping: float
    damping_mode: str
    dense_target: float


class OwlOptions(TypedDict):
    """Keyword arguments of `owl.check`."""

    threshold: float
    spread: float


class WalkOptions(TypedDict):
    """Keyword arguments of `prune.prune` that a preset can set."""

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
        true_sequential, dense_target, tune_steps: see `prune.prune`; None for the preset's.
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
            **_where(self.device),
        }


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What the graph holds its weights in, how long a text it is meant for, and what it gives.

    Attributes:
        dtype: "fp32", "fp16" or "int8"; see `exporters.onnx.export`.
        max_sequence: prompt and answer together; None for all that the model takes.
        logits: "all", after every token, or "last".
    """

    dtype: str = "fp32"
    max_sequence: int | None = None
    logits: str = "all"

    def to_json(self) -> Json:
        """For the manifest; graphs were made with all logits before there was a choice."""
        chosen = asdict(self)
        if self.logits == "all":
            del chosen["logits"]
        return chosen


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a TensorRT engine is built for.

    Attributes:
        dtype: of the graph that it is built from: "fp16", "fp32" or "int8-qdq".
        max_sequence: the most tokens, prompt and answer together; None for what the graph of the
            bundle is meant for.
        logits: of that graph: "last", which is all that generating text needs, or "all".
        batch, prompt: the usual number of sequences and of prompt tokens, and the largest; see
            `exporters.tensorrt.export` for None.
        form: "matmul", "conv1x1" (see `exporters._conv1x1`), or "auto": whichever is faster.
        compatibility: one of `exporters.tensorrt.COMPATIBILITY`.
        architectures: the GPUs to build for; empty for the one of this machine (tensorrt) or all
            that the library knows (tensorrt-rtx).
    """

    dtype: str = "fp16"
    max_sequence: int | None = None
    logits: str = "last"
    batch: tuple[int, ...] = (1, 8)
    prompt: tuple[int, ...] | None = None
    form: str = "matmul"
    compatibility: str = "none"
    architectures: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """For the manifest."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """Which text to measure perplexity on: "builtin" or a path, how much of it, and where."""

    text: str = BUILTIN
    text_field: str = "text"
    segments: int = 12
    seqlen: int = 1024
    device: str = "auto"

    def to_json(self) -> Json:
        """For the manifest: the text by its name, not its path."""
        given = asdict(self)
        del given["device"]
        return {**given, "text": Path(self.text).name, **_where(self.device)}


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Which tasks of lm-evaluation-harness to run, zero-shot.

    Attributes:
        tasks: their names.
        folder: with task files that the library does not have; None for none.
        limit: the most examples of each task; None for all.
        device: where the checkpoint runs; see `devices.choose`.
    """

    tasks: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    device: str = "auto"

    @property
    def files(self) -> Json:
        """Hashes of the files in the folder, by name."""
        if self.folder is None:
            return {}
        return {
            path.relative_to(self.folder).as_posix(): sha256(path)
            for path in sorted(Path(self.folder).rglob("*"))
            if path.is_file()
        }

    def to_json(self) -> Json:
        """For the manifest: the folder by its name, not its path."""
        folder = None if self.folder is None else Path(self.folder).name
        return {
            "tasks": list(self.tasks),
            "folder": folder,
            "limit": self.limit,
            **_where(self.device),
        }


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to time, against what, how often; the defaults are those of `prune-export`.

    Attributes:
        run: name of the run, and of its file.
        kinds: of scenarios, keys of `runtime.latency.KINDS`.
        batches: sequences at once; open-loop has one.
        prompts: tokens of a prompt; open-loop takes the first.
        pasts: tokens before the first timed step of decode; None for those of the prompts.
        new_tokens: steps of decode, tokens of an answer.
        rounds: that count.
        warmup: the most that do not.
        requests: of open-loop in one round.
        rate: requests a second; None for half of what the baseline can take.
        driver: of open-loop; see `runtime.load`.
        provider: what to run on.
        threads: that compute on a CPU; None for one on each processor.
        sample_prompt, sample_tokens: of the sample text.
    """

    run: str = "latency"
    kinds: tuple[str, ...] = ("prefill", "decode")
    batches: tuple[int, ...] = (1,)
    prompts: tuple[int, ...] = (128,)
    pasts: tuple[int, ...] | None = None
    new_tokens: int = 16
    rounds: int = 20
    warmup: int = 5
    requests: int = 4
    rate: float | None = None
    driver: str = "poisson"
    provider: str = "cpu"
    threads: int | None = None
    sample_prompt: str = "The capital of France is"
    sample_tokens: int = 48

    @property
    def scenarios(self) -> list[Scenario]:
        """Every combination of the grids, by kind."""
        of_kind: dict[str, list[Scenario]] = {
            "prefill": [Prefill(*size) for size in product(self.batches, self.prompts)],
            "decode": [
                Decode(*size, self.new_tokens)
                for size in product(self.batches, self.pasts or self.prompts)
            ],
            "generate": [
                Generate(*size, self.new_tokens) for size in product(self.batches, self.prompts)
            ],
            "open-loop": [
                OpenLoop(self.prompts[0], self.new_tokens, self.requests, self.rate, self.driver)
            ],
        }
        return [scenario for kind in self.kinds for scenario in of_kind[kind]]

    def check(self, max_tokens: int) -> None:
        """Refuse what the models do not take, and names that are none.

        Args:
            max_tokens: the most tokens that every model takes.

        Raises:
            UsageError: there is such a thing.
        """
        if not _RUN.fullmatch(self.run) or self.run == "sample":
            raise UsageError(
                f"--run {self.run!r}: not a name for a file of a bundle",
                fix="use letters, digits, - and _, and not the name sample",
            )
        longest = max(self.scenarios, key=lambda scenario: scenario.tokens)
        if longest.tokens > max_tokens:
            raise UsageError(
                f"scenario {longest.name}: {longest.tokens} tokens; the model takes {max_tokens}",
                fix="use a smaller --prompt or --past, or fewer --new-tokens",
            )

    def to_json(self) -> Json:
        """For the manifest."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
