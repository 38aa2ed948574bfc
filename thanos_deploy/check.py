"""One line of a check list: what was looked at, how it came out, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check, as a line of a table.

    Attributes:
        name: what was checked.
        outcome: PASS, FAIL, or SKIP for what could not be checked here.
        detail: the value seen, or why it was skipped.
        fix: what to do next, as an instruction; empty where nothing is wrong.
    """

    name: str
    outcome: Outcome
    detail: str
    fix: str = ""


def passed(checks: Iterable[Check]) -> bool:
    """Nothing failed."""
    return all(check.outcome != "FAIL" for check in checks)
