"""A server as whoever runs it wants it: limits, keys, logs, metrics, and no slot lost.

The tests ask the same few servers, so they are in one long file.
"""

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families

from runtime.server import tensors
from runtime.server.access import read_keys
from runtime.server.errors import CLIENT_GONE
from runtime.server.logs import JsonLines
from runtime.server.responses import CompletionResponses
from runtime.text import Tokenizer
from tests.runtime.server.conftest import LIMITS, Running, Serve, serving
from thanos_deploy.errors import UsageError

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 20}
IGNORING: dict[str, Any] = {"extra_body": {"ignore_eos": True}}


def complete(running: Running, **more: Any) -> Completion:
    answer: Completion = running.openai().completions.create(**ASKED, **more)
    return answer


def post(running: Running, body: object, path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request was sent, and nothing read yet."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(running.address, timeout=30)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slots(serve: Serve, stream: bool) -> None:
    with serve(slots=3) as running:
        running.gate.open.clear()
        # The last free slot is not for another answer of the same request.
        asked = {**ASKED, "n": 3, "stream": stream, "ignore_eos": True}
        connection = post(running, asked)
        running.wait_until(active=2, waiting=1)
        if stream:  # until the first event nothing is sent
            running.gate.open.set()
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            running.gate.open.clear()
        connection.close()
        running.gate.open.set()
        running.wait_until(active=0, waiting=0)
        tokens = running.service.batcher.state().tokens
        assert tokens < 3 * 20
        assert running.openai().completions.create(**ASKED).choices[0].text


def gone(running: Running) -> float:
    """Requests so far whose clients did not wait for an answer."""
    with running.http() as http:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
    return sum(
        one.value
        for one in samples
        if (one.name, one.labels.get("status")) == ("thanos_requests_total", str(CLIENT_GONE))
    )


def test_nothing_is_begun_for_a_client_that_is_gone_already(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, left = Tokenizer.encode, threading.Event()

    def late(tokenizer: Tokenizer, text: str, *, framed: bool = True) -> list[int]:
        left.wait(30)
        time.sleep(0.2)  # for the server to see that it is gone
        return encode(tokenizer, text, framed=framed)

    with serve() as running:
        monkeypatch.setattr(Tokenizer, "encode", late)
        begun: list[object] = []
        monkeypatch.setattr(
            type(running.service), "answer", lambda *given, **_: begun.append(given)
        )
        before = gone(running)
        post(running, {**ASKED, "stream": True}).close()
        left.set()
        for _ in range(1000):
            if begun or gone(running) > before:
                break
            time.sleep(0.01)
        assert gone(running) == before + 1
    assert not begun


@pytest.mark.slow
def test_whoever_finds_no_room_is_told_when_to_come_back(serve: Serve) -> None:
    with (
        serve(slots=1, limits=replace(LIMITS, answers=2)) as running,
        ThreadPoolExecutor(9) as pool,
    ):
        running.gate.open.clear()
        waiting = [pool.submit(complete, running)]
        running.wait_until(active=1, waiting=0)
        waiting += [pool.submit(complete, running) for _ in range(2)]
        running.wait_until(active=1, waiting=2)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                running.openai().completions.create(**ASKED, stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.code == "overloaded"
            assert int(caught.value.response.headers["retry-after"]) >= 1
        running.gate.open.set()
        assert len({answer.result().choices[0].text for answer in waiting}) == 1
        # A client that does as it is told gets its answer.
        patient = running.openai(max_retries=5)
        answers = list(pool.map(lambda _: patient.completions.create(**ASKED), range(9)))
        assert len({answer.choices[0].text for answer in answers}) == 1


def test_answers_to_one_request_come_all_or_none(serve: Serve) -> None:
    with (
        serve(slots=1, limits=replace(LIMITS, answers=3)) as running,
        ThreadPoolExecutor(3) as pool,
    ):
        running.gate.open.clear()
        taken = []
        for waiting, copies in ((2, 3), (5, 3), (6, 1)):
            taken.append(pool.submit(complete, running, n=copies))
            running.wait_until(active=1, waiting=waiting)
        # Three requests wait, one of them for its other answers.
        with pytest.raises(openai.InternalServerError):
            running.openai().completions.create(**ASKED, n=3)
        running.wait_until(active=1, waiting=6)
        running.gate.open.set()
        assert [len(answer.result().choices) for answer in taken] == [3, 3, 1]


def test_an_answer_that_is_late_is_given_up(serve: Serve) -> None:
    with serve(slots=1, limits=replace(LIMITS, deadline_seconds=0.5)) as running:
        running.gate.open.clear()
        opener = threading.Timer(1.0, running.gate.open.set)
        opener.start()
        with pytest.raises(openai.InternalServerError) as caught:
            running.openai().completions.create(**ASKED)
        assert (caught.value.status_code, caught.value.code) == (504, "deadline")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert "retry-after" not in caught.value.response.headers
        opener.join()

        running.gate.seconds = 0.1
        events = running.openai().completions.create(**ASKED, **IGNORING, stream=True)
        texts: list[str] = []
        with pytest.raises(openai.APIError) as late:
            texts.extend(event.choices[0].text for event in events)
        assert late.value.code == "deadline"
        assert texts


def test_a_text_is_no_longer_than_the_server_allows(serve: Serve) -> None:
    with serve(limits=replace(LIMITS, new_tokens=7)) as running:
        with pytest.raises(openai.BadRequestError) as caught:
            running.openai().completions.create(**{**ASKED, "max_tokens": 8})
        assert caught.value.code == "too_many_tokens"
        answer = running.openai().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}], **IGNORING
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        # OpenAI's default of 16 is above what is allowed, and nobody asked for it.
        answer2 = running.openai().completions.create(model="tiny", prompt="a", **IGNORING)
        assert answer2.usage is not None
        assert answer2.usage.completion_tokens == 7


def test_a_body_may_not_be_too_large_too_slow_or_compressed(serve: Serve) -> None:
    limits = replace(LIMITS, body_bytes=1000, deadline_seconds=1)
    with serve(limits=limits) as running, running.http() as http:
        large = http.post("/v1/completions", json={**ASKED, "prompt": "a" * 1000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        chunked = http.post(
            "/v2/models/tiny/infer",
            content=(b"x" * 100 for _ in range(11)),
            headers={"Content-Type": "application/octet-stream"},
        )
        assert chunked.status_code == 413
        assert "1000 bytes" in chunked.json()["error"]
        zipped = http.post(
            "/v1/completions",
            content=b"x",
            headers={"Content-Encoding": "gzip", "Content-Type": "application/json"},
        )
        assert zipped.status_code == 415
        with socket.create_connection(running.address, timeout=30) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            assert slow.recv(12) == b"HTTP/1.1 408"


def test_without_a_key_nobody_gets_in(serve: Serve) -> None:
    with serve(keys=("first", "second")) as running:
        for key in ("first", "second"):
            assert running.openai(api_key=key).completions.create(**ASKED).choices
        for key in ("third", "firs", "first1", "FIRST"):
            with pytest.raises(openai.AuthenticationError) as caught:
                running.openai(api_key=key).completions.create(**ASKED)
            assert caught.value.code == "invalid_api_key"
        with running.http() as http:
            for path in ("/health", "/v2/health/live", "/v2/health/ready"):
                assert http.get(path).status_code == 200
            for path in ("/metrics", "/openapi.json", "/v1/models", "/v2", "/v2/models/tiny", "/x"):
                assert http.get(path).status_code == 401
            for header in ("first", "Basic first", "Bearer", "Bearer first second", "Bearer \xe9"):
                answer = http.get(
                    "/v1/models", headers=[(b"Authorization", header.encode("latin-1"))]
                )
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"


def test_keys_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    one, two = "1" * 16, "2" * 20
    path.write_text(f"{one}\n\n  {two} \n")
    assert read_keys(path) == [one, two]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n \n",
        b"a b" * 9,
        "schlüssel".encode() * 3,
        b"\xff",
        b"fifteen letters"[:15],
        b"1" * 15,
    ],
)
def test_a_file_without_usable_keys_is_a_usage_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="key"):
        read_keys(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "nowhere")


