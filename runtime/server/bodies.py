"""The bodies of requests to OpenAI's routes, field by field.

What OpenAI's API reference defines and this server cannot do is accepted only with a value that
asks for nothing; what it does not define is refused, as OpenAI's own servers do, unless it is null.
Fields that are not OpenAI's are vLLM's, under the names that they have there.
"""

import secrets
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from runtime.sampling import Sampling
from runtime.server import tools
from runtime.server.asked import Asked
from runtime.server.formats import Formed
from runtime.server.messages import (
    FunctionName,
    Ignored,
    Message,
    NamedTool,
    Nothing,
    Strict,
    Text,
    Tool,
)
from runtime.server.templates import Conversation

_INT64 = 1 << 63

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Strict):
    """What a stream has beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


# Values with which a field of OpenAI's or vLLM's asks for nothing that is not done anyway.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "detokenize": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop": ("",),
    "suffix": ("",),
    "top_k": (-1,),
    "use_beam_search": (False,),
}

# Of OpenAI's, and not done here: refused in these words, unless the value asks for nothing.
UNSUPPORTED = frozenset(
    {
        *("suffix", "best_of", "audio", "function_call", "functions", "modalities"),
        *("prediction", "length_penalty"),
    }
)


class Generation(Formed):
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

    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = None

    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=300)] | None = None
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
    def include_usage(self) -> bool:
        """A stream is to end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _the_least_is_no_more_than_the_most(self) -> Self:
        if self.min_tokens and self.new_tokens is not None and self.min_tokens > self.new_tokens:
            raise ValueError("min_tokens is more than the most tokens of an answer")
        return self

    @model_validator(mode="after")
    def _biases_are_for_ids(self) -> Self:
        if not all(token.isascii() and token.isdecimal() for token in self.logit_bias or ()):
            raise ValueError("logit_bias: its keys are ids of tokens, in decimal digits")
        return self

    @property
    def new_tokens(self) -> int | None:
        """The most of each answer; None for the usual."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many log probabilities are wanted beside each token's; None for none at all."""
        raise NotImplementedError

    usual_tokens: ClassVar[int | None] = None  # as many as there is room for

    def asked(self) -> Asked:
        """What is asked for beside the prompt."""
        return Asked(
            copies=self.n or 1,
            new_tokens=self.new_tokens,
            usual_tokens=self.usual_tokens,
            min_tokens=self.min_tokens or 0,
            sampling=self._sampling(),
            bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            alternatives=self.alternatives,
        )

    def _sampling(self) -> Sampling:
        """How to choose; without a seed, at random."""
        given = {
            option.name: value
            for option in fields(Sampling)
            if option.name not in ("temperature", "seed")
            and (value := getattr(self, option.name)) is not None
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
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    best_of: Literal[1] | None = None
    suffix: Nothing = None

    usual_tokens: ClassVar[int | None] = 16  # OpenAI's default

    @model_validator(mode="after")
    def _an_answer_has_something(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is for requests with echo: true")
        return self

    @property
    def alternatives(self) -> int | None:
        """See `Generation`."""
        return self.logprobs

    def asked(self) -> Asked:
        """See `Generation`."""
        return replace(super().asked(), echo=bool(self.echo))

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


class Chat(Strict):
    """A conversation, and how it is to be written down."""

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    allow_special_tokens: bool | None = None  # not vLLM's, which always allows them

    @model_validator(mode="after")
    def _one_of_the_two_ends(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError(
                "add_generation_prompt begins another message, and continue_final_message does not"
            )
        return self

    @property
    def offers(self) -> list[dict[str, Any]]:
        """The functions that the model may call, as chat templates expect them."""
        return []

    def conversation(self) -> Conversation:
        """What the chat template is given."""
        return Conversation(
            messages=[message.for_template() for message in self.messages],
            begin=self.add_generation_prompt is not False and not self.continue_final_message,
            go_on=bool(self.continue_final_message),
            variables=self.chat_template_kwargs or {},
        )


class TokenizeText(Strict):
    """The body of POST /tokenize for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeConversation(Chat):
    """The body of POST /tokenize for a conversation."""

    model: str | None = None
    return_token_strs: bool | None = None


class Detokenize(Strict):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[Id]


class ChatRequest(Generation, Chat):
    """The body of POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    audio: Nothing = None
    function_call: Nothing = None
    functions: Nothing = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    metadata: Ignored = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def new_tokens(self) -> int | None:
        """See `Generation`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """See `Generation`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _the_tool_that_is_named_is_there(self) -> Self:
        if isinstance(self.tool_choice, NamedTool) and not self._offered():
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name!r}")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice: required needs tools")
        return self

    @property
    def offers(self) -> list[dict[str, Any]]:
        """See `Chat`."""
        return [tool.model_dump(exclude_none=True) for tool in self._offered()]

    def _offered(self) -> list[Tool]:
        tools = self.tools or []
        match self.tool_choice:
            case "none":
                return []
            case NamedTool(function=FunctionName(name=name)):
                return [tool for tool in tools if tool.function.name == name]
            case _:
                return tools

    def forms(self) -> list[Callable[[], str]]:
        """See `Formed`."""
        forms = super().forms()
        if not (offers := self.offers):
            return forms
        named = isinstance(self.tool_choice, NamedTool)
        required = named or self.tool_choice == "required"
        if forms and not required:
            return forms  # an answer of that form calls nothing
        most = 1 if named or self.parallel_tool_calls is False else None
        return [*forms, partial(tools.grammar, offers, required=required, most=most)]
