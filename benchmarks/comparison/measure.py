"""Compute the perplexity of every subject, and time all subjects in turns in one process."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks import runtimes
from benchmarks.comparison.record import Row, Times
from benchmarks.comparison.subjects import Subject, hashes
from benchmarks.runtimes import Turn
from thanos_deploy.bundle import files
from thanos_deploy.machine import stillness
from thanos_deploy.machine.stillness import Stillness
from thanos_deploy.measure import statistics
from thanos_deploy.measure.perplexity import losses_of, perplexity_of
from thanos_deploy.progress import Announce


@dataclass(frozen=True, slots=True)
class Timing:
    """How subjects are timed.

    Attributes:
        prompt: token IDs that each subject reads.
        new_tokens: number of tokens that each subject generates after the prompt.
        rounds: number of rounds that count.
        threads: number of threads that compute.
        pause: seconds to wait before each turn.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    rounds: int
    threads: int
    pause: float = runtimes.PAUSE


def perplexities(
    subjects: Sequence[Subject],
    segments: Tensor,
    *,
    frame: int,
    threads: int,
    kept: Path,
    announce: Announce,
) -> list[float]:
    """Return the perplexity of each subject, computed by its runtime or by an earlier call.

    Args:
        subjects: the subjects to evaluate.
        segments: token IDs, int64[count, length].
        frame: number of tokens at the beginning of each segment that are its frame.
        threads: number of threads, where a runtime accepts it; the others use all cores.
        kept: folder of the perplexities computed so far, which are not computed again.
        announce: gets the progress, segment by segment.
    """
    kept.mkdir(parents=True, exist_ok=True)
    found = []
    for subject in subjects:
        key = files.sha256_of({"files": list(hashes(subject)), "ids": segments.tolist()})
        path = kept / f"{subject.runtime}-{key[:16]}.json"
        if not path.exists():
            name = f"{subject.model} {subject.bits} on {subject.runtime}"
            reader = runtimes.reader(subject.judged, threads)
            value = perplexity_of(
                losses_of(reader), segments, frame=frame, on_progress=announce(f"Judge {name}")
            ).value
            files.replace_json(path, {"perplexity": value})
        found.append(float(json.loads(path.read_bytes())["perplexity"]))
    return found


def rows(
    subjects: Sequence[Subject], judged: Sequence[float], timing: Timing, announce: Announce
) -> tuple[list[Row], list[str], Stillness]:
    """Time all subjects in turns; ratios are relative to the first one.

    Returns:
        The rows, the reasons why their times do not count, and how undisturbed the machine was.
    """
    most = len(timing.prompt) + timing.new_tokens
    begins = {one.timed: runtimes.opened(one.timed, timing.threads, most) for one in subjects}
    turns: list[dict[str, Turn]] = []
    progress = announce(f"Time {len(subjects)} subjects in turns")
    progress(0, timing.rounds)
    readings = []
    for taken in runtimes.rounds(
        begins, timing.prompt, timing.new_tokens, timing.rounds, pause=timing.pause
    ):
        turns.append(taken)
        readings.append(stillness.read(time.process_time()))
        progress(len(turns), timing.rounds)
    still = stillness.judge(readings)
    found = [
        one.row(
            perplexity,
            times(*_samples(turns, one, subjects[0], "prefill")),
            times(*_samples(turns, one, subjects[0], "decode")),
        )
        for one, perplexity in zip(subjects, judged, strict=True)
    ]
    return found, [*still.reasons, *drifts(found[0])], still


def _samples(
    turns: Sequence[dict[str, Turn]], subject: Subject, baseline: Subject, what: str
) -> tuple[list[float], list[float] | None]:
    """Return the samples of a subject, and of the baseline unless it is the baseline."""
    own, its = ([getattr(one[who.timed], what) for one in turns] for who in (subject, baseline))
    return own, None if subject is baseline else its


def times(samples: Sequence[float], baseline: Sequence[float] | None) -> Times:
    """Summarise samples, one per round, against the baseline's; None if they are the baseline's."""
    rounds = len(samples)
    return Times(
        statistics.summarise(samples).median,
        None if baseline is None else statistics.ratio(samples, baseline, rounds=rounds),
        statistics.drift(samples, rounds=rounds),
        tuple(samples),
    )


def drifts(baseline: Row) -> list[str]:
    """Describe the times of the baseline that drifted during the run."""
    return [
        f"{what}: {baseline.name} drifted by {moved.change:+.1%} from the first third of the "
        f"rounds to the last (limit {statistics.MOST_DRIFT:.0%})"
        for what, moved in (
            ("prefill", baseline.prefill.drift),
            ("decode", baseline.decode.drift),
        )
        if moved is not None and moved.is_clear
    ]
