"""The messages of a conversation and the functions that a model may call, field by field."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from thanos_deploy.bundle.codec import loads

# Deepest nesting of a value of any form, because other code walks through it by recursion.
_LEVELS = 64


def _not_too_deep(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse a value that is nested deeper than `_LEVELS`."""
    level: list[Any] = [value]
    for _ in range(_LEVELS):
        level = [
            inner
            for part in level
            if isinstance(part, dict | list)
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
    if any(isinstance(part, dict | list) for part in level):
        raise ValueError(f"the value is nested more than {_LEVELS} levels deep")
    return value


def one_of(what: str) -> WrapValidator:
    """Return a validator whose error names the forms that a value may have."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"give {what}") from error

    return WrapValidator(validate)


# A JSON object of any form.
Object = Annotated[dict[str, Any], AfterValidator(_not_too_deep)]
Text = Annotated[str, Field(min_length=1)]
Nothing = Annotated[None, Field(description="Not supported.")]
Ignored = Annotated[Any, Field(description="Without effect.")]


# Maps names of fields to their neutral values, which ask for nothing.
Neutral = Mapping[str, Sequence[object]]


class Strict(BaseModel):
    """A part of a body in which every unknown field is refused, unless its value is neutral.

    Attributes:
        neutral: for fields, known or not, the values that ask for nothing but what is done anyway.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: value
            for name, value in given.items()
            if not (
                (value is None and name not in known)
                or any(_same(value, neutral) for neutral in cls.neutral.get(name, ()))
            )
        }


def _same(one: object, other: object) -> bool:
    """Whether two values are equal in JSON: 1 equals 1.0, and true is not a number."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class TextPart(Strict):
    """A part of a message, with text."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """The function of a call, and its arguments."""

    name: str
    arguments: str
    parsed_arguments: Ignored = None  # OpenAI's client adds it

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Self:
        try:
            given = loads(self.arguments or "{}")
        except ValueError as error:
            raise ValueError(f"arguments: not readable as JSON ({error})") from error
        if not isinstance(given, dict):
            raise ValueError("arguments: not a JSON object")
        _not_too_deep(given)
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
    content: Annotated[
        str | list[TextPart] | None,
        one_of("a text, or a list of parts that all have the type text"),
    ] = None
    name: str | None = None
    tool_call_id: str | None = None

    annotations: Ignored = None
    audio: Nothing = None
    function_call: Nothing = None
    parsed: Ignored = None  # OpenAI's client adds it
    refusal: Nothing = None
    tool_calls: list[ToolCall] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message for a chat template: one text, `system` for `developer`, no None."""
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
                        "arguments": loads(call.function.arguments or "{}"),
                    },
                }
                for call in self.tool_calls
            ]
        return message


class Function(Strict):
    """The description of a function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call: a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """The name of one of the functions."""

    name: str


class NamedTool(Strict):
    """The choice of the function that the model must call."""

    type: Literal["function"]
    function: FunctionName
