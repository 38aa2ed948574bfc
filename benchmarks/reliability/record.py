"""The results of the campaign: JSON, which a later run goes on with, and the table of the page."""

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

# Of many faults of one kind the first say enough.
MOST_FAULTS = 40


@dataclass(frozen=True, slots=True)
class Result:
    """What a part has found in all its runs.

    Attributes:
        runs: how often it was called.
        seconds: that it took.
        figures: what it found.
        faults: what was wrong, in words; the first ones.
        environment: what it last ran on.
    """

    runs: int = 0
    seconds: float = 0.0
    figures: tuple[Figure, ...] = ()
    faults: tuple[str, ...] = ()
    environment: Environment = field(default_factory=environment.describe)

    @property
    def passed(self) -> bool:
        """All figures are what they are to be."""
        return bool(self.figures) and all(figure.holds for figure in self.figures)

    @property
    def is_enough(self) -> bool:
        """As much was done as is to be."""
        return bool(self.figures) and all(figure.is_enough for figure in self.figures)

    @property
    def values(self) -> dict[str, float]:
        """The figures by name."""
        return {figure.name: figure.value for figure in self.figures}

    def after(self, found: Slice, seconds: float) -> "Result":
        """Together with what else was found in some more time."""
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
    """Those of all parts, by name."""

    format: str = FORMAT
    parts: Mapping[str, Result] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Those in a file; none if there is no such file.

        Raises:
            InputError: the file holds something else.
        """
        return files.read_record(path, cls) if path.exists() else cls()

    def plus(self, name: str, result: Result) -> "Results":
        """The same with another one."""
        return replace(self, parts={**self.parts, name: result})

    def write(self, path: Path) -> None:
        """Write them to a file, as a whole or not at all."""
        files.replace_json(path, encode(self))


def table(results: Results, parts: Sequence[Part]) -> str:
    """The results in Markdown; what did not run, or not enough, says so."""
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