def test_a_request_has_an_id(server: Running) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json=ASKED, headers={"X-Request-ID": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["id"] == "cmpl-mine-1"
        for bad in ("a b", "x" * 200, '"'):
            made = http.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
            assert made.isalnum()
        assert http.get("/nowhere").headers["x-request-id"]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_texts_only_where_it_may(
    serve: Serve, caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    secret = "xyzzy"
    with caplog.at_level(logging.INFO), serve(log_prompts=log_prompts) as running:
        client = running.openai()
        text = client.completions.create(**{**ASKED, "prompt": secret}).choices[0].text
        list(client.completions.create(**{**ASKED, "prompt": secret}, stream=True))
        with running.http() as http:
            http.post(
                "/v1/completions",
                json={**ASKED, "prompt": secret, secret: 1},
                headers={"X-Request-ID": "bad"},
            )
            http.get(f"/elsewhere?{secret}")
    entries = [
        json.loads(JsonLines().format(record))
        for record in caplog.records
        if record.name.startswith(("runtime", "uvicorn"))  # the clients log, too
    ]
    requests = [
        entry
        for entry in entries
        # Another server of these tests may log what it was asked a moment ago.
        if entry["message"] == "request" and entry["path"] in ("/v1/completions", "/elsewhere")
    ]
    assert [entry["status"] for entry in requests] == [200, 200, 400, 404]
    assert requests[0]["completion_tokens"] <= 20
    assert requests[0]["seconds"] > 0
    assert requests[2]["request_id"] == "bad"
    assert requests[2]["error"] == "unknown_parameter"
    assert (requests[3]["route"], requests[3]["path"]) == ("unknown", "/elsewhere")
    assert {entry["peer"] for entry in requests} == {"127.0.0.1"}
    assert (secret in json.dumps(entries)) == log_prompts
    if log_prompts:
        assert requests[0]["answers"] == requests[1]["answers"] == [text]


def test_a_log_entry_is_one_line_of_json() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "it %s", ("failed",), None)
        record.exc_info = (ValueError, error, error.__traceback__)
    line = JsonLines().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["level"], entry["message"]) == ("error", "it failed")
    assert "two\nlines" in entry["exception"]


