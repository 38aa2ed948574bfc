"""The results, as JSON."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import LATER, encode
from thanos_deploy.bundle.record import differences
from thanos_deploy.machine.environment import Environment
from thanos_deploy.measure.quality import TextQuality


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions that all rows share.

    Attributes:
        model, model_sha256: name and hash of the dense model.
        calib_tokens_sha256: hash of the tokens of the first calibration segments.
        eval_sha256: hash of the evaluation text.
        eval_segments, eval_seqlen: number of its first segments that are read, and of tokens in
            each.
    """

    model: str
    model_sha256: str
    calib_tokens_sha256: str
    eval_sha256: str
    eval_segments: int
    eval_seqlen: int


@dataclass(frozen=True, slots=True)
class Judged:
    """The quality of a model.

    Attributes:
        perplexity: perplexity on the evaluation text.
        quality: all results of the evaluation; None in rows that are older than this field.
    """

    perplexity: float
    quality: TextQuality | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Row:
    """One pruned model.

    Attributes:
        way: method, preset and further options, as text.
        pattern: the pattern that the model was pruned to.
        request: all options.
        judged: quality of the pruned model.
        seconds: wall-clock time of the whole call.
        processor_seconds: processor time of all threads; None if it is not known, such as after an
            interruption.
        seed: seed of the calibration segments; None for the first segments of the text.
    """

    way: str
    pattern: str
    request: dict[str, Any]
    judged: Judged
    seconds: float
    processor_seconds: float | None = None
    seed: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Results:
    """All results for one dense model.

    Attributes:
        conditions: conditions of all rows.
        environment: machine and software of the first row.
        dense: quality of the dense model.
        rows: the rows, in the order in which they were measured.
    """

    conditions: Conditions
    environment: Environment
    dense: Judged
    rows: tuple[Row, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the results from a file.

        Raises:
            InputError: the file holds something else.
        """
        return files.read_record(path, cls)

    def require(self, conditions: Conditions, path: Path) -> None:
        """Refuse to continue a file that was made under other conditions."""
        if changed := differences(encode(self.conditions), encode(conditions)):
            raise SystemExit(
                f"{path} was measured under other conditions ({changed}): give another --results"
            )

    def has(self, request: dict[str, Any], seed: int | None) -> bool:
        """Whether the row of a request and seed exists."""
        return any(row.request == request and row.seed == seed for row in self.rows)

    def plus(self, row: Row) -> "Results":
        """Return the results with one more row."""
        return replace(self, rows=(*self.rows, row))

    def write(self, path: Path) -> None:
        """Write the results to a file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_json(path, encode(self))
