"""The responses of OpenAI's routes, field by field."""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Numbers of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Natural logarithms of probabilities, token by token.

    A token that is no text by itself, such as half a character, is called token_id:NUMBER. The
    first token of a prompt has null, because nothing precedes it.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The response of POST /v1/completions, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Logprob(BaseModel):
    """A token and the natural logarithm of its probability.

    A token that is no text by itself, such as half a character, is called token_id:NUMBER and has
    no bytes.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Logprob):
    """A token of the answer, and the likeliest tokens in its place."""

    top_logprobs: list[Logprob]


class ChatLogprobs(BaseModel):
    """Log probabilities, token by token."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """A function, and its arguments in JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolCallDelta(ToolCall):
    """A call of a function within a stream.

    Attributes:
        index: index of the call within its answer.
    """

    index: int


class Answer(BaseModel):
    """The message of the model."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class Delta(BaseModel):
    """The new part of an answer; fields without anything new are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """Each event of the stream of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["thanos-deploy"] = "thanos-deploy"
    max_model_len: int


class Models(BaseModel):
    """The models that are served: one, under each of its names."""

    object: Literal["list"] = "list"
    data: list[Model]
