"""The requests and responses of OpenAI's routes, field by field.

What OpenAI's API reference defines and this server cannot do is accepted only with a value that
asks for nothing; what it does not define is refused, as OpenAI's own servers do, unless it is null.
Four fields are not OpenAI's: `top_k`, `min_p`, `repetition_penalty` and `ignore_eos`, as vLLM has
them.
"""

import secrets
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.sampling import Sampling

_INT64 = 1 << 63

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[str, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0, description="Not supported but for 0.")]
Nothing = Annotated[None, Field(description="Not supported.")]
Ignored = Annotated[Any, Field(description="Without effect.")]
FinishReason = Literal["stop", "length"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream has beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


# Values with which a field of OpenAI's or vLLM's asks for nothing that is not done anyway.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (True,),
    "detokenize": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop": ("",),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "top_k": (-1,),
    "use_beam_search": (False,),
}

# Of OpenAI's, and not done here: refused in these words, unless the value asks for nothing.
UNSUPPORTED = frozenset(
    {
        *("frequency_penalty", "presence_penalty", "logit_bias", "echo", "suffix", "best_of"),
        *("audio", "function_call", "functions", "modalities", "response_format", "tool_choice"),
        *("tools", "prediction", "stop_token_ids", "min_tokens", "length_penalty"),
    }
)


class Generation(_Strict):
    """What both routes for text understand."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: Ignored = None

    # vLLM's, without effect on what is answered.
    cache_salt: Ignored = None
    priority: Ignored = None
    request_id: Ignored = None
    spaces_between_special_tokens: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _what_asks_for_nothing_is_left_out(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = cls.model_fields.keys()
        return {
            name: value
            for name, value in given.items()
            if not (
                (value is None and name not in known)
                or any(
                    value == neutral and type(value) is type(neutral)
                    for neutral in _NEUTRAL.get(name, ())
                )
            )
        }

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for requests with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """A stream is to end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """How to choose; without a seed, at random."""
        given = {
            name: value
            for name in ("top_k", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            seed=secrets.randbits(63) if self.seed is None else self.seed % (2 * _INT64),
            **given,
        )


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Nothing = None

    usual_tokens: ClassVar[int | None] = 16  # OpenAI's default

    @property
    def new_tokens(self) -> int | None:
        """The most of each answer; None for the usual."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many log probabilities are wanted beside each token's; None for none at all."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, as text or as ids."""
        match self.prompt:
            case [int(), *_]:
                return [self.prompt]  # type: ignore[list-item]  # a list of ids is one prompt
            case list():
                return self.prompt  # type: ignore[return-value]
            case _:
                return [self.prompt]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    annotations: Ignored = None
    audio: Nothing = None
    function_call: Nothing = None
    refusal: Nothing = None
    tool_calls: Nothing = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: one text, `system` for `developer`, nothing that is None."""
        message = self.model_dump(include={"role", "name", "tool_call_id"}, exclude_none=True)
        if self.role == "developer":
            message["role"] = "system"
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        elif self.content is not None:
            message["content"] = self.content
        return message


class ResponseFormat(_Strict):
    """The form of an answer."""

    type: Literal["text"]


class ChatRequest(Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    audio: Nothing = None
    function_call: Nothing = None
    functions: Nothing = None
    modalities: list[Literal["text"]] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    usual_tokens: ClassVar[int | None] = None  # as many as there is room for

    @property
    def new_tokens(self) -> int | None:
        """The most of each answer; None for the usual."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many log probabilities are wanted beside each token's; None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Natural logarithms of probabilities, token by token.

    A token that is no text by itself, such as half a character, is called token_id:NUMBER.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answer of POST /v1/completions, and what its stream has in each event."""

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
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[Logprob]


class ChatLogprobs(BaseModel):
    """Log probabilities, token by token."""

    content: list[TokenLogprob]
    refusal: None = None


class Answer(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class Delta(BaseModel):
    """What is new in an answer; only what is new is sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """What the stream of POST /v1/chat/completions has in each event."""

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
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[Model]
