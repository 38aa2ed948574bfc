"""benchmarks.reliability: what it finds, and a short run of each part."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.reliability import server
from benchmarks.reliability.__main__ import PARTS
from benchmarks.reliability.attacks import Attack, guessed_keys, half_closed, malformed, overload
from benchmarks.reliability.part import Figure, Setting
from benchmarks.reliability.record import BEGIN, END, Result, Results, publish, table
from benchmarks.reliability.server import Seen

KEY = "a" * 32
LOG = b'ready http://x\n{"time": "", "level": "info", "message": "request"}\n'


def broken(
    *,
    good: str = "right",
    attacker: str = "400",
    slower: float = 1.0,
    memory: int = 100,
    left: float = 0.0,
    series: int = 0,
    log: bytes = LOG,
) -> list[str]:
    """What is found in a run that is fine but for this."""
    quiet = Seen([0.01] * 100, Counter(right=100))
    seen: dict[Attack, Seen] = {
        guessed_keys: Seen([0.01 * slower] * 100, Counter({"right": 99, good: 1})),
        overload: Seen([5.0], Counter({"right": 1, "503": 9}), Counter({"503": 5})),
    }
    seen[guessed_keys].attacks[attacker] += 1
    figures = server.judged(quiet, seen, (100, memory), left, series, log, KEY)
    return [figure.name for figure in figures if not figure.holds]


def test_nothing_is_found_where_all_is_well() -> None:
    assert broken() == []


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ({"good": "wrong"}, "answers that are not the golden ones"),
        ({"good": "500 without Retry-After"}, "good requests that were refused otherwise"),
        ({"good": "broken"}, "good requests that were refused otherwise"),
        ({"attacker": "500"}, "5xx to attackers other than 503 with Retry-After"),
        ({"attacker": "503 without Retry-After"}, "5xx to attackers"),
        ({"slower": 3.1}, "p99 under guessed keys, times that in quiet"),
        ({"memory": 106}, "growth of memory"),
        ({"left": 1.0}, "slots and places taken in the end"),
        ({"series": 2}, "series of metrics that attackers added"),
        ({"log": LOG + b"level: error"}, "lines of the log that are no JSON"),
        ({"log": LOG.replace(b"request", KEY.encode())}, "lines of the log with the key"),
    ],
    ids=str,
)
def test_each_fault_is_found_and_nothing_else(fault: dict[str, object], found: str) -> None:
    (name,) = broken(**fault)  # type: ignore[arg-type]
    assert name.startswith(found)


def test_results_are_read_again_and_published(tmp_path: Path) -> None:
    figures = (Figure("things", 3), Figure("faults", 1, "0", False))
    results = Results().plus("server", Result(2.0, 7, 119.6, figures, {"cpu": "a CPU"}))
    path, page = tmp_path / "results.json", tmp_path / "page.md"
    assert Results.read(path) == Results()
    results.write(path)
    assert Results.read(path) == results
    assert not results.parts["server"].passed
    assert results.parts["server"].answers(2.0, 7)
    assert not results.parts["server"].answers(2.0, 8)
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    publish(page, table(results, PARTS))
    said = page.read_text()
    assert said.startswith("before\n")
    assert said.endswith("after\n")
    assert "| faults | 1 | 0 | **no** |" in said
    assert "FAILED in 120 s (`--minutes 2 --seed 7`), on a CPU." in said


@pytest.mark.slow
def test_a_server_that_is_attacked_answers_rightly(
    exported_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only test that starts the server and the attackers; of the attacks, the quick ones."""
    monkeypatch.setattr(server, "ATTACKS", (guessed_keys, half_closed, malformed))
    monkeypatch.setattr(server, "LOADS", ())
    figures = {one.name: one for one in server.run(Setting(exported_llama, tmp_path, 1.0, 0))}
    assert figures["requests of good clients"].value > 5
    assert figures["actions of attackers"].value > 10
    # A moment says nothing of memory and of times.
    found = [name for name, one in figures.items() if not one.holds]
    assert [name for name in found if not name.startswith(("p99", "growth"))] == []
