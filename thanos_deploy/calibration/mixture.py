"""The values of `--calib` and `--eval-text`: a file, a data set of a hub, or a weighted mixture.

    a.jsonl                       a file
    wikitext, c4, ultrachat       a well-known data set
    hub:NAME[:CONFIG][:SPLIT]     any data set of the hub, or a folder of its files
    3*a.jsonl + wikitext          a mixture: three of every four segments come from a.jsonl

If a file with the name of a data set exists, the file is taken.
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
        name: name of its repository, or of a folder.
        config: name of one of its configurations; empty for the default one.
        split: name of the split.
        files: which files of the repository to read; empty for all files of the split.
    """

    name: str
    config: str = ""
    split: str = "train"
    files: str = ""

    def __str__(self) -> str:
        return ":".join(part for part in (self.name, self.config, self.split) if part)


@dataclass(frozen=True, slots=True)
class Part:
    """One text of a mixture.

    Attributes:
        name: as the user wrote it: the name of a file or of a data set, or "builtin".
        data_set: the data set, if the name is that of one; None otherwise.
        weight: its share of the segments, relative to the weights of the other texts.
    """

    name: str
    data_set: DataSet | None = None
    weight: float = 1.0

    @property
    def title(self) -> str:
        """The name for the manifest, without the folder that a file or a data set lies in."""
        if self.data_set is None or Path(self.data_set.name).is_absolute():
            return Path(self.name).name
        return self.name


# Well-known data sets by their short names: the part for calibration, and that for evaluation.
_KNOWN: Mapping[str, tuple[DataSet, DataSet]] = {
    "wikitext": (
        DataSet("Salesforce/wikitext", "wikitext-2-raw-v1"),
        DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ),
    # One training file of 1024 and one validation file of 8, the usual choice.
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
    """Parse the value of `--calib` or `--eval-text`.

    Args:
        spelling: the value; see the module for its syntax.
        held_out: whether a data set's short name means its evaluation part.

    Raises:
        UsageError: the value does not have that syntax.
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
            f"a part of the text has the name {spelling!r} and the weight {weight:g}",
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
    """Return a mixture's spelling for the manifest, in which files are without their folders."""
    parts = parse(spelling)
    if len(parts) == 1:
        return parts[0].title
    return " + ".join(f"{part.weight:g}*{part.title}" for part in parts)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """Divide `count` things in proportion to weights, in whole numbers whose sum is `count`.

    The largest remainders are rounded up (Hamilton's method).
    """
    exact = [count * weight / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda place: found[place] - exact[place])
    for place in order[: count - sum(found)]:
        found[place] += 1
    return found
