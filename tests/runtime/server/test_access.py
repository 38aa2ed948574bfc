"""Who may ask, under which name, with which body, from which page."""

import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.server.access import Keys, is_loopback, read_keys
from runtime.server.logs import REQUEST_ID
from tests.runtime.server.conftest import Running, Serve

ASKED = {"model": "tiny", "prompt": "a", "max_tokens": 1}


def line_of(answer: httpx2.Response, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """What was logged of a request; another server of these tests may still log its last ones."""
    lines: list[dict[str, Any]] = [getattr(record, "fields", {}) for record in caplog.records]
    (line,) = (line for line in lines if line.get("request_id") == answer.headers[REQUEST_ID])
    return line


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:8000", 200),
        ("127.9.9.9", 200),
        ("[::1]", 200),
        ("[::1]:8000", 200),
        ("models.example", 200),
        ("Models.Example:443", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:8000", 421),
        ("models.example.evil", 421),
        ("192.168.0.1", 421),
        ("[::2]:8000", 421),
        ("0.0.0.0:8000", 421),
        ("localhost:", 200),
        ("2130706433", 421),
        ("localhost:80:80", 421),
        ("user@localhost", 421),
    ],
)
def test_on_a_loopback_address_only_known_names_are_answered(
    serve: Serve, host: str, status: int
) -> None:
    with serve(hosts=("models.example",)) as running, running.http() as http:
        answer = http.post("/v1/completions", json=ASKED, headers={"Host": host})
        assert answer.status_code == status, answer.text


def test_elsewhere_every_name_is_answered(server: Running) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json=ASKED, headers={"Host": "models.example"})
        assert answer.status_code == 200


@given(st.text(max_size=30))
def test_no_name_is_taken_for_a_number_of_this_machine(name: str) -> None:
    if is_loopback(name):
        assert name.lower().rstrip(".") == "localhost" or set(name) <= set("0123456789.:abcdef%")


def test_pages_of_allowed_origins_may_ask_and_others_may_not(serve: Serve) -> None:
    origin = "https://app.example"
    with serve(origins=(origin,), keys=("first",)) as running, running.http() as http:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        # A browser asks first, and has no key to ask with.
        allowed = http.options("/v1/completions", headers={"Origin": origin, **asked})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        refused = http.options("/v1/completions", headers={"Origin": "https://evil", **asked})
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        answer = http.post(
            "/v1/completions",
            json=ASKED,
            headers={"Origin": origin, "Authorization": "Bearer first"},
        )
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("path", ["/v1/completions", "/v2/models/tiny/infer"])
@pytest.mark.parametrize("sent", [{"Origin": "https://evil"}, {"Sec-Fetch-Site": "cross-site"}])
def test_a_page_cannot_send_a_body_of_no_kind(
    server: Running, path: str, sent: dict[str, str]
) -> None:
    with server.http(headers=sent) as http:
        assert http.post(path, content=b"{}").status_code == 415


def test_without_origins_no_page_is_told_that_it_may_ask(server: Running) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json=ASKED, headers={"Origin": "https://app.example"})
        assert "access-control-allow-origin" not in answer.headers
        assert http.options("/v1/completions").status_code == 405


def test_a_key_is_logged_by_its_number(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO),
        serve(keys=("key-one", "key-two")) as running,
        running.http() as http,
    ):
        answers = [
            http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            for key in ("key-two", "key-three")
        ]
    lines = [line_of(answer, caplog) for answer in answers]
    assert [line.get("key") for line in lines] == [2, None]
    assert "key-" not in str(lines)


def test_keys_are_replaced_while_requests_come() -> None:
    keys = Keys(["a", "b"])
    assert (keys.number("b"), keys.number("c"), keys.number("")) == (2, None, None)
    keys.replace(["c"])
    assert (keys.number("b"), keys.number("c")) == (None, 1)


def test_a_file_of_keys_that_others_can_read_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text("k" * 32)
    read_keys(path)
    assert not caplog.records
    path.chmod(0o640)
    read_keys(path)
    assert f"{path}: other users of this machine can read the keys" in caplog.text


@pytest.mark.parametrize(
    "path",
    [
        *("/health", "/health/ready", "/version", "/metrics", "/openapi.json", "/v1/models"),
        *("/v1/models/tiny", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny"),
    ],
)
def test_whatever_can_be_got_can_be_asked_for_without_its_body(
    server: Running, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), server.http() as http:
        got, head = http.get(path), http.head(path)
        assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
        assert got.headers["content-type"] == head.headers["content-type"]
        assert [http.head(other).status_code for other in ("/x", "/v1/completions")] == [404, 405]
    lines = [line_of(answer, caplog) for answer in (got, head)]
    assert lines[0]["route"] == lines[1]["route"]
    assert [line["method"] for line in lines] == ["GET", "HEAD"]
