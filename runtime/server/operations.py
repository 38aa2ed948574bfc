"""The routes for whoever operates the server: health and metrics."""

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
    """What /health says."""

    status: Literal["ok"]


@router.get("/health")
async def health() -> Health:
    """The model is loaded and requests are taken."""
    return Health(status="ok")


@router.get("/health/ready")
async def ready(service: Served) -> Health:
    """The same, and the model's files are those that were loaded."""
    service.require_ready()
    return Health(status="ok")


class Version(BaseModel):
    """What /version says."""

    version: str


@router.get("/version")
async def version() -> Version:
    """Of thanos-deploy."""
    return Version(version=__version__)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, service: Served) -> Response:
    """What Prometheus collects."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service.metrics.registry), headers={"Content-Type": media_type})
