"""All errors, in the format of the protocol that the client uses.

OpenAI's routes answer `{"error": {"message", "type", "param", "code"}}`, the Open Inference
Protocol's `{"error": "message"}`. The project's own errors have these statuses:

    UsageError, InputError   400  the request is wrong
    PlatformError            400  it needs a package that is not installed
    Busy                     503  the server is full
    the deadline             504  the request takes too long on this machine: do not try again
    anything else            500  a bug, or the engine failed
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from runtime.batching import Busy
from runtime.server.bodies import UNSUPPORTED
from runtime.server.logs import Record, record_of
from thanos_deploy.errors import DeployError, InputError, PlatformError, UsageError

# nginx's status for a request whose client has left; only the log and the metrics have it.
CLIENT_GONE = 499

_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed"}


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's terms."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class TensorError(BaseModel):
    """The Open Inference Protocol's error object."""

    error: str


class RefusedError(Exception):
    """A request that is refused, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the refusal.

        Args:
            status: HTTP status of the response.
            message: the reason, for people.
            code: the reason, for programs.
            param: the field of the request that is at fault.
            headers: further headers of the response.
        """
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(
            message=message,
            type="invalid_request_error" if status < 500 else "server_error",
            param=param,
            code=code,
        )
        self.headers = dict(headers or {})

    @property
    def body(self) -> ErrorBody:
        """OpenAI's error object."""
        return ErrorBody(error=self.detail)

    def closing(self) -> "RefusedError":
        """Close the connection after the response, so that the body is not read on; return self."""
        self.headers["Connection"] = "close"
        return self

    def note(self, record: Record) -> None:
        """Add the code to the log; not the message, which may quote the request."""
        record.fields["error"] = self.detail.code

    def response(self, scope: Scope) -> Response:
        """Return the response for the client, and add the code to the log."""
        self.note(record_of(scope))
        tensors = scope["path"].startswith("/v2")
        content = {"error": self.detail.message} if tensors else self.body.model_dump()
        return Response(
            # ASCII: a message may quote half a surrogate pair, which UTF-8 cannot encode.
            json.dumps(content),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def too_late(message: str) -> RefusedError:
    """Return the error of a request whose deadline has passed, with a header against retries.

    The same request would take as long again, and OpenAI's clients retry after a 5xx unless this
    header tells them not to.
    """
    return RefusedError(504, message, code="deadline", headers={"x-should-retry": "false"})


def install(app: FastAPI, retry_after: Callable[[], int]) -> None:
    """Turn every exception of the routes into an error response in the client's protocol.

    Args:
        app: the application with the routes.
        retry_after: returns the seconds after which a client may retry when the server is full.
    """

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        response = error.response(request.scope)
        if error.status == 503:
            response.headers["Retry-After"] = str(retry_after())
        return response

    @app.exception_handler(DeployError)
    async def ours(request: Request, error: DeployError) -> Response:
        message = f"{error.message}; {error.fix}"
        match error:
            case Busy():
                return await refused(request, RefusedError(503, message, code="overloaded"))
            case PlatformError():  # a package that only this request needs
                return await refused(request, RefusedError(400, message, code="not_installed"))
            case UsageError() | InputError():
                return await refused(request, RefusedError(400, message, code="invalid"))
            case _:
                raise error

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return misread(error.errors()[0]).response(request.scope)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return RefusedError(
            error.status_code,
            error.detail,
            code=_CODES.get(error.status_code),
            headers=error.headers,
        ).response(request.scope)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return RefusedError(500, "this is a bug in the server", code="internal").response(
            request.scope
        )


def misread(problem: Mapping[str, Any]) -> RefusedError:
    """Turn the first error that pydantic found in a body into a refusal."""
    place = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return RefusedError(400, "the body is not valid JSON", code="invalid_json")
    if place and place[0] in UNSUPPORTED:
        return RefusedError(
            400,
            f"{place[0]}: not supported by this server; leave it out",
            code=problem["type"] if problem["type"] != "extra_forbidden" else "unknown_parameter",
            param=place[0],
        )
    if problem["type"] == "extra_forbidden":
        return RefusedError(
            400,
            f"Unrecognized request argument supplied: {'.'.join(place)}",
            code="unknown_parameter",
            param=place[0],
        )
    # The messages of our own validators of several fields name these fields already.
    said, ours = problem["msg"].removeprefix("Value error, "), problem["type"] == "value_error"
    return RefusedError(
        400,
        said if ours and not place else f"{'.'.join(place) or 'body'}: {said}",
        code=problem["type"],
        param=place[0] if place else None,
    )
