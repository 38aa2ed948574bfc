"""What a user asks for, stage by stage: values that the command line makes and `pipeline` obeys."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TypedDict

from runtime.latency import Decode, Generate, OpenLoop, Prefill, Scenario
from thanos_deploy import methods
from thanos_deploy.artifact import Json, sha256
from thanos_deploy.calibrate import BUILTIN
from thanos_deploy.errors import UsageError
from thanos_deploy.methods import Option
from thanos_deploy.pattern import Pattern, Structured

_RUN = re.compile(r"[A-Za-z0-9_-]+")


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


class WalkOptions(TypedDict):
    """Keyword arguments of `prune.prune` that a preset can set."""

    true_sequential: bool
    dense_target: float


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What to prune to, how, and on which text.

    Attributes:
        pattern: the sparsity pattern.
        method: name of the method.
        preset: "best" or "paper", the setting of the method; see `methods.Preset`.
        options: what the method is told otherwise.
        true_sequential, dense_target: see `prune.prune`; None for the preset's.
        calib: "builtin" or the path of a text.
        text_field: the field of a JSON Lines row that holds the text.
        nsamples, seqlen: calibration segments and tokens of each.
        seed: picks the segments.
        dtype: "auto" (each tensor's own), "fp32", "fp16" or "bf16".
        keep_shape: for a structured pattern: set columns to zero instead of cutting heads and
            channels out.
        shrink: what to cut out: "heads", "ffn" or "both"; None for both.
        ffn_multiple, allocation: see `sizing.plan`; None for its defaults.
    """

    pattern: Pattern
    method: str = "thanos"
    preset: str = "best"
    options: Mapping[str, Option] = field(default_factory=dict)
    true_sequential: bool | None = None
    dense_target: float | None = None
    calib: str = BUILTIN
    text_field: str = "text"
    nsamples: int = 32
    seqlen: int = 512
    seed: int = 0
    dtype: str = "auto"
    keep_shape: bool = False
    shrink: str | None = None
    ffn_multiple: int | None = None
    allocation: str | None = None

    @property
    def shrinks(self) -> bool:
        """Heads and channels are cut out."""
        return isinstance(self.pattern, Structured) and not self.keep_shape

    @property
    def sizing_options(self) -> SizingOptions:
        """How to choose the widths of a shrunk model."""
        return {
            "part": self.shrink or "both",
            "multiple": self.ffn_multiple,
            "allocation": self.allocation or "uniform",
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
        """
        if not self.shrinks:
            for name, value in (
                ("--shrink", self.shrink),
                ("--ffn-multiple", self.ffn_multiple),
                ("--allocation", self.allocation),
                ("--keep-shape", self.keep_shape and not isinstance(self.pattern, Structured)),
            ):
                if value:
                    raise UsageError(
                        f"{name} with pattern {self.pattern}"
                        + (" and --keep-shape" if self.keep_shape else ""),
                        fix="leave it out; it is for structured patterns that cut heads and "
                        "channels out",
                    )
            return
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
        if self.preset != "best":
            raise UsageError(
                f"--preset {self.preset} with {self.pattern}: the paper sets columns to zero and "
                "cuts nothing out",
                fix="use --keep-shape for columns of zeros, or leave --preset out",
            )
        unused = [
            name.replace("_", " ")
            for name in self.options
            if name not in ("damping", "damping_mode", "outlier_rows")
        ]
        if unused or self.true_sequential is not None:
            raise UsageError(
                f"{self.pattern} with {', '.join(unused) or 'true sequential'}: it has no meaning "
                "where heads and channels are cut out",
                fix="leave it out, or use --keep-shape for columns of zeros",
            )

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
        """How to walk through the model: given, else the preset's."""
        chosen = methods.preset(self.method, self.preset)
        return {
            "true_sequential": chosen.true_sequential
            if self.true_sequential is None
            else self.true_sequential,
            "dense_target": chosen.dense_target if self.dense_target is None else self.dense_target,
        }

    def to_json(self) -> Json:
        """For the manifest: the text by its name, not its path."""
        how = (
            {"cut": True, **self.sizing_options, **self.fit_options}
            if self.shrinks
            else {**self.resolved_options, **self.walk_options}
        )
        return {
            "pattern": str(self.pattern),
            "method": self.method,
            **how,
            "calib": Path(self.calib).name,
            "text_field": self.text_field,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "dtype": self.dtype,
        }


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What the graph holds its weights in, and the most tokens that it is meant for.

    Attributes:
        dtype: "fp32", "fp16" or "int8"; see `exporters.onnx.export`.
        max_sequence: prompt and answer together; None for all that the model takes.
    """

    dtype: str = "fp32"
    max_sequence: int | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a TensorRT engine is built for.

    Attributes:
        dtype: of the graph that it is built from: "fp16", "fp32" or "int8-qdq".
        max_sequence: the most tokens, prompt and answer together; None for what the graph of the
            bundle is meant for.
        batch, prompt: the usual number of sequences and of prompt tokens, and the largest; see
            `exporters.tensorrt.export` for None.
        form: "matmul", "conv1x1" (see `exporters._conv1x1`), or "auto": whichever is faster.
        compatibility: one of `exporters.tensorrt.COMPATIBILITY`.
        architectures: the GPUs to build for; empty for the one of this machine (tensorrt) or all
            that the library knows (tensorrt-rtx).
    """

    dtype: str = "fp16"
    max_sequence: int | None = None
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
    """Which text to measure perplexity on: "builtin" or a path, and how much of it."""

    text: str = BUILTIN
    text_field: str = "text"
    segments: int = 12
    seqlen: int = 1024

    def to_json(self) -> Json:
        """For the manifest: the text by its name, not its path."""
        return {**asdict(self), "text": Path(self.text).name}


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """Which tasks of lm-evaluation-harness to run, zero-shot.

    Attributes:
        tasks: their names.
        folder: with task files that the library does not have; None for none.
        limit: the most examples of each task; None for all.
    """

    tasks: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None

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
        return {"tasks": list(self.tasks), "folder": folder, "limit": self.limit}


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
