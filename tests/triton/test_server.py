"""What clients of a real Triton see of an exported repository."""

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from runtime.engine import open_engine
from runtime.sampling import Sampling
from runtime.text import open_tokenizer, stream
from tests.triton.conftest import Server, needs_triton

pytestmark = needs_triton

TYPES = {str: "BYTES", int: "INT64", float: "FP64"}
Expected = Callable[..., str]


@pytest.fixture(scope="module")
def expected(two_four_bundle: Path) -> Expected:
    """What the runtime answers by itself."""
    engine, tokenizer = open_engine(two_four_bundle), open_tokenizer(two_four_bundle)

    def answer(prompt: str, new_tokens: int, *, stop: tuple[str, ...] = (), **options: Any) -> str:
        sampling = Sampling(**options)
        return "".join(
            stream(engine, tokenizer, prompt, new_tokens=new_tokens, stop=stop, sampling=sampling)
        )

    return answer


def inputs(library: Any, **values: Any) -> list[Any]:
    """The inputs of a request: a value each, or a list of them."""
    made = []
    for name, value in values.items():
        row = value if isinstance(value, (list, tuple)) else [value]
        kind = TYPES.get(type(row[0]), "BYTES")
        array = np.array(row, dtype=object if kind == "BYTES" else None)
        tensor = library.InferInput(name, array.shape, kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def streamed(
    server: Server,
    *,
    timeout: int | None = None,
    after_first: Callable[[], None] = lambda: None,
    **values: Any,
) -> tuple[list[str], str]:
    """The pieces and the finish reason of one text, over gRPC."""
    news: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(callback=lambda result, error: news.put((result, error)))
        client.async_stream_infer(
            "text",
            inputs(tritonclient.grpc, **values),
            timeout=timeout,
            enable_empty_final_response=True,
        )
        pieces: list[str] = []
        reason = ""
        while True:
            result, error = news.get(timeout=60)
            if error is not None:
                raise error
            if len(pieces) == 1:
                after_first()
            if result.get_response().outputs:
                pieces.append(result.as_numpy("text")[0].decode())
                reason = result.as_numpy("finish_reason")[0].decode()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return pieces, reason


def test_a_text_is_streamed_over_grpc_in_the_words_of_the_runtime(
    server: Server, expected: Expected
) -> None:
    pieces, reason = streamed(server, prompt="Hello", new_tokens=40)
    assert "".join(pieces) == expected("Hello", 40)
    assert len(pieces) > 5
    assert reason == "length"
    assert pieces[-1] == ""


def test_a_text_is_streamed_over_http_by_the_generate_extension(
    server: Server, expected: Expected
) -> None:
    request = urllib.request.Request(
        f"http://{server.http}/v2/models/text/generate_stream",
        json.dumps({"prompt": "Hello", "new_tokens": 40}).encode(),
    )
    with urllib.request.urlopen(request) as response:
        events = [json.loads(line[5:]) for line in response if line.startswith(b"data:")]
    assert "".join(event["text"] for event in events) == expected("Hello", 40)
    assert [event["finish_reason"] for event in events[:-1]] == [""] * (len(events) - 1)
    assert events[-1]["finish_reason"] == "length"


def test_options_mean_what_they_mean_to_the_runtime(server: Server, expected: Expected) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 3}
    pieces, _ = streamed(server, prompt="Once", new_tokens=30, **options)
    assert "".join(pieces) == expected("Once", 30, **options)
    assert "".join(pieces) != expected("Once", 30)


def test_a_stop_string_ends_the_text(server: Server, expected: Expected) -> None:
    whole = expected("Hello", 40)
    stop = whole[10:12]
    pieces, reason = streamed(server, prompt="Hello", new_tokens=40, stop=["\x00\x00", stop])
    assert "".join(pieces) == whole[: whole.find(stop)]
    assert reason == "stop"


