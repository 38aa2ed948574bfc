"""The Open Inference Protocol, version 2, for raw tensors: ids in, logits out.

    input_ids       INT64 [batch, tokens]
    attention_mask  INT64 [batch, tokens], optional; 0 for padding, which must be on the left
    logits          FP32  [batch, vocabulary], after the last token

Tensors are sent as JSON, or as bytes after the JSON (Triton's binary tensor data extension).
Forward passes run apart from the batch that generates text, one at a time.

Source: https://github.com/kserve/open-inference-protocol, rest/predict-v2, and Triton Inference
Server's documentation of the extension.
"""

import asyncio
import json
import math
import re
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from runtime.engine import Ids, Logits
from runtime.server.clients import unless_gone
from runtime.server.errors import RefusedError, TensorError, misread
from runtime.server.messages import one_of
from runtime.server.prompts import before_the_deadline
from runtime.server.service import Served, Service
from thanos_deploy import __version__

# The only version: a bundle has one model.
_VERSION = "1"

_JSON_LENGTH = "Inference-Header-Content-Length"

# Validation stops at the first item that is not a number.
_FAST = Field(fail_fast=True)

Number = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class _Loose(BaseModel):
    """A part of a body that ignores other fields, which the protocol or an extension may have."""

    model_config = ConfigDict(strict=True, extra="ignore")


class InputParameters(_Loose):
    """The parameters of an input."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None


class Input(_Loose):
    """An input tensor, with its data here or after the JSON."""

    name: Literal["input_ids", "attention_mask"]
    datatype: Literal["INT64"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    data: Annotated[
        Annotated[list[Number], _FAST]
        | Annotated[list[Annotated[list[Number], _FAST]], _FAST]
        | None,
        one_of("whole numbers of 64 bits, in one list or in rows"),
    ] = None
    parameters: InputParameters = InputParameters()


class OutputParameters(_Loose):
    """The parameters of an output."""

    binary_data: bool | None = None


class Output(_Loose):
    """An output that the client asks for."""

    name: Literal["logits"]
    parameters: OutputParameters = OutputParameters()


class InferParameters(_Loose):
    """The parameters of all outputs."""

    binary_data_output: bool = False


class InferRequest(_Loose):
    """The JSON of a request."""

    id: str | None = None
    inputs: Annotated[list[Input], Field(min_length=1, max_length=2)]
    outputs: Annotated[list[Output], Field(max_length=1)] = []
    parameters: InferParameters = InferParameters()

    @property
    def binary_output(self) -> bool:
        """Whether the logits are to be sent as bytes."""
        asked = self.outputs[0].parameters.binary_data if self.outputs else None
        return self.parameters.binary_data_output if asked is None else asked


class TensorMetadata(BaseModel):
    """A tensor of a model; -1 for an axis of any length."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    """Name, version and extensions of the server."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """The response of /v2/health/live."""

    live: bool


class Ready(BaseModel):
    """The response of /v2/health/ready."""

    ready: bool


class ModelReady(Ready):
    """The response of /v2/models/NAME/ready."""

    name: str


class OutputTensor(TensorMetadata):
    """A tensor of a response."""

    data: list[float] | None = None
    parameters: dict[str, int] | None = None


class InferResponse(BaseModel):
    """The JSON of a response."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": TensorError},
    503: {"model": TensorError, "description": "The server is busy; see Retry-After"},
    504: {"model": TensorError, "description": "The answer was not finished before the deadline"},
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": InferRequest.model_json_schema()}},
    }
}
router = APIRouter(prefix="/v2", responses=_ERRORS, tags=["Open Inference Protocol"])


@router.get("")
async def server() -> ServerMetadata:
    """Describe the server."""
    return ServerMetadata(
        name="thanos-deploy", version=__version__, extensions=["binary_tensor_data"]
    )


@router.get("/health/live")
async def live() -> Live:
    """Report that the server responds."""
    return Live(live=True)


@router.get("/health/ready")
async def ready(service: Served) -> Ready:
    """Report that the model is loaded and requests are accepted."""
    service.require_ready()
    return Ready(ready=True)


@router.get("/models/{name:path}/versions/{version}/ready")
@router.get("/models/{name:path}/ready")
async def model_ready(name: str, service: Served, version: str = _VERSION) -> ModelReady:
    """Report that a model is loaded and requests are accepted."""
    _require(service, name, version)
    service.require_ready()
    return ModelReady(name=name, ready=True)


@router.post(
    "/models/{name:path}/versions/{version}/infer",
    response_model=InferResponse,
    openapi_extra=_BODY,
)
@router.post("/models/{name:path}/infer", response_model=InferResponse, openapi_extra=_BODY)
async def infer(name: str, request: Request, service: Served, version: str = _VERSION) -> Response:
    """Return the logits after the last token of every sequence."""
    _require(service, name, version)
    inference, tensors = read(await request.body(), request.headers.get(_JSON_LENGTH))
    ids, mask = _ids_and_mask(tensors)
    if len(ids) > service.engine.slots:
        raise RefusedError(
            400,
            f"a batch of {len(ids)} sequences; this server takes at most {service.engine.slots}",
            code="batch_too_large",
        )
    most = service.limits.tensor_tokens
    if most is not None and ids.size > most:
        raise RefusedError(
            400,
            f"input_ids of shape {list(ids.shape)} are {ids.size} ids; this server takes at most "
            f"{most} at a time",
            code="too_many_tokens",
        )
    async with before_the_deadline(
        request, service, "the logits were not computed before the deadline"
    ):
        logits = await unless_gone(request, service.forward.logits(ids, mask))
    # Each sequence has as many logits as the vocabulary has ids: too many for the event loop.
    return await asyncio.to_thread(_written, inference, service.name, logits)


