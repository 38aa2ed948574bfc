"""The application: routes and guards around one service."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp

from runtime.server import completions, errors, operations, tensors
from runtime.server.guards import Bounded, Locked, Recorded
from runtime.server.service import Service
from thanos_deploy import __version__


def routes(service: Service) -> FastAPI:
    """The routes alone, which describe themselves at /openapi.json."""
    api = FastAPI(
        title="thanos-deploy",
        version=__version__,
        description=f"{service.name}, as OpenAI and the Open Inference Protocol have it.",
        # Pages about it would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    api.state.service = service
    for part in (completions, tensors, operations):
        api.include_router(part.router)
    errors.install(api, service.retry_after)
    return api


def application(service: Service, *, keys: Sequence[str] = ()) -> ASGIApp:
    """The whole of it.

    Args:
        service: what is served.
        keys: one of which every request has to give; empty to let everybody in.
    """
    bounded = Bounded(
        routes(service),
        body_bytes=service.limits.body_bytes,
        seconds=service.limits.deadline_seconds,
    )
    return Recorded(Locked(bounded, keys), service.metrics)
