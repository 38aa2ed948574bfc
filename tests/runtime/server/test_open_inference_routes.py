"""The Open Inference Protocol, spoken by Triton's own client."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from runtime.engine import Engine, open_engine
from tests.runtime.server.conftest import LIMITS, Running, Serve, serving

Array = NDArray[np.int64]

IDS: Array = np.array([[0, 7, 8, 9], [1, 2, 3, 4]])
MASK: Array = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return open_engine(bundle)


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as opened:
        yield opened


def tensor(name: str, array: Array, *, binary: bool = True) -> Any:
    made = triton.InferInput(name, list(array.shape), "INT64")
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_the_server_says_what_it_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("huge")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("tiny")
    assert [entry["name"] for entry in metadata["inputs"]] == ["input_ids", "attention_mask"]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 257]}]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_logits_are_those_of_the_engine(
    client: Any, engine: Engine, binary: bool, masked: bool
) -> None:
    inputs = [tensor("input_ids", IDS, binary=binary)]
    if masked:
        inputs.append(tensor("attention_mask", MASK, binary=binary))
    for outputs in (None, [triton.InferRequestedOutput("logits", binary_data=not binary)]):
        answer = client.infer("tiny", inputs, outputs=outputs, request_id="mine")
        assert answer.get_response()["id"] == "mine"
        np.testing.assert_array_equal(
            answer.as_numpy("logits"), engine.prefill(IDS, MASK if masked else None)
        )


def test_long_prompts_are_read_in_pieces(
    client: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.padded.PIECE", 7)
    ids = np.arange(100).reshape(2, 50)
    mask = (np.arange(50) >= [[20], [0]]).astype(np.int64)
    answer = client.infer("tiny", [tensor("input_ids", ids), tensor("attention_mask", mask)])
    np.testing.assert_allclose(
        answer.as_numpy("logits"), engine.prefill(ids, mask), rtol=1e-4, atol=1e-4
    )


def test_logits_come_beside_texts_that_are_being_written(serve: Serve, engine: Engine) -> None:
    with serve() as running, ThreadPoolExecutor(1) as pool:
        running.gate.open.clear()
        text = pool.submit(
            running.openai().completions.create, model="tiny", prompt="ab", max_tokens=9
        )
        running.wait_until(active=1)
        with triton.InferenceServerClient(running.url.removeprefix("http://")) as client:
            logits = client.infer("tiny", [tensor("input_ids", IDS)]).as_numpy("logits")
        np.testing.assert_array_equal(logits, engine.prefill(IDS))
        running.gate.open.set()
        assert text.result().choices[0].finish_reason in ("stop", "length")


def test_forward_passes_wait_in_line_and_not_for_ever(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = threading.Event()
    limits = replace(LIMITS, answers=2, deadline_seconds=1)
    with (
        serve(limits=limits) as running,
        ThreadPoolExecutor(9) as pool,
        running.http(headers=JSON) as http,
    ):
        logits = running.gate.logits
        monkeypatch.setattr(
            running.gate, "logits", lambda *given: compute.wait() and logits(*given), raising=False
        )

        def ask(_: int) -> tuple[int, str]:
            answer = http.post("/v2/models/tiny/infer", content=body())
            return answer.status_code, answer.headers.get("retry-after", "")

        # One that runs, two that wait until it is too late, and six that find no room.
        assert Counter(pool.map(ask, range(9))) == {(504, ""): 3, (503, "1"): 6}
        compute.set()
        assert http.post("/v2/models/tiny/infer", content=body()).status_code == 200


def test_the_name_of_a_model_may_have_a_slash(bundle: Path) -> None:
    with serving(bundle, names=("org/tiny",)) as running, running.http(headers=JSON) as http:
        assert http.get("/v1/models/org/tiny").json()["id"] == "org/tiny"
        for path in ("org%2Ftiny", "org/tiny"):
            assert http.get(f"/v2/models/{path}").json()["name"] == "org/tiny"
            assert http.get(f"/v2/models/{path}/ready").json()["ready"]
            assert http.post(f"/v2/models/{path}/infer", content=body()).status_code == 200


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.zeros((5, 2), np.int64)}, "a batch of 5 sequences"),
        ({"input_ids": np.zeros((1, 200), np.int64)}, "200 tokens"),
        ({"input_ids": np.full((1, 2), 257)}, "the vocabulary has ids from 0 to 256"),
        ({"attention_mask": MASK}, "input_ids is missing"),
        ({"input_ids": IDS, "attention_mask": MASK[:1]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": MASK[:, ::-1]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": MASK * 2}, "attention_mask"),
        ({"input_ids": IDS[0]}, "shape"),
    ],
)
def test_tensors_that_cannot_be_read_are_refused(
    client: Any, inputs: dict[str, Array], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(
            "tiny",
            [tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()],
        )
    assert caught.value.status() == "400"


JSON = {"Content-Type": "application/json"}


def body(**changes: object) -> bytes:
    given = {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2], **changes}
    return json.dumps({"inputs": [given]}).encode()


@pytest.mark.parametrize(
    ("content", "length"),
    [
        (body(data=[1, 2, 3]), None),
        (body(data=[[1], [2, 3]], shape=[2, 2]), None),
        (body(data=[1.5, 2]), None),
        (body(data=["1", 2]), None),
        (body(data=[True, 2]), None),
        (body(data=[1 << 80, 2]), None),
        (body(data=None), None),
        (body(shape=[-1, -2]), None),
        (body(shape=[1 << 62, 1 << 62]), None),
        (body(parameters={"binary_data_size": 16}), None),
        (body(data=None, parameters={"binary_data_size": 16}), None),
        (body(data=None, parameters={"binary_data_size": 1 << 70}), None),
        (body(data=None, shape=[1 << 31, 1 << 31], parameters={"binary_data_size": 8}), None),
        (body(datatype="FP32"), None),
        (body(name="other"), None),
        (body() + b"1234567", str(len(body()))),
        (body(), "1000000"),
        (body(), "-1"),
        (body(), "²"),
        (body(), "9" * 5000),
        (b'{"inputs": []}', None),
        (b"[" * 50000, None),
        (b"\xff\xfe", None),
        (b"", None),
    ],
)
def test_a_body_that_is_not_of_the_protocol_is_refused(
    server: Running, content: bytes, length: str | None
) -> None:
    headers = [(b"Content-Type", b"application/octet-stream")]
    headers += [(b"Inference-Header-Content-Length", length.encode())] if length else []
    with server.http() as http:
        answer = http.post("/v2/models/tiny/infer", content=content, headers=headers)
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


def test_an_input_may_come_once(server: Running) -> None:
    twice = json.dumps({"inputs": json.loads(body())["inputs"] * 2}).encode()
    with server.http(headers=JSON) as http:
        answer = http.post("/v2/models/tiny/infer", content=twice)
    assert "two inputs have the same name" in answer.json()["error"]
