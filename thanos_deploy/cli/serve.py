"""`thanos-deploy serve`: serve the exported model over HTTP."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from thanos_deploy.cli._options import bundle_argument
from thanos_deploy.cli._types import several
from thanos_deploy.errors import DeployError, PlatformError

if TYPE_CHECKING:
    from runtime.engine import Weights
    from runtime.server.access import Keys

_listening = several(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="Port to listen on; 0 takes a free one.",
    ),
    click.option(
        "--api-key-file",
        type=click.Path(path_type=Path),
        help="File with API keys of at least 16 characters, one on each line; a request has to "
        "send one of them as `Authorization: Bearer KEY`. The file is read again on "
        "SIGHUP.",
    ),
    click.option(
        "--allow-host",
        "hosts",
        metavar="NAME",
        multiple=True,
        help="Another host name to accept in requests, such as the name under which a proxy "
        "forwards them. Without this option, a server on a loopback address accepts only "
        "the names of that address, such as localhost. May be given several times.",
    ),
    click.option(
        "--allow-origin",
        "origins",
        metavar="ORIGIN",
        multiple=True,
        help="An origin, such as https://app.example, whose pages may call this server from a "
        "browser (CORS); * for all. May be given several times.  [default: none]",
    ),
    click.option(
        "--name",
        "served_names",
        multiple=True,
        help="Name by which clients call the model; may be given several times.  [default: the "
        "folder's name]",
    ),
    click.option("--log-prompts", is_flag=True, help="Also log prompts and answers."),
)
_engine = several(
    click.option(
        "--slots",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Number of requests that are answered at the same time; each has its own KV cache.",
    ),
    click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Execution provider of ONNX Runtime; the KV caches are on its device. If it is "
        "not available, the command fails.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Number of threads on a CPU.  [default: one for each processor]",
    ),
    click.option(
        "--weights",
        type=click.Choice(["map", "memory"]),
        default="map",
        show_default=True,
        help="map: map the file of weights into memory; replicas share this memory, and the "
        "file must not be written to meanwhile. memory: read the weights into the "
        "server's own memory.",
    ),
    click.option(
        "--prefix-memory",
        type=click.IntRange(min=0),
        default=256,
        show_default=True,
        metavar="MIB",
        help="Memory for the KV caches of prompt prefixes, such as a system prompt; a later "
        "prompt that begins with the same prefix does not compute it again. 0 keeps none.",
    ),
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Check the hashes of the files first.",
    ),
)
_limits = several(
    click.option(
        "--queue",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Largest number of requests that wait for a slot; one more is answered with 503 "
        "and Retry-After.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        help="Largest number of tokens in an answer.  [default: what the model allows]",
    ),
    click.option(
        "--max-body",
        type=click.IntRange(min=1),
        default=1 << 20,
        show_default=True,
        help="Largest body of a request, in bytes; a larger one is answered with 413.",
    ),
    click.option(
        "--max-connections",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Largest number of open connections; one more is answered with 503 and closed.",
    ),
    click.option(
        "--max-tensor-tokens",
        type=click.IntRange(min=1),
        default=16384,
        show_default=True,
        help="Largest number of token ids in one request for logits, over all sequences of its "
        "batch.",
    ),
    click.option(
        "--deadline",
        type=click.FloatRange(min=0, min_open=True),
        default=300.0,
        show_default=True,
        help="Largest time from a request to the end of its answer, in seconds. After that the "
        "request is answered with 504, or, if its stream has begun, with an error event.",
    ),
)


@click.command("serve")
@bundle_argument
@_listening
@_engine
@_limits
@click.option("--json", "as_json", is_flag=True, help="Print the address as a JSON document.")
def command(
    out: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    served_names: tuple[str, ...],
    log_prompts: bool,
    slots: int,
    provider: str,
    threads: int | None,
    weights: "Weights",
    prefix_memory: int,
    verify: bool,
    queue: int,
    max_tokens: int | None,
    max_body: int,
    max_connections: int,
    max_tensor_tokens: int,
    deadline: float,
    as_json: bool,
) -> None:
    """Serve the exported model of the bundle OUT over HTTP, until SIGTERM or Ctrl-C.

    \b
    POST /v1/chat/completions     as OpenAI's; the chat template is the model's own
    POST /v1/completions          as OpenAI's, for plain text or token ids
    GET  /v1/models
    POST /v2/models/NAME/infer    Open Inference Protocol: ids in, logits out
    GET  /v2/models/NAME, /v2/health/live, /v2/health/ready
    POST /tokenize, /detokenize   ids of texts or conversations, and back, as vLLM's
    GET  /health, /health/ready   for load balancers
    GET  /metrics                 for Prometheus
    GET  /version
    GET  /openapi.json            the description of all routes

    \b
    thanos-deploy serve out/smol --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "smol", "prompt": "The capital of France is", "temperature": 0}'

    Requests share the steps of a batch (continuous batching); each gets the answer that it would
    get alone. When the server accepts requests, it prints its address, as in `ready
    http://127.0.0.1:8000`. The log is on standard error, one line of JSON for each request, without
    prompts and answers. There is no TLS; put a proxy in front of a server that other machines can
    reach.

    SIGTERM or Ctrl-C stops listening, finishes the requests in flight, and exits with 0; a second
    Ctrl-C does not wait. The bundle is verified before the server listens: exit code 7 if a file
    was changed, 4 if the address is taken.
    """  # noqa: D301 - click wants the control character
    try:
        from runtime.server import listening, logs, main
        from runtime.server.access import Access, Keys, is_loopback, read_keys
        from runtime.server.service import Limits
    except ImportError as error:
        raise PlatformError(
            f"serving needs a package that is not installed ({error})",
            fix="pip install 'thanos-deploy[serve]'",
        ) from error

    def announce(url: str) -> None:
        click.echo(json.dumps({"ready": url}) if as_json else f"ready {url}")

    keys = Keys(read_keys(api_key_file) if api_key_file else ())
    access = Access(keys, hosts if is_loopback(host) else None, origins)
    limits = Limits(
        answers=queue,
        new_tokens=max_tokens,
        body_bytes=max_body,
        deadline_seconds=deadline,
        connections=max_connections,
        tensor_tokens=max_tensor_tokens,
    )
    with main.open_service(
        out,
        slots=slots,
        queue=queue,
        limits=limits,
        names=served_names,
        provider=provider,
        threads=threads,
        prefix_bytes=prefix_memory << 20,
        weights=weights,
        verify=verify,
        log_prompts=log_prompts,
    ) as service:
        listener = listening.listen(host, port)
        logs.configure()
        reread = None if api_key_file is None else partial(_reread, keys, api_key_file)
        main.Server(service, listener, access=access, on_ready=announce, on_hangup=reread).run()


def _reread(keys: "Keys", file: Path) -> None:
    """Read the file of API keys again; the old keys stay if it cannot be read."""
    from runtime.server.access import read_keys

    log = logging.getLogger(__name__)
    try:
        found = read_keys(file)
    except DeployError as error:
        log.error("the API keys were not changed: %s", error.message)
    else:
        keys.replace(found)
        log.info("%d API keys were read", len(found))
