"""The routes for the operator of the server: health, version and metrics."""

from typing import Any, Literal

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from runtime.server.errors import ErrorBody
from runtime.server.service import Served
from thanos_deploy import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}}
router = APIRouter(responses=_ERRORS, tags=["Operations"])


class Health(BaseModel):
    """The response of /health."""

    status: Literal["ok"]


@router.get("/health")
async def health() -> Health:
    """Report that the model is loaded and requests are accepted."""
    return Health(status="ok")


@router.get("/health/ready")
async def ready(service: Served) -> Health:
    """Report that requests are accepted, and the model's files are still those loaded."""
    service.require_ready()
    return Health(status="ok")


class Version(BaseModel):
    """The response of /version."""

    version: str


@router.get("/version")
async def version() -> Version:
    """Return the version of thanos-deploy."""
    return Version(version=__version__)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, service: Served) -> Response:
    """Return the metrics for Prometheus."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service.metrics.registry), headers={"Content-Type": media_type})
