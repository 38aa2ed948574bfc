"""A real vLLM, in an environment of its own, on the loopback interface."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".installed").exists(), reason="`make test-vllm` installs vLLM"
    ),
]

# A start takes about 30 s of one core; the machine may be busy.
_SECONDS = 600

TWO_RANKS = ("--tensor-parallel-size", "2")


def command(model: Path, *options: str) -> list[str]:
    """What serves a folder in float32, for short texts."""
    return [
        str(ENVIRONMENT / "bin" / "vllm"),
        *("serve", str(model), "--dtype", "float32", "--max-model-len", "64"),
        *("--max-num-seqs", "2", "--host", "127.0.0.1", *options),
    ]


def environment(cache: Path, *modules: Path) -> dict[str, str]:
    """With modules, the plugin of this tree, and a folder for what is compiled."""
    own = {
        "PYTHONPATH": os.pathsep.join(map(str, (*modules, ROOT))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # By itself vLLM wants a NUMA node for each rank.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return {**os.environ, **own, "VLLM_CACHE_ROOT": str(cache / "vllm-cache")}


@contextmanager
def serving(model: Path, *options: str, modules: Sequence[Path] = ()) -> Iterator[OpenAI]:
    """A client of a server that is ready; the server ends with the block.

    Args:
        model: the folder to serve; the server's output is a `vllm-*.log` beside it.
        options: further options of `vllm serve`.
        modules: folders in which the server's Python looks for modules first.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = model.parent / f"vllm-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(model, "--port", str(port), *options),
            env=environment(model.parent, *modules),
            cwd=model.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            _wait(client, process, log)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def refusal(model: Path, *options: str) -> str:
    """What a server says that does not start."""
    done = subprocess.run(
        command(model, *options),
        env=environment(model.parent),
        cwd=model.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode != 0
    return done.stdout


def greedy(client: OpenAI, model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Sixteen tokens after each of some prompts, which the server answers together."""
    answer = client.completions.create(
        model=str(model),
        prompt=[list(prompt) for prompt in prompts],
        max_tokens=16,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]


def _wait(client: OpenAI, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            client.with_options(max_retries=0, timeout=5).models.list()
            return
        except APIConnectionError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())
