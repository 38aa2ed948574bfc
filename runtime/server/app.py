"""The application: routes and guards around one service."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from runtime.server import completions, errors, operations, prompts, tensors
from runtime.server.access import Access, Addressed, Locked
from runtime.server.guards import Bounded, Headed, Recorded
from runtime.server.logs import REQUEST_ID
from runtime.server.service import Service
from thanos_deploy import __version__

# A megabyte arrives in less even over a slow line.
_BODY_SECONDS = 30.0


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
    for part in (completions, tensors, prompts, operations):
        api.include_router(part.router)
    errors.install(api, service.retry_after)
    return api


def application(service: Service, access: Access) -> ASGIApp:
    """The whole application.

    Args:
        service: what is served.
        access: who may ask.
    """
    bounded = Bounded(
        Headed(routes(service)),
        body_bytes=service.limits.body_bytes,
        seconds=min(service.limits.deadline_seconds, _BODY_SECONDS),
    )
    guarded: ASGIApp = Locked(Addressed(bounded, access.hosts), access.keys)
    if access.origins:  # outside of the keys: a browser asks without one whether it may ask
        guarded = CORSMiddleware(
            guarded,
            allow_origins=access.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID,),
        )
    return Recorded(guarded, service.metrics)
