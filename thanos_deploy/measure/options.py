"""A user's options for measurements: quality on a text, tasks, and times."""

import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from thanos_deploy.bundle.codec import LATER
from thanos_deploy.bundle.files import sha256
from thanos_deploy.calibration import mixture
from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.errors import UsageError
from thanos_deploy.measure.latency import Decode, Generate, OpenLoop, Prefill, Scenario

_RUN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """The options of a quality measurement on a text.

    Attributes:
        text: "builtin", a path, or the name of a data set; see `stages.texts.open_texts`.
        text_field: the field of a row that has its text, in files with rows.
        segments: number of segments.
        seqlen: tokens in each segment.
        device: where the model runs; see `devices.choose`.
        questions: the most multiple-choice questions; see `measure.choices`.
    """

    text: str = BUILTIN
    text_field: str = "text"
    segments: int = 12
    seqlen: int = 1024
    device: str = field(default="auto", metadata=LATER)
    questions: int = field(default=100, metadata=LATER)

    @property
    def recorded(self) -> "EvalRequest":
        """The options for the manifest: files are named without their folders.

        The device is recorded only if it is a GPU.
        """
        return replace(self, text=mixture.title(self.text), device=_recorded(self.device))


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """The options of a run of tasks of lm-evaluation-harness, zero-shot.

    Attributes:
        tasks: names of the tasks.
        folder: folder with task files in addition to the library's own, or None.
        limit: the most examples of each task; None for all.
        device: where the checkpoint runs; see `devices.choose`.
    """

    tasks: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    device: str = field(default="auto", metadata=LATER)

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 hashes of all files in the folder, by path relative to the folder."""
        if self.folder is None:
            return {}
        return {
            path.relative_to(self.folder).as_posix(): sha256(path)
            for path in sorted(Path(self.folder).rglob("*"))
            if path.is_file()
        }

    @property
    def recorded(self) -> "TaskRequest":
        """The options for the manifest: the name of the folder instead of its path.

        The device is recorded only if it is a GPU.
        """
        folder = None if self.folder is None else Path(self.folder).name
        return replace(self, folder=folder, device=_recorded(self.device))


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """The options of a benchmark run; the defaults are those of `prune-export`.

    Attributes:
        run: name of the run and of its file.
        kinds: kinds of scenarios, keys of `thanos_deploy.measure.latency.KINDS`.
        batches: batch sizes; open-loop always has one sequence at a time.
        prompts: prompt lengths in tokens; open-loop takes the first one.
        pasts: tokens before the first timed step of decode; None to use `prompts`.
        new_tokens: steps of decode, and tokens of an answer of generate and open-loop.
        rounds: rounds that are measured.
        warmup: the most warm-up rounds.
        requests: requests of open-loop in one round.
        rate: requests per second of open-loop; None for half of what the baseline can serve.
        driver: driver of open-loop; see `thanos_deploy.measure.traffic`.
        provider: execution provider of ONNX Runtime: "cpu" or "cuda".
        threads: threads that compute on a CPU; None for one per core.
        sample_prompt, sample_tokens: prompt of the sample text, and tokens to generate after it.
        subjects: labels of the models that are compared; set when the options are recorded, and
            empty before.
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
    subjects: tuple[str, ...] = field(default=(), metadata=LATER)

    @property
    def scenarios(self) -> list[Scenario]:
        """The scenarios of every kind, with every combination of its sizes."""
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
        """Refuse an invalid name of the run, and scenarios that are too long for the models.

        Args:
            max_tokens: the most tokens of a sequence that every model takes.

        Raises:
            UsageError: the name is invalid, or a scenario has more tokens.
        """
        if not _RUN.fullmatch(self.run) or self.run == "sample":
            raise UsageError(
                f"--run {self.run!r}: not a valid name for a run and its file",
                fix="use letters, digits, - and _, and not the name sample",
            )
        longest = max(self.scenarios, key=lambda scenario: scenario.tokens)
        if longest.tokens > max_tokens:
            raise UsageError(
                f"scenario {longest.name}: {longest.tokens} tokens are needed, and the "
                f"model takes {max_tokens}",
                fix="use a smaller --prompt or --past, or fewer --new-tokens",
            )


def _recorded(device: str) -> str:
    """The type of a GPU; for the CPU "auto", the default, which a record leaves out."""
    from thanos_deploy.machine import devices  # imports PyTorch, not needed for records

    return devices.recorded(device).get("device", "auto")