def test_texts_that_are_made_together_are_those_made_alone(
    server: Server, expected: Expected
) -> None:
    prompts = [f"{number} times {'x' * number}" for number in range(20)]  # more than slots
    with ThreadPoolExecutor(len(prompts)) as pool:
        ask = partial(streamed, server, new_tokens=12, temperature=1.0)
        answers = list(pool.map(lambda prompt: ask(prompt=prompt, seed=len(prompt)), prompts))
    for prompt, (pieces, _) in zip(prompts, answers, strict=True):
        assert "".join(pieces) == expected(prompt, 12, temperature=1.0, seed=len(prompt))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"prompt": ""}, "prompt or stop string is empty"),
        ({"prompt": b"\xff\xfe"}, "invalid UTF-8 at byte 0"),
        ({"stop": ["a", ""]}, "prompt or stop string is empty"),
        ({"prompt": "x" * 500}, "a prompt of 500 tokens"),
        ({"new_tokens": 0}, "new_tokens 0"),
        ({"new_tokens": -(2**63)}, "new_tokens -9223372036854775808"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, r"top_p 0\.0"),
        ({"seed": -1}, "seed -1"),
        ({"prompt": ["two", "texts"]}, r"\[1\]"),
        ({"temperature": 1}, "data-?type|INT64"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_alone(
    server: Server, expected: Expected, values: dict[str, Any], complaint: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(streamed, server, prompt="Hello", new_tokens=40)
        with pytest.raises(InferenceServerException, match=complaint):
            streamed(server, **{"prompt": "a", "new_tokens": 2, **values})
        assert "".join(other.result()[0]) == expected("Hello", 40)


def test_a_client_that_goes_away_leaves_its_slot(server: Server, expected: Expected) -> None:
    for _ in range(20):  # more than slots
        client = tritonclient.grpc.InferenceServerClient(server.grpc)
        client.start_stream(callback=lambda result, error: None)
        client.async_stream_infer("text", inputs(tritonclient.grpc, prompt="a", new_tokens=120))
        client.stop_stream(cancel_requests=True)
        client.close()
    assert "".join(streamed(server, prompt="Hello", new_tokens=9)[0]) == expected("Hello", 9)


def test_a_request_whose_time_is_up_is_told_so(server: Server) -> None:
    with pytest.raises(InferenceServerException, match="its deadline passed"):
        streamed(server, timeout=1, prompt="Hello", new_tokens=100)


def test_the_server_reads_the_configuration_as_it_is_written(server: Server) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        seen = client.get_model_config("text").config
    written = text_format.Parse(
        (server.repository / "text" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    assert list(seen.input) == list(written.input)
    assert list(seen.output) == list(written.output)
    assert seen.parameters == written.parameters
    assert seen.model_transaction_policy.decoupled


@pytest.fixture
def http(server: Server) -> Iterator[Any]:
    """A client of the server, which is left with the model text."""
    with tritonclient.http.InferenceServerClient(server.http, network_timeout=120) as client:
        yield client
        client.load_model("text")
        assert client.is_model_ready("text")


def test_a_model_that_is_not_decoupled_answers_plain_http(http: Any, expected: Expected) -> None:
    config = http.get_model_config("text")
    http.load_model(
        "text", config=json.dumps({**config, "model_transaction_policy": {"decoupled": False}})
    )
    result = http.infer("text", inputs(tritonclient.http, prompt="Hello", new_tokens=20))
    assert result.as_numpy("text")[0].decode() == expected("Hello", 20)
    assert result.as_numpy("finish_reason")[0].decode() == "length"
    with pytest.raises(InferenceServerException, match="prompt or stop string is empty"):
        http.infer("text", inputs(tritonclient.http, prompt="", new_tokens=20))


def test_a_model_is_unloaded_and_loaded_again(
    server: Server, http: Any, expected: Expected
) -> None:
    http.unload_model("text")
    with pytest.raises(InferenceServerException, match="text"):
        streamed(server, prompt="a", new_tokens=1)
    assert not http.is_model_ready("text")
    http.load_model("text")
    assert "".join(streamed(server, prompt="Hello", new_tokens=9)[0]) == expected("Hello", 9)


def damaged(server: Server, name: str, file: str, content: bytes | None) -> str:
    """A copy of the model text with one file replaced or taken away."""
    folder = server.repository / name
    shutil.copytree(server.repository / "text", folder)
    path = folder / "1" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return name


@pytest.mark.parametrize(
    ("name", "file", "content", "complaint"),
    [
        ("flipped", "bundle/onnx/model.onnx.data", b"\0" * 99, "model.onnx.data: has 99 bytes"),
        ("no-graph", "bundle/onnx/model.onnx", None, "model.onnx: is missing"),
        ("no-tokenizer", "bundle/model/tokenizer.json", None, "tokenizer.json: is missing"),
        ("no-manifest", "bundle/manifest.json", None, "no manifest.json"),
        ("no-code", "model.py", b"this is no Python", "invalid syntax"),
    ],
)
def test_a_broken_model_is_not_loaded_and_the_others_go_on(
    server: Server,
    http: Any,
    expected: Expected,
    name: str,
    file: str,
    content: bytes | None,
    complaint: str,
) -> None:
    broken = damaged(server, name, file, content)
    with pytest.raises(InferenceServerException, match=complaint):
        http.load_model(broken)
    assert not http.is_model_ready(broken)
    assert "".join(streamed(server, prompt="Hello", new_tokens=9)[0]) == expected("Hello", 9)


def test_a_missing_package_is_named(server: Server, http: Any) -> None:
    script = (server.repository / "text" / "1" / "model.py").read_bytes()
    hidden = b"import sys\nsys.modules['tokenizers'] = None\n" + script
    name = damaged(server, "no-tokenizers", "model.py", hidden)
    with pytest.raises(InferenceServerException, match="package tokenizers is not installed"):
        http.load_model(name)


def test_a_model_whose_backend_is_not_there_is_said_to_be_unavailable(
    server: Server, http: Any, expected: Expected
) -> None:
    """The wheel's server has no ONNX Runtime backend."""
    with pytest.raises(InferenceServerException, match="onnxruntime"):
        http.load_model("onnx")
    states = {entry["name"]: entry.get("state") for entry in http.get_model_repository_index()}
    assert states["onnx"] == "UNAVAILABLE"
    assert states["text"] == "READY"
    assert "".join(streamed(server, prompt="Hello", new_tokens=9)[0]) == expected("Hello", 9)


def test_a_text_that_is_being_made_is_finished_when_its_model_is_unloaded(
    server: Server, http: Any, expected: Expected
) -> None:
    def unload() -> None:
        http.unload_model("text")

    pieces, reason = streamed(server, after_first=unload, prompt="Hello", new_tokens=100)
    assert "".join(pieces) == expected("Hello", 100)
    assert reason == "length"
