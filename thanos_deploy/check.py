"""One line of a check list: what was checked, the outcome, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check, as a line of a table.

    Attributes:
        name: what was checked.
        outcome: PASS, FAIL, or SKIP if the check could not be made here.
        detail: the value seen, or why the check was skipped.
        fix: what to do next, as an instruction; empty if nothing is wrong.
    """

    name: str
    outcome: Outcome
    detail: str
    fix: str = ""


def passed(checks: Iterable[Check]) -> bool:
    """Return whether no check failed."""
    return all(check.outcome != "FAIL" for check in checks)
