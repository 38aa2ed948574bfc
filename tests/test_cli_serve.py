"""The command in a process of its own, as an init system runs it."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI

from tests.conftest import Invoke

START = "from thanos_deploy.cli import main; main()"


@contextmanager
def started(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, when it is ready, and what it says then."""
    with subprocess.Popen(
        [sys.executable, "-c", START, "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline()
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_nothing_in_flight(exported_llama: Path, number: signal.Signals) -> None:
    asked = {"model": exported_llama.name, "prompt": "Once", "max_tokens": 100, "temperature": 0}
    with started(exported_llama, "--threads", 1) as (process, line):
        url = line.removeprefix("ready ").strip()
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(**asked, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
            streams = [
                client.completions.create(  # type: ignore[call-overload]
                    **asked, stream=True, extra_body={"ignore_eos": True}
                )
                for _ in range(6)
            ]
            texts = [next(events).choices[0].text for events in streams]
            process.send_signal(number)
            for index, events in enumerate(streams):
                texts[index] += "".join(event.choices[0].text for event in events)
            assert set(texts) == {whole.choices[0].text}
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0
    entries = [json.loads(entry) for entry in log.splitlines()]
    assert [entry["status"] for entry in entries if entry["message"] == "request"] == [200] * 7
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))


@pytest.mark.slow
def test_json_says_where_it_listens(exported_llama: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("open-sesame-open-sesame\n")
    with started(exported_llama, "--json", "--api-key-file", keys, "--name", "tiny") as (_, line):
        url = json.loads(line)["ready"]
        assert url.startswith("http://127.0.0.1:")
        with OpenAI(base_url=f"{url}/v1", api_key="open-sesame-open-sesame") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]


def test_nothing_is_bound_before_the_bundle_is_verified(
    exported_llama: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.listening.listen", None)
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    with (bundle / "onnx" / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    code, out, error = invoke("serve", bundle)
    assert (code, out) == (7, "")
    assert "SHA-256" in error
    assert invoke("serve", tmp_path)[0] == 3


def test_an_address_that_is_taken_is_no_bug(exported_llama: Path, invoke: Invoke) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, error = invoke("serve", exported_llama, "--port", taken.getsockname()[1])
    assert (code, out) == (4, "")
    assert "cannot listen" in error
    assert "--port 0" in error
    assert invoke("serve", exported_llama, "--host", "host.invalid")[0] == 4


@pytest.mark.parametrize(
    "options",
    [
        ["--slots", 0],
        ["--queue", 0],
        ["--deadline", 0],
        ["--max-tokens", 0],
        ["--port", 70000],
        ["--api-key-file", "nowhere"],
    ],
)
def test_options_that_cannot_be_meant_are_usage_errors(
    exported_llama: Path, invoke: Invoke, options: list[object]
) -> None:
    assert invoke("serve", exported_llama, *options)[0] == 2


def test_a_missing_package_names_what_to_install(
    exported_llama: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("runtime.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, error = invoke("serve", exported_llama)
    assert code == 4
    assert "pip install 'thanos-deploy[serve]'" in error
