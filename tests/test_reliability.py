"""benchmarks.reliability: what it finds, and a short run of each part."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.reliability import kills, server
from benchmarks.reliability.__main__ import PAGE, PARTS, RESULTS, go_on
from benchmarks.reliability.attacks import Attack, guessed_keys, half_closed, malformed, overload
from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.record import COMMAND, Result, Results, table
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
        ({"good": "wrong"}, "wrong answers"),
        ({"good": "500 without Retry-After"}, "good requests that broke off, or were refused"),
        ({"good": "broken"}, "good requests that broke off, or were refused"),
        ({"attacker": "500"}, "5xx to attackers other than 503 with Retry-After"),
        ({"attacker": "503 without Retry-After"}, "5xx to attackers"),
        ({"slower": 3.1}, "p99 latency under guessed keys, times that without an attack"),
        ({"memory": 106}, "memory growth, as a fraction"),
        ({"left": 1.0}, "slots and queue places still taken at the end"),
        ({"series": 2}, "metric series that attackers added"),
        ({"log": LOG + b"level: error"}, "log lines that are not JSON"),
        ({"log": LOG.replace(b"request", KEY.encode())}, "log lines that contain the key"),
    ],
    ids=str,
)
def test_each_fault_is_found_and_nothing_else(fault: dict[str, object], found: str) -> None:
    (name,) = broken(**fault)  # type: ignore[arg-type]
    assert name.startswith(found)


def test_a_later_run_goes_on_where_an_earlier_one_ended(tmp_path: Path) -> None:
    part = Part("kills", "Nothing is lost.", one_kill)
    path = tmp_path / "results.json"
    for number in (1, 2, 3):
        before = Results.read(path)
        done = before.parts["kills"].values if before.parts else {}
        setting = Setting(lambda: tmp_path, tmp_path, 1.0, 0, done)
        results = go_on(part, setting, before, path)
        assert Results.read(path) == results
        assert results.parts["kills"].values == {"kills": number, "slowest": 3, "faults": 1}
        assert results.parts["kills"].is_enough == (number == 3)
        assert not results.parts["kills"].passed
    assert results.parts["kills"].runs == 3
    assert results.parts["kills"].faults == ("the 0th was wrong",)


def test_the_page_shows_what_was_found() -> None:
    assert table(Results.read(RESULTS), PARTS) in PAGE.read_text(encoding="utf-8")


def one_kill(setting: Setting) -> Iterator[Slice]:
    """Finds one fault in its first run."""
    number = setting.so_far("kills")
    faults = [] if number else ["the 0th was wrong"]
    yield Slice(
        [
            Figure("kills", 1, least=3),
            Figure("slowest", 3 - number, joined="most"),
            Figure("faults", len(faults), most=0),
        ],
        faults,
    )


@pytest.mark.parametrize(
    ("kills", "faults", "said"),
    [
        (3, 0, "PASSED. 2.0 minutes in 2 runs, on "),
        (2, 0, "Not finished; no failure so far. "),
        (2, 1, "FAILED. "),
        (3, 1, "FAILED. "),
    ],
)
def test_results_are_told_in_a_table(kills: int, faults: int, said: str) -> None:
    figures = (Figure("kills", kills, least=3), Figure("faults", faults, most=0))
    shown = table(Results(parts={"kills": Result(2, 120.0, figures)}), PARTS)
    assert f"\n{said}" in shown
    assert f"| faults | {faults} | 0 | {'**no**' if faults else 'yes'} |" in shown
    assert f"| kills | {kills} | at least 3 | {'yes' if kills == 3 else '**no**'} |" in shown
    assert "### server\n" in shown
    assert "Not run." in shown


def test_the_page_says_what_the_results_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    section = table(Results.read(RESULTS), PARTS)
    assert pages.rewritten(page, COMMAND, section) == page, f"run `{COMMAND}`"


def test_a_command_that_had_ended_was_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter([True, False, True, True, False, False])

    def kill(*_: object) -> kills.Killed:
        return kills.Killed("a command", 1.0, ended=next(drawn), entries=0, again=0, fault="")

    monkeypatch.setattr(kills, "GOAL", 3)
    monkeypatch.setattr(kills, "undisturbed", lambda *_: ["a command"])
    monkeypatch.setattr(kills, "kill", kill)
    found = [
        {figure.name: figure.value for figure in one.figures}
        for one in kills.run(Setting(lambda: tmp_path, tmp_path, 60.0, 0))
    ]
    assert [figures["kills"] for figures in found] == [0, 1, 0, 0, 1, 1]
    assert [figures[kills._ENDED] for figures in found] == [1, 0, 1, 1, 0, 0]


@pytest.mark.slow
def test_a_server_that_is_attacked_answers_rightly(
    exported_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only test that starts the server and the attackers; of the attacks, the quick ones."""
    monkeypatch.setattr(server, "ATTACKS", (guessed_keys, half_closed, malformed))
    monkeypatch.setattr(server, "LOADS", ())
    (found,) = server.run(Setting(lambda: exported_llama, tmp_path, 1.0, 0))
    figures = {one.name: one for one in found.figures}
    assert figures["requests of good clients"].value > 5
    assert figures["actions of attackers"].value > 10
    # A moment says nothing of memory and of times.
    failed = [name for name, one in figures.items() if not one.holds]
    assert [name for name in failed if not name.startswith(("p99", "growth"))] == []