@router.get("/models/{name:path}/versions/{version}")
@router.get("/models/{name:path}")
async def metadata(name: str, service: Served, version: str = _VERSION) -> ModelMetadata:
    """Describe the inputs and outputs of the model."""
    _require(service, name, version)
    return ModelMetadata(
        name=service.name,
        versions=[_VERSION],
        platform="onnxruntime_onnx",
        inputs=[
            TensorMetadata(name=name, datatype="INT64", shape=[-1, -1])
            for name in ("input_ids", "attention_mask")
        ],
        outputs=[
            TensorMetadata(name="logits", datatype="FP32", shape=[-1, service.engine.vocabulary])
        ],
    )


def _require(service: Service, name: str, version: str) -> None:
    service.require(name)
    if version != _VERSION:
        raise RefusedError(
            404,
            f"The model {name!r} has no version {version!r}; this server has {_VERSION!r}",
            code="model_not_found",
        )


def read(body: bytes, json_length: str | None) -> tuple[InferRequest, dict[str, Ids]]:
    """Parse the body of a request into its JSON, and its tensors by name.

    Args:
        body: JSON, and the bytes of binary tensors after it.
        json_length: length of the JSON in bytes, from the header; None if there is only JSON.

    Raises:
        RefusedError: the body does not follow the protocol.
    """
    if json_length is not None and not re.fullmatch("[0-9]{1,9}", json_length):
        raise RefusedError(400, f"{_JSON_LENGTH}: not a number of bytes")
    end = len(body) if json_length is None else int(json_length)
    if end > len(body):
        raise RefusedError(400, f"{_JSON_LENGTH} is {end}; the body has {len(body)} bytes")
    try:
        inference = InferRequest.model_validate_json(body[:end])
    except ValidationError as error:
        raise misread(error.errors(include_url=False)[0]) from error
    binary = memoryview(body)[end:]
    tensors: dict[str, Ids] = {}
    for tensor in inference.inputs:
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise RefusedError(400, f"{tensor.name}: give either data or binary_data_size")
        tensors[tensor.name] = _from_json(tensor) if size is None else _from_bytes(tensor, binary)
        binary = binary[size or 0 :]
    if len(tensors) < len(inference.inputs):
        raise RefusedError(400, "two inputs have the same name")
    if len(binary):
        raise RefusedError(400, f"the body has {len(binary)} bytes after the last input")
    return inference, tensors


def _from_json(tensor: Input) -> Ids:
    try:
        return np.array(tensor.data, dtype=np.int64).reshape(tensor.shape)
    except ValueError as error:  # rows of different lengths, or too few
        raise RefusedError(
            400, f"{tensor.name}: the data does not have the shape {tensor.shape}"
        ) from error


def _from_bytes(tensor: Input, binary: memoryview) -> Ids:
    needed = math.prod(tensor.shape) * np.dtype(np.int64).itemsize
    if tensor.parameters.binary_data_size != needed or len(binary) < needed:
        raise RefusedError(
            400,
            f"{tensor.name}: shape {tensor.shape} needs {needed} bytes; binary_data_size is "
            f"{tensor.parameters.binary_data_size}, and {len(binary)} bytes of the body are left",
        )
    return np.frombuffer(binary[:needed], dtype="<i8").reshape(tensor.shape)


def _ids_and_mask(tensors: dict[str, Ids]) -> tuple[Ids, Ids | None]:
    if "input_ids" not in tensors:
        raise RefusedError(400, "the input input_ids is missing")
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    # 0 for padding on the left, then 1, at least for the last token.
    if mask is not None and not (
        mask.shape == ids.shape
        and np.isin(mask, (0, 1)).all()
        and (np.diff(mask, axis=1) >= 0).all()
        and mask[:, -1].all()
    ):
        raise RefusedError(
            400,
            "attention_mask: it has to have the shape of input_ids, with 0 for padding on "
            "the left and 1 for tokens after it",
        )
    return ids, mask


def _written(inference: InferRequest, model: str, logits: Logits) -> Response:
    output: dict[str, Any] = {"name": "logits", "datatype": "FP32", "shape": list(logits.shape)}
    binary = logits.astype("<f4", copy=False).tobytes() if inference.binary_output else b""
    if inference.binary_output:
        output["parameters"] = {"binary_data_size": len(binary)}
    else:
        output["data"] = logits.ravel().tolist()
    head = {"model_name": model, "model_version": _VERSION, "outputs": [output]}
    if inference.id is not None:
        head["id"] = inference.id
    content = json.dumps(head).encode()
    if not inference.binary_output:
        return Response(content, media_type="application/json")
    return Response(
        content + binary,
        headers={_JSON_LENGTH: str(len(content))},
        media_type="application/octet-stream",
    )
