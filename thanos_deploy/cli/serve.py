"""`thanos-deploy serve`: the exported model behind HTTP."""

import json
from pathlib import Path

import click

from thanos_deploy.cli._options import bundle_argument, several
from thanos_deploy.errors import PlatformError

_listening = several(
    click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="0 takes one that is free.",
    ),
    click.option(
        "--api-key-file",
        type=click.Path(path_type=Path),
        help="Keys, one a line: a request has to give one as `Authorization: Bearer KEY`.",
    ),
    click.option("--name", help="Of the model, as clients call it.  [default: the folder's name]"),
    click.option("--log-prompts", is_flag=True, help="Log what is asked and answered, too."),
)
_engine = several(
    click.option(
        "--slots",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Texts that are written at the same time; each has a kv cache of its own.",
    ),
    click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="What to run on, and where the kv caches are; an error where it is not there.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="That compute on a CPU.  [default: one for each processor]",
    ),
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Check the files' hashes first.",
    ),
)
_limits = several(
    click.option(
        "--queue",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Requests that wait for a slot; one more is answered 503 with Retry-After.",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        help="The most tokens of an answer.  [default: what the model takes]",
    ),
    click.option(
        "--max-body",
        type=click.IntRange(min=1),
        default=1 << 20,
        show_default=True,
        help="Bytes of a request's body; more is answered 413.",
    ),
    click.option(
        "--deadline",
        type=click.FloatRange(min=0, min_open=True),
        default=300.0,
        show_default=True,
        help="Seconds from a request to the end of its answer; later it is answered 503, or, when "
        "its stream has begun, with an event that has the error.",
    ),
)


@click.command("serve")
@bundle_argument
@_listening
@_engine
@_limits
@click.option("--json", "as_json", is_flag=True, help="Say where it listens as a JSON document.")
def command(
    out: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    name: str | None,
    log_prompts: bool,
    slots: int,
    provider: str,
    threads: int | None,
    verify: bool,
    queue: int,
    max_tokens: int | None,
    max_body: int,
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
    GET  /health, /metrics        for load balancers, and for Prometheus
    GET  /openapi.json            all of it, described

    \b
    thanos-deploy serve out/smol --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "smol", "prompt": "The capital of France is", "temperature": 0}'

    Texts of several clients are written together; each client gets what it would get alone. When
    requests are taken, one line on standard output says where: `ready http://127.0.0.1:8000`. The
    log is on standard error, a line of JSON for each request, without a word of what was asked and
    answered. There is no TLS: what is to be reached from elsewhere belongs behind a proxy.

    SIGTERM, or Ctrl-C, stops listening, finishes what is in flight, and exits with 0; a second
    Ctrl-C does not wait. Nothing is listened to before the bundle is verified: exit code 7 if a
    file was changed, 4 if the address is taken.
    """  # noqa: D301 - click wants the control character
    try:
        from runtime.server import logs, main
        from runtime.server.guards import read_keys
        from runtime.server.service import Limits
    except ImportError as error:
        raise PlatformError(
            f"serving needs a package that is not installed ({error})",
            fix="pip install 'thanos-deploy[serve]'",
        ) from error

    def announce(url: str) -> None:
        click.echo(json.dumps({"ready": url}) if as_json else f"ready {url}")

    keys = read_keys(api_key_file) if api_key_file else []
    limits = Limits(
        answers=queue, new_tokens=max_tokens, body_bytes=max_body, deadline_seconds=deadline
    )
    with main.open_service(
        out,
        slots=slots,
        queue=queue,
        limits=limits,
        name=name,
        provider=provider,
        threads=threads,
        verify=verify,
        log_prompts=log_prompts,
    ) as service:
        listener = main.listen(host, port)
        logs.configure()
        main.Server(service, listener, keys=keys, on_ready=announce).run()
