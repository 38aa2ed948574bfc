"""What `--calib` and `--eval-text` name: files, data sets of a hub, or several with weights.

    a.jsonl                       a file
    wikitext, c4, ultrachat       a data set that everybody knows by this name
    hub:NAME[:CONFIG][:SPLIT]     any data set of the hub, or a folder of its files
    3*a.jsonl + wikitext          several: three segments of four from the first

A file of that name counts before a data set.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.errors import UsageError

_HUB = "hub:"
_AND = re.compile(r"\s+\+\s+")
_WEIGHT = re.compile(r"(\d+(?:\.\d+)?)\*(.+)")


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set of a hub.

    Attributes:
        name: of its repository, or of a folder.
        config: one of its configurations; empty for its own.
        split: the part of it.
        files: those of the repository that are read; empty for all of the part.
    """

    name: str
    config: str = ""
    split: str = "train"
    files: str = ""

    def __str__(self) -> str:
        return ":".join(part for part in (self.name, self.config, self.split) if part)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the texts that are mixed.

    Attributes:
        name: of a file, or "builtin".
        data_set: in its place, a data set.
        weight: its share, in relation to the others'.
    """

    name: str
    data_set: DataSet | None = None
    weight: float = 1.0

    @property
    def title(self) -> str:
        """For the manifest: without the folder of a file."""
        return Path(self.name).name


# By the names that everybody has for them: to calibrate on, and to judge on.
_KNOWN: Mapping[str, tuple[DataSet, DataSet]] = {
    "wikitext": (
        DataSet("Salesforce/wikitext", "wikitext-2-raw-v1"),
        DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ),
    # One file of 1024 and one of 8, as everybody takes.
    "c4": (
        DataSet("allenai/c4", files="en/c4-train.00000-of-01024.json.gz"),
        DataSet("allenai/c4", files="en/c4-validation.00000-of-00008.json.gz"),
    ),
    "ultrachat": (
        DataSet("HuggingFaceH4/ultrachat_200k", split="train_sft"),
        DataSet("HuggingFaceH4/ultrachat_200k", split="test_sft"),
    ),
}


def parse(spelling: str, *, held_out: bool = False) -> tuple[Part, ...]:
    """Read what a user names.

    Args:
        spelling: see the module.
        held_out: of a data set by its short name, the part to judge on.

    Raises:
        UsageError: it cannot be understood.
    """
    if spelling and Path(spelling).expanduser().exists():
        return (Part(spelling),)
    return tuple(_part(one.strip(), held_out) for one in _AND.split(spelling))


def _part(spelling: str, held_out: bool) -> Part:
    weight = 1.0
    if match := _WEIGHT.fullmatch(spelling):
        weight, spelling = float(match[1]), match[2].strip()
    if not spelling or weight <= 0:
        raise UsageError(
            f"the calibration text names {spelling!r} with the weight {weight:g}",
            fix="give each text a name, and a weight above 0 if any, as in 3*a.jsonl + wikitext",
        )
    if Path(spelling).expanduser().exists():
        return Part(spelling, None, weight)
    if spelling in _KNOWN:
        return Part(spelling, _KNOWN[spelling][held_out], weight)
    if not spelling.startswith(_HUB):
        return Part(spelling, None, weight)
    name, *rest = spelling.removeprefix(_HUB).split(":")
    if not name or len(rest) > 2:
        raise UsageError(
            f"{spelling!r} is not the name of a data set",
            fix="write hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT",
        )
    match rest:
        case [config, split]:
            found = DataSet(name, config, split)
        case [split]:
            found = DataSet(name, split=split)
        case _:
            found = DataSet(name)
    return Part(spelling, found, weight)


def title(spelling: str) -> str:
    """What the manifest calls it: files by their names."""
    parts = parse(spelling)
    if len(parts) == 1:
        return parts[0].title
    return " + ".join(f"{part.weight:g}*{part.title}" for part in parts)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """So many things divided by weights, as nearly as whole numbers can.

    The largest remainders are rounded up (Hamilton's method), so that the sum is `count`.
    """
    exact = [count * weight / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda place: found[place] - exact[place])
    for place in order[: count - sum(found)]:
        found[place] += 1
    return found