def samples_of(running: Running) -> dict[tuple[str, str | None], float]:
    """The metrics of a server, by name and status."""
    with running.http() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_times_of_answers_count_from_the_arrival_of_the_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Tokenizer.encode

    def slow(tokenizer: Tokenizer, text: str, *, framed: bool = True) -> list[int]:
        time.sleep(0.2)
        return usual(tokenizer, text, framed=framed)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    with serve() as running:
        complete(running)
        samples = samples_of(running)
    assert samples["thanos_time_to_first_token_seconds_sum", None] > 0.2
    assert samples["thanos_answer_seconds_sum", None] > 0.2


def test_the_metrics_add_up(serve: Serve) -> None:
    with serve() as running:
        answers = [running.openai().completions.create(**ASKED, **IGNORING, n=2) for _ in range(3)]
        with pytest.raises(openai.NotFoundError):
            running.openai().completions.create(**{**ASKED, "model": "x"})
        samples = samples_of(running)
    usage = [answer.usage for answer in answers]
    assert samples["thanos_requests_total", "200"] == 3
    assert samples["thanos_requests_total", "404"] == 1
    assert samples["thanos_tokens_total", None] == sum(
        one.completion_tokens for one in usage if one
    )
    assert samples["thanos_prompt_tokens_total", None] == 3 * 2 * len("Once")
    assert samples["thanos_time_to_first_token_seconds_count", None] == 6
    assert samples["thanos_time_between_tokens_seconds_count", None] == 6 * 19
    assert samples["thanos_answer_seconds_count", None] == 6
    assert samples["thanos_active_slots", None] == samples["thanos_queue", None] == 0
    assert samples["thanos_slots", None] == 4


