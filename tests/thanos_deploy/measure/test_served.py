"""Perplexity through a server; the server is ours and computes what vLLM would."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from tests.conftest import VOCABULARY, Invoke, stock_model
from thanos_deploy.errors import InputError, PlatformError, UsageError
from thanos_deploy.measure.perplexity import perplexity, perplexity_of
from thanos_deploy.measure.served import Served

Answer = Callable[[Any], tuple[int, Any]]

MODEL = {"id": "demo", "root": "/mnt/models/demo", "max_model_len": 128}


@contextmanager
def answering(models: Any, completion: Answer) -> Iterator[str]:
    """The address of a server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, models)

        def do_POST(self) -> None:
            self._send(
                *completion(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )

        def _send(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def of_model(folder: Path) -> Answer:
    """What vLLM answers for a model."""
    model = stock_model(folder, dtype=torch.float32)

    def answer(asked: Any) -> tuple[int, Any]:
        assert (asked["model"], asked["max_tokens"], asked["prompt_logprobs"]) == ("demo", 1, 0)
        ids = asked["prompt"]
        with torch.inference_mode():
            found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        told = [None] + [
            {str(token): {"logprob": float(row[token]), "rank": 1}}
            for row, token in zip(found, ids[1:], strict=False)
        ]
        return 200, {"choices": [{"text": "", "prompt_logprobs": told}]}

    return answer


def test_a_server_s_perplexity_is_the_model_s(tiny_llama: Path) -> None:
    segments = torch.randint(VOCABULARY, (2, 30))
    expected = perplexity(stock_model(tiny_llama), segments, frame=3).value
    with answering({"data": [MODEL]}, of_model(tiny_llama)) as url:
        served = Served.at(url)
        found = perplexity_of(lambda ids: [served.losses(ids)], segments, frame=3)
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_the_command_asks_a_server(tiny_llama: Path, tmp_path: Path, invoke: Invoke) -> None:
    size = ("--segments", "1", "--seqlen", "40", "--json", "-q")
    _, printed, _ = invoke("eval", tiny_llama, *size)
    expected = json.loads(printed)
    here = {**MODEL, "root": str(tiny_llama)}
    with answering({"data": [here]}, of_model(tiny_llama)) as url:
        asked = ("--runtime", "vllm", "--url", url, *size)
        code, printed, said = invoke("eval", tiny_llama, *asked)
        assert code == 0, said
        assert json.loads(printed) == {**expected, "value": pytest.approx(expected["value"])}
        code, _, said = invoke("eval", tiny_llama, *asked, "--tasks", "mine")
        assert (code, "can be measured only on a text" in said) == (2, True)
        code, _, said = invoke("eval", tiny_llama, *asked, "--dense", tiny_llama)
        assert (code, "a server runs only one model" in said) == (2, True)
        (other := tmp_path / "other").mkdir()
        here["root"] = str(other)
        code, _, said = invoke("eval", tiny_llama, *asked)
        assert (code, f"runs {other}" in said) == (2, True)


@pytest.mark.parametrize(
    "asked",
    [("--runtime", "vllm"), ("--url", "http://a"), ("--url", "http://a", "--runtime", "onnx")],
)
def test_a_server_and_its_address_go_together(
    tiny_llama: Path, invoke: Invoke, asked: tuple[str, ...]
) -> None:
    code, _, said = invoke("eval", tiny_llama, *asked)
    assert (code, "--url" in said) == (2, True)


@pytest.mark.parametrize(
    ("models", "error"),
    [
        ({"data": []}, UsageError),
        ({"data": [MODEL, MODEL]}, UsageError),
        ({"data": [{}]}, InputError),
        ([], InputError),
    ],
)
def test_what_is_no_server_of_one_model_is_refused(models: Any, error: type[Exception]) -> None:
    with answering(models, lambda _: (200, {})) as url, pytest.raises(error, match=url):
        Served.at(url)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://a/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        Served.at(url)


def test_nobody_answers() -> None:
    with answering({"data": [MODEL]}, lambda _: (200, {})) as url:
        served = Served.at(url)
    with pytest.raises(PlatformError, match="no answer"):
        served.losses(torch.arange(4))


@pytest.mark.parametrize(
    ("tokens", "answer", "error", "message"),
    [
        (128, (200, {}), UsageError, "a segment has 128"),
        (4, (400, {"message": "out of vocabulary"}), InputError, "400: .*out of vocabulary"),
        (4, (200, {"choices": [{"text": ""}]}), InputError, "has no log-probabilities"),
    ],
)
def test_what_a_server_does_not_answer_is_said(
    tokens: int, answer: tuple[int, Any], error: type[Exception], message: str
) -> None:
    with (
        answering({"data": [MODEL]}, lambda _: answer) as url,
        pytest.raises(error, match=message),
    ):
        Served.at(url).losses(torch.arange(tokens))
