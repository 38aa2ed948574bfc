"""What no client should do: no 5xx but 503 and 504, no slot lost, and the next is served."""

import json
import random
import socket
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.runtime.server.conftest import LIMITS, Running, Serve

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 3}
POSTS = ["/v1/completions", "/v1/chat/completions", "/v2/models/tiny/infer"]


def allowed(status: int) -> bool:
    return status < 500 or status in (503, 504)


def answers_still(running: Running) -> bool:
    running.wait_until(active=0, waiting=0)
    with running.http() as http:
        return http.post("/v1/completions", json=ASKED).status_code == 200


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b'"a"', b"{}", b"\x00", b"\xff\xfe{}", b'{"model": "\xff"}',
        b'{"model": "\\ud800", "prompt": "\\ud800", "messages": [], "\\udfff": 1}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udfff"}]}',
        b"[" * 60000, b'{"a":' * 10000, b'{"model": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "seed": -1e999}',
        b'{"model": "tiny", "prompt": [NaN]}',
        b'{"model": "tiny", "prompt": [[[[1]]]]}',
        b'{"model": "tiny", "prompt": "a", "prompt": 5}',
        b'{"inputs": [{"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [NaN]}]}',
    ],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_refused(server: Running, path: str, content: bytes) -> None:
    with server.http(headers={"Content-Type": "application/json"}) as http:
        answer = http.post(path, content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize("media_type", ["text/plain", "multipart/form-data", "application/x", ""])
def test_a_body_of_another_kind_is_refused(server: Running, media_type: str) -> None:
    with server.http(headers={"Content-Type": media_type}) as http:
        for path in POSTS if media_type else POSTS[:2]:  # Triton's client names no kind
            answer = http.post(path, content=json.dumps(ASKED))
            assert answer.status_code == 415
            assert "send Content-Type: application/json" in answer.text


DEEP: dict[str, Any] = {}
for _ in range(600):
    DEEP = {"a": DEEP}
TOOL = {"type": "function", "function": {"name": "f", "parameters": DEEP}}
CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(DEEP)}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"chat_template_kwargs": DEEP},
        {"chat_template_kwargs": {"mood": [[DEEP]]}},
        {"response_format": SCHEMA},
        {"guided_json": DEEP},
        {"structured_outputs": {"json": DEEP}},
        {"messages": [{"role": "assistant", "tool_calls": [CALLED]}]},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_what_may_have_any_form_may_not_be_nested_without_end(
    server: Running, fields: dict[str, Any]
) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={**asked, **fields})
    assert (answer.status_code, "more than 64 levels deep" in answer.text) == (400, True)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 80), max_value=1 << 80)
    | st.floats()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs", "ignore_eos", "user",
    "repetition_penalty", "logit_bias", "inputs", "outputs", "parameters", "id", "echo",
]  # fmt: skip


@pytest.mark.slow
@given(
    path=st.sampled_from(POSTS),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
)
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_fields_of_any_kind_are_taken_or_refused(
    server: Running, path: str, changes: dict[str, Any]
) -> None:
    sound: dict[str, dict[str, Any]] = {
        "/v1/completions": ASKED,
        "/v1/chat/completions": {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 3,
        },
        "/v2/models/tiny/infer": {
            "inputs": [{"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}]
        },
    }
    content = json.dumps({**sound[path], **changes})
    with server.http(headers={"Content-Type": "application/json"}) as http:
        answer = http.post(path, content=content)
    assert answer.status_code in (200, 400, 404, 413), (changes, answer.text)


@pytest.mark.slow
def test_clients_that_break_off_anywhere_leave_nothing_behind(serve: Serve) -> None:
    draw = random.Random(0)
    with serve(slots=2) as running:
        for _ in range(150):
            body = {**ASKED, "max_tokens": 40, "n": 2, "stream": draw.random() < 0.5}
            content = json.dumps(body).encode()
            whole = (
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            sent = whole[: draw.choice([len(whole), draw.randrange(len(whole))])]
            with socket.create_connection(running.address, timeout=30) as connection:
                connection.sendall(sent)
                if len(sent) == len(whole) and draw.random() < 0.5:
                    connection.recv(draw.randrange(1, 500))
                if draw.random() < 0.5:  # with a reset instead of a farewell
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
        assert answers_still(running)


def test_noise_instead_of_http_is_harmless(server: Running) -> None:
    draw = random.Random(0)
    for _ in range(60):
        noise = draw.choice(
            [
                draw.randbytes(draw.randrange(1, 3000)),
                b"GET / HTTP/1.1\r\n" + draw.randbytes(50) + b"\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
                + b"9" * 30
                + b"\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz",
                b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
                b"GET /v1/models HTTP/1.1\r\nX-Request-ID: " + b"x" * 500 + b"\r\n\r\n",
            ]
        )
        with socket.create_connection(server.address, timeout=30) as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(100)
            except ConnectionResetError:
                continue
            assert not answer or allowed(int(answer.split()[1]))
    assert answers_still(server)


def test_ten_times_what_fits_is_answered_or_sent_away(serve: Serve) -> None:
    with serve(slots=2, limits=replace(LIMITS, answers=2)) as running:
        alone = running.openai().completions.create(**ASKED, temperature=0).choices[0].text

        def ask(number: int) -> int:
            with running.http() as http:
                answer = http.post("/v1/completions", json={**ASKED, "temperature": 0})
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == alone
            else:
                assert int(answer.headers["retry-after"]) >= 1
            return answer.status_code

        with ThreadPoolExecutor(40) as pool:
            running.gate.open.clear()
            asked = [pool.submit(ask, number) for number in range(40)]
            # Only 2 + 2 are let in while nothing moves.
            assert [one.result() for one in islice(as_completed(asked), 36)] == [503] * 36
            running.gate.open.set()
            assert Counter(one.result() for one in asked) == {200: 4, 503: 36}
        assert answers_still(running)


@pytest.mark.slow
def test_the_server_is_as_its_own_description_says(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks: list[CheckFunction] = [
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    seen: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]  # raises where it is not

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def probe(case: schemathesis.Case[Any]) -> None:
            response = case.call()
            seen[response.status_code] += 1
            assert allowed(response.status_code), response.text
            case.validate_response(response, checks=checks)

        probe()
    assert seen[200]
    assert seen[400] + seen[404]
    assert answers_still(server)
