"""Open a bundle, listen, and shut down without losing a request.

The port is bound only after the bundle has been verified and loaded. SIGTERM, or Ctrl-C, stops
listening, finishes the requests in flight, and returns; a second Ctrl-C ends at once.
"""

import asyncio
import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from runtime.batching import Batcher
from runtime.engine import Weights, open_slots
from runtime.server import listening
from runtime.server.access import EVERYBODY, Access
from runtime.server.app import application
from runtime.server.chat import Renderer, open_chat_template
from runtime.server.compiler import Compiler
from runtime.server.connections import most_connections, protocol
from runtime.server.forward import Forward
from runtime.server.metrics import Metrics
from runtime.server.service import Limits, Service
from runtime.server.watched import Watched
from runtime.text import open_tokenizer
from thanos_deploy.bundle.layout import GRAPH, GRAPH_DATA, ONNX

# Time for a client to read the end of its answer.
_GRACE_SECONDS = 10.0

# Time for connections that have begun to be made, before listening ends: a round trip.
_HANDSHAKE_SECONDS = 0.2

_log = logging.getLogger(__name__)


@contextmanager
def open_service(
    bundle: Path,
    *,
    slots: int,
    queue: int,
    limits: Limits,
    names: Sequence[str] = (),
    provider: str = "cpu",
    threads: int | None = None,
    prefix_bytes: int = 0,
    weights: Weights = "map",
    verify: bool = True,
    log_prompts: bool = False,
) -> Iterator[Service]:
    """Load a bundle, and close everything when the context ends.

    Requests that are in flight at the end are cancelled; `Server.run` waits for them before.

    Args:
        bundle: its folder.
        slots: largest number of texts that are generated at the same time.
        queue: largest number of requests that wait for a slot.
        limits: the limits of a request.
        names: names of the model for clients; without any, the name of the folder.
        provider, threads, prefix_bytes, weights, verify: as in `runtime.engine.open_slots`.
        log_prompts: write prompts and answers to the log.

    Raises:
        DeployError: the bundle cannot be loaded; see `open_slots` and `open_tokenizer`.
    """
    graph = (bundle / ONNX / name for name in (GRAPH, GRAPH_DATA))
    watched = Watched(tuple(graph) if weights == "map" else ())
    tokenizer = open_tokenizer(bundle, verify=verify)
    template = open_chat_template(bundle, verify=verify)
    engine = open_slots(
        bundle,
        slots=slots,
        provider=provider,
        threads=threads,
        prefix_bytes=prefix_bytes,
        weights=weights,
        verify=verify,
    )
    batcher, forward = Batcher(engine, queue=queue), Forward(engine, queue=queue)
    renderer = None if template is None else Renderer(template)
    compiler = Compiler(tokenizer, engine.vocabulary, queue=queue)
    try:
        yield Service(
            names=tuple(names) or (bundle.absolute().name or bundle.resolve().name,),
            engine=engine,
            batcher=batcher,
            forward=forward,
            tokenizer=tokenizer,
            renderer=renderer,
            compiler=compiler,
            watched=watched,
            limits=limits,
            metrics=Metrics(batcher),
            log_prompts=log_prompts,
        )
    finally:
        if renderer is not None:
            renderer.close()
        compiler.close()
        forward.close()
        batcher.close(timeout=0)  # every client has its answer, or is gone


class Server(uvicorn.Server):
    """uvicorn, on a socket that is bound already."""

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        access: Access = EVERYBODY,
        on_ready: Callable[[str], object],
        on_hangup: Callable[[], object] | None = None,
    ) -> None:
        """Prepare; `run` answers requests until a signal comes, and finishes those in flight.

        Args:
            service: what is served.
            listener: the listening socket.
            access: who may send requests, and how.
            on_ready: called with the URL when requests are accepted.
            on_hangup: called on SIGHUP; None to leave that signal as it is.
        """
        self._protocol = protocol(
            most=most_connections(service.limits.connections),
            answer_seconds=service.limits.deadline_seconds + _GRACE_SECONDS,
        )
        super().__init__(
            uvicorn.Config(
                application(service, access),
                loop="asyncio",
                http=self._protocol,
                backlog=listening.BACKLOG,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                # By the deadline every answer is finished or given up; a second is for sending it.
                timeout_graceful_shutdown=math.ceil(service.limits.deadline_seconds) + 1,
            )
        )
        self._service = service
        self._listener = listener
        self._on_ready = on_ready
        self._on_hangup = on_hangup

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.run`.

        Raises:
            KeyboardInterrupt: a second Ctrl-C came before the requests in flight were finished.
        """
        try:
            super().run(sockets or [self._listener])
        except KeyboardInterrupt:  # uvicorn raises it again after a normal shutdown
            if self.force_exit:
                raise

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.startup`."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_OnceAMinute())
        if self._on_hangup is not None:
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        await super().startup(sockets)
        self._on_ready(listening.url(self._listener))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server.shutdown`."""
        if self._service.renderer is not None:
            self._service.renderer.hurry()
        listening.drop_new_connections(self._listener)
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        # No await between this and the end of listening, which resets connections not accepted.
        accepting = [
            asyncio.ensure_future(self._let_in(client))
            for client in listening.waiting(self._listener)
        ]
        await super().shutdown(sockets)
        for one in accepting:
            one.cancel()

    async def _let_in(self, client: socket.socket) -> None:
        """Begin a connection, and shut it down like the connections that were there before."""
        _, connection = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: self._protocol(self.config, self.server_state, self.lifespan.state), client
        )
        connection.shutdown()


class _OnceAMinute:
    """Logs errors of the event loop; failures to accept connections only once a minute."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """See `asyncio.loop.set_exception_handler`."""
        if not context["message"].startswith("socket.accept()"):
            return loop.default_exception_handler(context)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 60
            _log.error("connections cannot be accepted: %s", context.get("exception"))
