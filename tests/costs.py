"""What tests cost: `pytest -p tests.costs` ends with the costliest tests and files.

The processor time of a test is that of its fixtures and of all processes below its own, those that
still run included; unlike the time on the clock it says something on a loaded machine too. What a
shared fixture takes is counted where it is first asked for.
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

# What had been spent when the last report was made, or when the tests had been imported.
_BEFORE = pytest.StashKey[float]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What importing the tests takes is of none of them."""
    session.stash[_BEFORE] = processor_seconds()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give every report what was spent since the one before; xdist carries it to the end."""
    report = yield
    now = processor_seconds()
    report.user_properties.append((_COST, now - item.session.stash[_BEFORE]))
    item.session.stash[_BEFORE] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print sums and the costliest."""
    tests: Counter[str] = Counter()
    clock: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            # The reports of a test's phases have all properties of those before.
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
    """Of this process and all below it, and of those of their children that have ended."""
    return _ticks(Path("/proc/self")) / _TICK


def _ticks(process: Path) -> int:
    """The same of any process; what looks at all of the machine takes as long as a small test."""
    fields = _read(process / "stat").rpartition(")")[2].split()
    children: list[str] = []
    with suppress(OSError):  # it has just ended, or a thread of it
        for thread in (process / "task").iterdir():
            children += _read(thread / "children").split()
    return sum(map(int, fields[11:15])) + sum(_ticks(Path("/proc", one)) for one in children)


def _read(path: Path) -> str:
    """A file of a process or a thread; empty where that has just ended."""
    with suppress(OSError):
        return path.read_text()
    return ""
