"""The messages of a conversation and the functions that a model may call, field by field."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Nothing = Annotated[None, Field(description="Not supported.")]
Ignored = Annotated[Any, Field(description="Without effect.")]


class Strict(BaseModel):
    """A part of a body in which every field is known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A function that was called."""

    name: str
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Self:
        try:
            given = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"arguments: not readable as JSON ({error})") from error
        if not isinstance(given, dict):
            raise ValueError("arguments: JSON of an object")
        return self


class ToolCall(Strict):
    """A call that a model made."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: Ignored = None


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    annotations: Ignored = None
    audio: Nothing = None
    function_call: Nothing = None
    refusal: Nothing = None
    tool_calls: list[ToolCall] | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: one text, `system` for `developer`, nothing that is None."""
        message = self.model_dump(include={"role", "name", "tool_call_id"}, exclude_none=True)
        if self.role == "developer":
            message["role"] = "system"
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        elif self.content is not None:
            message["content"] = self.content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments or "{}"),
                    },
                }
                for call in self.tool_calls
            ]
        return message


class Function(Strict):
    """What a model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Of one of the functions."""

    name: str


class NamedTool(Strict):
    """The function that is to be called."""

    type: Literal["function"]
    function: FunctionName
