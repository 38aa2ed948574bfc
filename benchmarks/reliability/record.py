"""The results of the campaign: JSON, which a later run goes on with, and the table of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.reliability.part import Figure, Part
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.machine import environment

FORMAT = "thanos-deploy/reliability/1"
BEGIN, END = "<!-- results: python -m benchmarks.reliability -->", "<!-- end of the results -->"


@dataclass(frozen=True, slots=True)
class Result:
    """What a part found.

    Attributes:
        minutes: that it was given.
        seed: likewise.
        seconds: that it took.
        figures: what it found.
        environment: what it ran on.
    """

    minutes: float
    seed: int
    seconds: float
    figures: tuple[Figure, ...]
    environment: Json = field(default_factory=lambda: encode(environment.describe()))

    @property
    def passed(self) -> bool:
        """All figures are what they are to be."""
        return all(figure.holds for figure in self.figures)

    def answers(self, minutes: float, seed: int) -> bool:
        """It is of such a run, so that the part need not run again."""
        return (self.minutes, self.seed) == (minutes, seed)


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
        partial = path.with_suffix(".partial")
        files.write_json(partial, encode(self))
        partial.replace(path)


def table(results: Results, parts: Sequence[Part]) -> str:
    """The results in Markdown; what did not run says so."""
    lines = []
    for part in parts:
        lines += [f"### {part.name}", "", part.promise, ""]
        result = results.parts.get(part.name)
        if result is None:
            lines += ["Not run.", ""]
            continue
        lines += [
            f"{'PASSED' if result.passed else 'FAILED'} in {result.seconds:.0f} s "
            f"(`--minutes {result.minutes:g} --seed {result.seed}`), on "
            f"{result.environment['cpu']}.",
            "",
            "| figure | value | to be | |",
            "|---|---|---|---|",
            *(
                f"| {one.name} | {one.value:.6g} | {one.wanted} | "
                f"{'' if not one.wanted else 'yes' if one.holds else '**no**'} |"
                for one in result.figures
            ),
            "",
        ]
    return "\n".join(lines).rstrip()


def publish(page: Path, shown: str) -> None:
    """Put the table into a page, between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}", encoding="utf-8")
