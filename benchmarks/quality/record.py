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
    """What all rows have in common.

    Attributes:
        model, model_sha256: name and hash of the dense model.
        calib_tokens_sha256: of the first segments to calibrate on.
        eval_sha256: of the text to judge on.
        eval_segments, eval_seqlen: its first segments that are read, and tokens of each.
    """

    model: str
    model_sha256: str
    calib_tokens_sha256: str
    eval_sha256: str
    eval_segments: int
    eval_seqlen: int


@dataclass(frozen=True, slots=True)
class Judged:
    """How good a model is.

    Attributes:
        perplexity: on the text.
        quality: that and everything else that was asked; None in rows from before it was.
    """

    perplexity: float
    quality: TextQuality | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Row:
    """One way to prune.

    Attributes:
        way: method, preset and what else was asked for.
        pattern: that was pruned to.
        request: all options.
        judged: how good the pruned model is.
        seconds: of the whole call, by the clock.
        processor_seconds: the same, of all threads; None where that is not known, such as after an
            interruption.
        seed: which segments were calibrated on; None for the first ones of the text.
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
    """All that is known of one model.

    Attributes:
        conditions: under which it was found.
        environment: where the first row was.
        dense: the model before anything is pruned.
        rows: in the order of measuring.
    """

    conditions: Conditions
    environment: Environment
    dense: Judged
    rows: tuple[Row, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Those in a file.

        Raises:
            InputError: the file holds something else.
        """
        return files.read_record(path, cls)

    def require(self, conditions: Conditions, path: Path) -> None:
        """Refuse to go on with a file of other conditions."""
        if changed := differences(encode(self.conditions), encode(conditions)):
            raise SystemExit(f"{path} is of other conditions ({changed}): give another --results")

    def has(self, request: dict[str, Any], seed: int | None) -> bool:
        """That row is there."""
        return any(row.request == request and row.seed == seed for row in self.rows)

    def plus(self, row: Row) -> "Results":
        """The same with another row."""
        return replace(self, rows=(*self.rows, row))

    def write(self, path: Path) -> None:
        """Write them to a file, as a whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_json(path, encode(self))
