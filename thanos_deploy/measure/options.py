"""What a user asks of a measurement: perplexity, tasks, times."""

import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from thanos_deploy.bundle.codec import LATER
from thanos_deploy.bundle.files import sha256
from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.errors import UsageError
from thanos_deploy.measure.latency import Decode, Generate, OpenLoop, Prefill, Scenario

_RUN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """Which text to measure quality on: "builtin" or a path, how much of it, and where.

    Attributes:
        questions: of multiple choice, at most; see `measure.choices`.
    """

    text: str = BUILTIN
    text_field: str = "text"
    segments: int = 12
    seqlen: int = 1024
    device: str = field(default="auto", metadata=LATER)
    questions: int = field(default=100, metadata=LATER)

    @property
    def recorded(self) -> "EvalRequest":
        """For the manifest: the text by its name, not its path, and the device if it is a GPU."""
        return replace(self, text=Path(self.text).name, device=_recorded(self.device))


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
    device: str = field(default="auto", metadata=LATER)

    @property
    def files(self) -> dict[str, str]:
        """Hashes of the files in the folder, by name."""
        if self.folder is None:
            return {}
        return {
            path.relative_to(self.folder).as_posix(): sha256(path)
            for path in sorted(Path(self.folder).rglob("*"))
            if path.is_file()
        }

    @property
    def recorded(self) -> "TaskRequest":
        """For the manifest: the folder by its name, not its path, and the device if it is a GPU."""
        folder = None if self.folder is None else Path(self.folder).name
        return replace(self, folder=folder, device=_recorded(self.device))


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to time, against what, how often; the defaults are those of `prune-export`.

    Attributes:
        run: name of the run, and of its file.
        kinds: of scenarios, keys of `thanos_deploy.measure.latency.KINDS`.
        batches: sequences at once; open-loop has one.
        prompts: tokens of a prompt; open-loop takes the first.
        pasts: tokens before the first timed step of decode; None for those of the prompts.
        new_tokens: steps of decode, tokens of an answer.
        rounds: that count.
        warmup: the most that do not.
        requests: of open-loop in one round.
        rate: requests a second; None for half of what the baseline can take.
        driver: of open-loop; see `thanos_deploy.measure.traffic`.
        provider: what to run on.
        threads: that compute on a CPU; None for one on each processor.
        sample_prompt, sample_tokens: of the sample text.
        subjects: labels of what is compared, as the manifest has them; empty before that is known.
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
    """A kind of GPU, or "auto" for the processor, which a record leaves out."""
    from thanos_deploy.machine import devices  # brings PyTorch, which reading records needs not

    return devices.recorded(device).get("device", "auto")
