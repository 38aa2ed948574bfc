"""The results of the campaign: JSON, which a later run continues, and the table of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.reliability.part import Figure, Part, Slice
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.machine import environment
from thanos_deploy.machine.environment import Environment

FORMAT = "thanos-deploy/reliability/1"
COMMAND = "python -m benchmarks.reliability --table"

# Most faults of a part that are kept; of many similar ones the first suffice.
MOST_FAULTS = 40


@dataclass(frozen=True, slots=True)
class Result:
    """Results of a part over all its runs.

    Attributes:
        runs: number of runs.
        seconds: time of all runs.
        figures: the figures.
        faults: descriptions of the first faults.
        environment: machine and software of the last run.
    """

    runs: int = 0
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    faults: tuple[str, ...] = ()
    environment: Environment = field(default_factory=environment.describe)

    @property
    def passed(self) -> bool:
        """Whether all figures are in their required ranges."""
        return bool(self.figures) and all(figure.holds for figure in self.figures)

    @property
    def is_enough(self) -> bool:
        """Whether all figures have reached their lower limits."""
        return bool(self.figures) and all(figure.is_enough for figure in self.figures)

    @property
    def values(self) -> dict[str, float]:
        """The values of the figures, by name."""
        return {figure.name: figure.value for figure in self.figures}

    def after(self, found: Slice, seconds: float) -> "Result":
        """Return the result with a further slice, which took some seconds."""
        figures = {figure.name: figure for figure in self.figures}
        for new in found.figures:
            before = figures.get(new.name)
            figures[new.name] = new if before is None else new.after(before.value)
        return replace(
            self,
            seconds=self.seconds + seconds,
            figures=tuple(figures.values()),
            faults=(*self.faults, *found.faults)[:MOST_FAULTS],
            environment=environment.describe(),
        )


@dataclass(frozen=True, slots=True)
class Results:
    """Results of all parts, by the name of the part."""

    format: str = FORMAT
    parts: Mapping[str, Result] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the results from a file; empty if the file does not exist.

        Raises:
            InputError: the file holds something else.
        """
        return files.read_record(path, cls) if path.exists() else cls()

    def plus(self, name: str, result: Result) -> "Results":
        """Return the results with a new or changed result of a part."""
        return replace(self, parts={**self.parts, name: result})

    def write(self, path: Path) -> None:
        """Write the results to a file atomically."""
        files.replace_json(path, encode(self))


def table(results: Results, parts: Sequence[Part]) -> str:
    """Return the results in Markdown, with a verdict for each part."""
    lines = []
    for part in parts:
        lines += [f"### {part.name}", "", part.promise, ""]
        result = results.parts.get(part.name)
        if result is None or not result.figures:
            lines += ["Not run.", ""]
            continue
        runs = "one run" if result.runs == 1 else f"{result.runs} runs"
        lines += [
            f"{_verdict(result)}. {result.seconds / 60:.1f} minutes in {runs}, on "
            f"{result.environment.processor}.",
            "",
            "| figure | value | required | |",
            "|---|---|---|---|",
            *(
                f"| {one.name} | {one.value:.6g} | {one.wanted} | "
                f"{'' if not one.wanted else 'yes' if one.holds else '**no**'} |"
                for one in result.figures
            ),
            "",
        ]
    return "\n".join(lines)


def _verdict(result: Result) -> str:
    if result.passed:
        return "PASSED"
    if all(figure.holds or not figure.is_enough for figure in result.figures):
        return "Not finished; no failure so far"
    return "FAILED"
