"""Processor time of tests: `pytest -p tests.costs` ends with the costliest tests and files.

The time of a test includes its fixtures and all descendant processes, also those that still run.
Unlike wall-clock time it is meaningful on a loaded machine too. The time of a shared fixture is
counted for the test that asks for it first.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

_SHOWN = 20
_COST = "processor seconds"
_TICK = os.sysconf("SC_CLK_TCK")

# Processor seconds spent until the last report, or until the tests had been imported.
_BEFORE = pytest.StashKey[float]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start counting after the imports, which belong to no test."""
    session.stash[_BEFORE] = processor_seconds()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a report the processor time since the last one; xdist passes it to the summary."""
    report = yield
    now = processor_seconds()
    report.user_properties.append((_COST, now - item.session.stash[_BEFORE]))
    item.session.stash[_BEFORE] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the totals, and the costliest files and tests."""
    tests: Counter[str] = Counter()
    clock: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            # The report of a phase of a test has the properties of the earlier phases too.
            spent = [
                value for name, value in getattr(report, "user_properties", ()) if name == _COST
            ]
            if spent:
                tests[report.nodeid] += spent[-1]
                clock[report.nodeid] += report.duration
    files: Counter[str] = Counter()
    for test, seconds in tests.items():
        files[_file(test)] += seconds
    terminalreporter.section("processor seconds, and seconds on the clock")
    total = sum(tests.values())
    terminalreporter.write_line(f"{total:8.1f} {sum(clock.values()):8.1f}  {len(tests)} tests")
    for costs in (files, tests):
        terminalreporter.write_line("")
        for name, seconds in costs.most_common(_SHOWN):
            passed = sum(clock[test] for test in tests if test == name or _file(test) == name)
            terminalreporter.write_line(f"{seconds:8.1f} {passed:8.1f}  {name}")


def _file(test: str) -> str:
    return test.partition("::")[0]


def processor_seconds() -> float:
    """Return the processor time of this process and its descendants, ended children included."""
    return _ticks(Path("/proc/self")) / _TICK


def _ticks(process: Path) -> int:
    """Return the processor time of a process and its descendants, in clock ticks.

    Only the process tree is read: a scan of all processes takes as long as a small test.
    """
    fields = _read(process / "stat").rpartition(")")[2].split()
    children: list[str] = []
    with suppress(OSError):  # the process, or a thread of it, has just ended
        for thread in (process / "task").iterdir():
            children += _read(thread / "children").split()
    return sum(map(int, fields[11:15])) + sum(_ticks(Path("/proc", one)) for one in children)


def _read(path: Path) -> str:
    """Return a file of a process or thread in /proc; empty if that has just ended."""
    with suppress(OSError):
        return path.read_text()
    return ""