def test_a_common_beginning_is_read_once_and_the_answers_are_the_same(
    bundle: Path, server: Running
) -> None:
    """The second of two prompts with a common beginning is not read from its start."""
    common = "You are a helpful assistant, and this is the system prompt. "
    with serving(bundle, prefix_bytes=1 << 20) as running:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
        for end in ("One", "Another", "One", "A third"):
            texts = [
                one.openai().completions.create(prompt=common + end, **asked).choices[0].text
                for one in (running, server)
            ]
            assert texts[0] == texts[1]
        state = running.service.batcher.state()
        assert state.reused_tokens == 3 * (len(common) // 32 * 32)
        with running.http() as http:
            said = http.get("/metrics").text
        assert f"thanos_reused_prompt_tokens_total {float(state.reused_tokens)}" in said
        assert f"thanos_prompt_tokens_total {float(state.prompt_tokens)}" in said


@pytest.mark.parametrize("change", ["written", "cut", "replaced", "gone"])
def test_a_file_that_changes_under_a_server_is_noticed(
    bundle: Path, tmp_path: Path, change: str
) -> None:
    out = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    data = out / "onnx" / "model.onnx.data"
    asked: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 9, "temperature": 0}
    paths = ("/health/ready", "/v2/health/ready", "/v2/models/tiny/ready")
    with serving(out) as mapped, serving(out, weights="memory") as copied:
        before = copied.openai().completions.create(**asked).choices[0].text
        with mapped.http() as http, copied.http() as other:
            assert [http.get(path).status_code for path in paths] == [200] * 3
            content = data.read_bytes()
            match change:
                case "written":
                    data.write_bytes(content[::-1])
                case "cut":
                    data.write_bytes(content[:100])
                case "replaced":
                    (tmp_path / "new").write_bytes(content)
                    (tmp_path / "new").replace(data)
                case "gone":
                    data.unlink()
            answers = [http.get(path) for path in paths]
            assert [answer.status_code for answer in answers] == [503] * 3
            assert "model.onnx.data has changed since it was loaded" in answers[0].text
            assert http.get("/health").status_code == 200
            # What is in memory does not change, whatever the file does.
            assert [other.get(path).status_code for path in paths] == [200] * 3
        assert copied.openai().completions.create(**asked).choices[0].text == before


def test_long_answers_are_written_beside_the_event_loop(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else asks something meanwhile is answered."""
    where: list[str] = []

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        def do(*given: Any) -> Any:
            where.append(threading.current_thread().name)
            return work(*given)

        return do

    monkeypatch.setattr(tensors, "_written", noted(tensors._written))
    monkeypatch.setattr(CompletionResponses, "chunk", noted(CompletionResponses.chunk))
    monkeypatch.setattr(CompletionResponses, "document", noted(CompletionResponses.document))
    tensor = {"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "data": [1]}
    with server.http() as http:
        assert http.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code == 200
        asked = {"model": "tiny", "prompt": "a" * 100, "echo": True, "logprobs": 5, "max_tokens": 1}
        assert http.post("/v1/completions", json=asked).status_code == 200
        assert http.post("/v1/completions", json={**asked, "stream": True}).status_code == 200
    assert len(where) >= 4
    # The one token after the prompt is short.
    assert sum(name.startswith("asyncio") for name in where) == 3


def test_an_engine_that_fails_fails_its_requests_only(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as running:
        with monkeypatch.context() as patch:
            patch.setattr(running.gate, "decode", lambda ids: 1 / 0)
            with pytest.raises(openai.InternalServerError) as caught:
                running.openai().completions.create(**ASKED)
            assert (caught.value.status_code, caught.value.code) == (500, "engine_failed")
            assert "division" not in str(caught.value)
        assert running.openai().completions.create(**ASKED).choices[0].text


@pytest.mark.slow
def test_a_reader_that_stalls_holds_no_slot(serve: Serve) -> None:
    with serve() as running:
        asked = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "stream": True,
            "ignore_eos": True,
            "n": 16,
            "logprobs": True,
            "top_logprobs": 20,
        }
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(running.address)
            content = json.dumps(asked).encode()
            stalled.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\n"
                + f"Content-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            running.wait_until(active=0, waiting=0)
            assert running.service.batcher.state().tokens == 16 * (129 - len("u:a|a:"))
            assert running.openai().completions.create(**ASKED).choices[0].text
