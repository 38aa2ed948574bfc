"""The servers that are compared: ours, `transformers serve`, and `vllm serve`.

All of them are started and asked once, and then take turns; those whose turn it is not are stopped
(SIGSTOP). Everybody gets the same prompts and writes greedily as many tokens, whatever they are.
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

# Of transformers' paged cache; the default would take 60 % of the machine's memory.
_BLOCK = 32

_OURS = "model"
_OWN_GREEDY: Json = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of every server.

    Attributes:
        prompt: tokens of a prompt.
        new_tokens: tokens of an answer.
        clients: how many at once, one closed loop after the other.
        per_client: requests of each client, but never fewer than `least` in all.
        least: see there.
    """

    prompt: int
    new_tokens: int
    clients: tuple[int, ...]
    per_client: int
    least: int

    def requests(self, clients: int) -> int:
        """Of a closed loop."""
        return max(self.least, self.per_client * clients)


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to serve a model.

    Attributes:
        command: of a server that listens on 127.0.0.1.
        port: where.
        model: what it calls the model.
        tokenizer: the folder with the model's tokenizer.
        greedy: the part of a request that makes it write all tokens, the likeliest each time.
        variables: of its environment, beside those that are there.
    """

    command: Sequence[object]
    port: int
    model: str
    tokenizer: Path
    greedy: Json
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """A peer that runs."""

    peer: Peer
    server: Server

    def answer(self, prompt: str, new_tokens: int) -> Generator[str, None, None]:
        """The events of one answer."""
        asked = {"model": self.peer.model, "prompt": prompt, "max_tokens": new_tokens}
        return stream(self.server.url, "/v1/completions", {**asked, **self.peer.greedy})

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It is this one's turn."""
        self.server.thaw()
        try:
            yield
        finally:
            self.server.freeze()


def thanos(bundle: Path, *, slots: int, queue: int) -> Peer:
    """`thanos-deploy serve`, of a bundle with the target onnx."""
    port = free_port()
    command = serve(bundle, port=port, name=_OURS, slots=slots, queue=queue)
    return Peer(command, port, _OURS, bundle / "model", _OWN_GREEDY)


def transformers(folder: Path, *options: object) -> Peer:
    """`transformers serve`, of a checkpoint, with the tokenizer that is there."""
    port = free_port()
    command = [
        *(Path(sys.executable).with_name("transformers"), "serve", folder),
        *("--host", "127.0.0.1", "--port", port, "--device", "cpu", *options),
    ]
    greedy = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return Peer(command, port, str(folder), folder, {"generation_config": json.dumps(greedy)})


def batching(load: Load) -> list[object]:
    """Options of `transformers serve` for its continuous batching."""
    blocks = max(load.clients) * math.ceil((load.prompt + load.new_tokens) / _BLOCK)
    return [
        *("--continuous-batching", "--cb-block-size", _BLOCK, "--cb-num-blocks", 2 * blocks),
        *("--cb-max-batch-tokens", 4 * load.prompt),
    ]


def vllm(folder: Path, environment: Path, load: Load, *, dtype: str, threads: int | None) -> Peer:
    """`vllm serve` on the CPU, of a folder for vLLM or a checkpoint.

    Args:
        folder: what it serves.
        environment: with vLLM, such as `make test-vllm` installs.
        load: what it is to be ready for.
        dtype: of weights, activations and cache.
        threads: that compute, on any core; None for vLLM's own choice, which is one on each core
            but one: that is left to its scheduler, which does not sleep.

    Raises:
        FileNotFoundError: there is no vLLM.
    """
    command = environment / "bin" / "vllm"
    if not command.exists():
        raise FileNotFoundError(f"{command}: not there; `make .venv-vllm/.installed` installs vLLM")
    port = free_port()
    return Peer(
        command=[
            *(command, "serve", folder, "--served-model-name", _OURS, "--dtype", dtype),
            # A prompt may become a few tokens more when the server cuts it again.
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
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, taken whole at the start
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
    """All peers, asked once and then stopped where they are; they end with the block.

    Args:
        peers: by name.
        work: a folder for their logs.
        load: of which each writes one answer.
        prompt: to begin with.
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
    """Different prompts of about so many tokens."""
    tokenizer = open_tokenizer(bundle)
    ids = tokenizer.encode(builtin_text(held_out=True).content)
    return [tokenizer.decode(ids[n * tokens : (n + 1) * tokens]) for n in range(count)]


def reading(subjects: Iterable[Subject]) -> stillness.Reading:
    """The machine's counters, what is measured being everything that was started here."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + ended.ru_utime + ended.ru_stime
    return stillness.read(own + sum(subject.server.cpu_seconds for subject in subjects))


_BEGUN = time.monotonic()


def say(what: str) -> None:
    """Progress, on standard error, with the seconds since the beginning."""
    print(f"{time.monotonic() - _BEGUN:4.0f} s  {what}", file=sys.stderr, flush=True)
