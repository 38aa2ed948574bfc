"""The ASGI application: the routes of one service, and the middleware around them."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from runtime.server import completions, errors, operations, prompts, tensors
from runtime.server.access import Access, Addressed, Locked
from runtime.server.guards import Bounded, Headed, Recorded
from runtime.server.logs import REQUEST_ID
from runtime.server.service import Service
from thanos_deploy import __version__

# Time for a body to arrive; a megabyte takes less even over a slow line.
_BODY_SECONDS = 30.0


def routes(service: Service) -> FastAPI:
    """Return the routes without middleware; /openapi.json describes them."""
    api = FastAPI(
        title="thanos-deploy",
        version=__version__,
        description=f"{service.name}, as OpenAI and the Open Inference Protocol have it.",
        # FastAPI's pages of documentation load scripts from other servers.
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
    """Return the routes with all middleware.

    Args:
        service: what is served.
        access: who may send requests, and how.
    """
    bounded = Bounded(
        Headed(routes(service)),
        body_bytes=service.limits.body_bytes,
        seconds=min(service.limits.deadline_seconds, _BODY_SECONDS),
    )
    guarded: ASGIApp = Locked(Addressed(bounded, access.hosts), access.keys)
    if access.origins:  # before the keys: a browser's preflight request has no key
        guarded = CORSMiddleware(
            guarded,
            allow_origins=access.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID,),
        )
    return Recorded(guarded, service.metrics)
