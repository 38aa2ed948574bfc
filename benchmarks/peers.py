"""Run the servers that are compared: ours, `transformers serve`, and `vllm serve`.

All servers are started and answer one request, and then take turns; all but one are stopped with
SIGSTOP. Every server gets the same prompts and greedily generates the same number of tokens; an end
of sequence does not stop it.
"""

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.server import Server, free_port, running, serve, stream
from runtime.text import open_tokenizer
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration.texts import builtin_text
from thanos_deploy.machine import stillness

# Tokens per block of transformers' paged KV cache, whose default size is 60 % of the memory.
_BLOCK = 32

_OURS = "model"
_OWN_GREEDY: Json = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Load:
    """The requests that every server gets.

    Attributes:
        prompt: number of tokens in a prompt.
        new_tokens: number of tokens in an answer.
        clients: number of concurrent clients, of one closed loop after the other.
        per_client: requests of each client in a closed loop.
        least: least number of requests in a closed loop.
    """

    prompt: int
    new_tokens: int
    clients: tuple[int, ...]
    per_client: int
    least: int

    def requests(self, clients: int) -> int:
        """Return the number of requests in a closed loop."""
        return max(self.least, self.per_client * clients)


@dataclass(frozen=True, slots=True)
class Peer:
    """A server of a model: how to start it, and what requests to it need.

    Attributes:
        command: command of a server that listens on 127.0.0.1.
        port: port that the server listens on.
        model: name of the model on this server.
        tokenizer: folder with the model's tokenizer.
        greedy: fields of a request that ask for greedy decoding of the full number of tokens.
        variables: environment variables, in addition to those of this process.
    """

    command: Sequence[object]
    port: int
    model: str
    tokenizer: Path
    greedy: Json
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """A peer whose server is running."""

    peer: Peer
    server: Server

    def answer(self, prompt: str, new_tokens: int) -> Generator[str, None, None]:
        """Yield the events of one streamed answer."""
        asked = {"model": self.peer.model, "prompt": prompt, "max_tokens": new_tokens}
        return stream(self.server.url, "/v1/completions", {**asked, **self.peer.greedy})

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let the server run inside the block, and stop it afterwards."""
        self.server.thaw()
        try:
            yield
        finally:
            self.server.freeze()


def thanos(bundle: Path, *, slots: int, queue: int) -> Peer:
    """Return `thanos-deploy serve` for a bundle with the target onnx."""
    port = free_port()
    command = serve(bundle, port=port, name=_OURS, slots=slots, queue=queue)
    return Peer(command, port, _OURS, bundle / "model", _OWN_GREEDY)


def transformers(folder: Path, *options: object) -> Peer:
    """Return `transformers serve` for a checkpoint that has a tokenizer."""
    port = free_port()
    command = [
        *(Path(sys.executable).with_name("transformers"), "serve", folder),
        *("--host", "127.0.0.1", "--port", port, "--device", "cpu", *options),
    ]
    greedy = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return Peer(command, port, str(folder), folder, {"generation_config": json.dumps(greedy)})


def batching(load: Load) -> list[object]:
    """Return options of `transformers serve` for its continuous batching."""
    blocks = max(load.clients) * math.ceil((load.prompt + load.new_tokens) / _BLOCK)
    return [
        *("--continuous-batching", "--cb-block-size", _BLOCK, "--cb-num-blocks", 2 * blocks),
        *("--cb-max-batch-tokens", 4 * load.prompt),
    ]


def vllm(folder: Path, environment: Path, load: Load, *, dtype: str, threads: int | None) -> Peer:
    """Return `vllm serve` on the CPU, for a folder made for vLLM or a checkpoint.

    Args:
        folder: folder to serve.
        environment: virtual environment with vLLM, such as `make test-vllm` installs.
        load: requests that the server has to hold.
        dtype: dtype of weights, activations and KV cache.
        threads: number of threads that compute, on any core; None for vLLM's own choice, which is
            one thread on every core except one. That core is left to its scheduler, which never
            sleeps.

    Raises:
        FileNotFoundError: vLLM is not in the environment.
    """
    command = environment / "bin" / "vllm"
    if not command.exists():
        raise FileNotFoundError(f"{command}: not there; `make .venv-vllm/.installed` installs vLLM")
    port = free_port()
    return Peer(
        command=[
            *(command, "serve", folder, "--served-model-name", _OURS, "--dtype", dtype),
            # A prompt may have a few more tokens when the server tokenises it again.
            *("--max-model-len", 2 * (load.prompt + load.new_tokens)),
            *("--max-num-seqs", max(load.clients)),
            *("--host", "127.0.0.1", "--port", port),
        ],
        port=port,
        model=_OURS,
        tokenizer=folder,
        greedy=_OWN_GREEDY,
        variables={
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, all allocated at the start
            **(
                {}
                if threads is None
                else {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
            ),
        },
    )


@contextmanager
def started(
    peers: Mapping[str, Peer], work: Path, load: Load, prompt: str
) -> Iterator[dict[str, Subject]]:
    """Start all peers, let each answer one request, and stop them until their turns.

    The servers end with the block.

    Args:
        peers: the peers by name.
        work: folder for their logs.
        load: gives the length of that answer.
        prompt: prompt of that request.
    """
    with ExitStack() as stack:
        subjects = {}
        for number, (name, peer) in enumerate(peers.items()):
            say(f"start {name}")
            log = work / f"{number}.log"
            server = stack.enter_context(
                running(peer.command, port=peer.port, log=log, variables=peer.variables)
            )
            subjects[name] = Subject(peer, server)
            deque(subjects[name].answer(prompt, load.new_tokens), maxlen=0)
            server.freeze()
        yield subjects


def texts(bundle: Path, *, count: int, tokens: int) -> list[str]:
    """Return different prompts of about `tokens` tokens each."""
    tokenizer = open_tokenizer(bundle)
    ids = tokenizer.encode(builtin_text(held_out=True).content)
    return [tokenizer.decode(ids[n * tokens : (n + 1) * tokens]) for n in range(count)]


def reading(subjects: Iterable[Subject]) -> stillness.Reading:
    """Read the machine's counters; this process and all servers count as measured processes."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + ended.ru_utime + ended.ru_stime
    return stillness.read(own + sum(subject.server.cpu_seconds for subject in subjects))


_BEGUN = time.monotonic()


def say(what: str) -> None:
    """Print progress to standard error, with the seconds since this module was imported."""
    print(f"{time.monotonic() - _BEGUN:4.0f} s  {what}", file=sys.stderr, flush=True)
