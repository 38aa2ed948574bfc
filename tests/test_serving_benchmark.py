"""What the benchmarks of servers start, count and print; nothing is measured here."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aiperf, peers
from benchmarks.peers import Load
from benchmarks.server import free_port, running

LOAD = Load(prompt=8, new_tokens=4, clients=(1, 2), per_client=2, least=3)

# Answers /health, and has a child that computes.
SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
print(child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_of_several_processes_is_counted_stopped_and_ended_as_a_whole(
    tmp_path: Path,
) -> None:
    port, log = free_port(), tmp_path / "log"
    with running([sys.executable, "-c", SERVER, port], port=port, log=log) as server:
        child = Path(f"/proc/{int(log.read_text().split()[0])}")
        before = server.cpu_seconds
        while server.cpu_seconds == before:
            time.sleep(0.01)
        server.freeze()
        while _state(child) != "T":
            time.sleep(0.01)
        stopped = server.cpu_seconds
        time.sleep(0.1)
        assert server.cpu_seconds == stopped
    while child.exists() and _state(child) != "Z":
        time.sleep(0.01)


def _state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def loop(server: str, clients: int, tokens: list[int], per_second: float) -> Any:
    """What `aiperf.closed_loop` finds."""
    seconds = {name: aiperf.summarised([0.1, 0.2]) for name in aiperf.METRICS}
    found = {"requests": len(tokens), "tokens": tokens, "tokens_per_second": per_second}
    return {"server": server, "clients": clients, "seconds": seconds, **found}


def test_the_table_has_every_loop_beside_the_baseline() -> None:
    closed = [loop("a", 1, [4] * 3, 10.0), loop("b", 1, [4] * 3, 15.0)]
    head, _, first, second = aiperf.table(closed, "a").splitlines()
    assert "times `a`" in head
    assert first.startswith("| 1 | a | 10.0 | 1.00 | 150 (")
    assert second.startswith("| 1 | b | 15.0 | 1.50 | 150 (")
    assert "times" not in aiperf.table(closed[1:], "a")


def test_work_that_was_not_done_makes_a_run_invalid() -> None:
    assert aiperf.differences([loop("a", 1, [4] * 3, 1.0), loop("a", 2, [4] * 4, 1.0)], LOAD) == []
    (found,) = aiperf.differences([loop("a", 2, [4, 4, 4, 3], 1.0)], LOAD)
    assert found == "a, 2 clients: answered 4 of 4 requests with 15 tokens instead of 16"


def test_peers_write_greedily_and_have_room_for_all_clients(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch()
    peer = peers.vllm(tmp_path / "model", tmp_path, LOAD, dtype="float32", threads=2)
    words = list(map(str, peer.command))
    assert words[words.index("--max-num-seqs") + 1] == "2"
    assert words[words.index("--max-model-len") + 1] == "24"
    assert peer.variables["OMP_NUM_THREADS"] == "2"
    assert peer.greedy == peers.thanos(tmp_path, slots=2, queue=2).greedy
    theirs = peers.transformers(tmp_path, *peers.batching(LOAD)).greedy
    assert json.loads(theirs["generation_config"])["do_sample"] is False


def test_a_missing_vllm_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make \.venv-vllm"):
        peers.vllm(tmp_path, tmp_path / "none", LOAD, dtype="float32", threads=2)
