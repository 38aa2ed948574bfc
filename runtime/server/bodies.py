"""The bodies of requests to OpenAI's routes, field by field.

A field that OpenAI's API reference defines, but this server does not support, is accepted only with
a neutral value, which asks for nothing. A field that it does not define is refused, as OpenAI's own
servers do, unless it is null. Fields that are not OpenAI's are vLLM's, under the same names.
"""

import re
import secrets
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from runtime.sampling import Sampling
from runtime.server import tools
from runtime.server.answer_options import AnswerOptions
from runtime.server.formats import Formed
from runtime.server.messages import (
    FunctionName,
    Ignored,
    Message,
    NamedTool,
    Neutral,
    Nothing,
    Object,
    Strict,
    Text,
    Tool,
    one_of,
)
from runtime.server.templates import Conversation

_INT64 = 1 << 63

T = TypeVar("T")

# A list of one or more items; validation stops at the first item that is wrong.
Many = Annotated[list[T], Field(min_length=1, fail_fast=True)]

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Strict):
    """What a stream contains beside the answer."""

    neutral: ClassVar[Neutral] = {"continuous_usage_stats": (False,)}

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


# Fields of OpenAI and vLLM that this server does not support. The error says so, unless the value
# is neutral.
UNSUPPORTED = frozenset(
    {
        *("allowed_token_ids", "audio", "bad_words", "best_of", "chat_template", "documents"),
        *("function_call", "functions", "guided_decoding_backend", "guided_whitespace_pattern"),
        *("kv_transfer_params", "length_penalty", "logits_processors", "mm_processor_kwargs"),
        *("modalities", "prediction", "prompt_logprobs", "reasoning_effort", "structural_tag"),
        *("suffix", "truncate_prompt_tokens", "use_beam_search", "verbosity", "vllm_xargs"),
        "web_search_options",
    }
)


class Generation(Formed):
    """The fields that both routes for text understand."""

    neutral: ClassVar[Neutral] = {
        "bad_words": ([],),
        "detokenize": (True,),
        "include_stop_str_in_output": (False,),
        "kv_transfer_params": ({},),
        "length_penalty": (1,),
        "logits_processors": ([],),
        "logprobs": (False,),
        "mm_processor_kwargs": ({},),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "skip_special_tokens": (True,),
        "stop": ("",),
        "suffix": ("",),
        "top_k": (-1,),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
    }

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[
        Text | Annotated[list[Text], Field(max_length=4)] | None,
        one_of("a text, or a list of at most four texts"),
    ] = None
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

    # Fields of vLLM that have no effect on the answer.
    cache_salt: Ignored = None
    priority: Ignored = None
    request_id: Ignored = None
    spaces_between_special_tokens: Ignored = None

    @field_validator("stop", mode="before")
    @classmethod
    def _an_empty_text_stops_nothing(cls, given: object) -> object:
        return [text for text in given if text != ""] if isinstance(given, list) else given

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Self:
        if self.include_usage and not self.stream:
            raise ValueError("stream_options need stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream is to end with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _require_min_tokens_to_fit(self) -> Self:
        if self.min_tokens and self.new_tokens is not None and self.min_tokens > self.new_tokens:
            raise ValueError("min_tokens is larger than the largest number of tokens of the answer")
        return self

    @model_validator(mode="after")
    def _biases_are_for_ids(self) -> Self:
        # No id has more digits, and Python does not parse a number of thousands of digits.
        if not all(re.fullmatch("[0-9]{1,10}", token) for token in self.logit_bias or ()):
            raise ValueError("logit_bias: the keys have to be token ids in decimal digits")
        return self

    @property
    def new_tokens(self) -> int | None:
        """Largest number of tokens of each answer; None for `usual_tokens`."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of log probabilities to report beside each token's own; None for none at all."""
        raise NotImplementedError

    usual_tokens: ClassVar[int | None] = None  # as many as there is room for

    def answer_options(self) -> AnswerOptions:
        """Return the options for generation."""
        return AnswerOptions(
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
        """Return how to choose the tokens; without a seed in the request, the seed is random."""
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

    prompt: Annotated[
        str | Many[str] | Many[Id] | Many[Many[Id]],
        one_of(
            "a text or a list of texts, or a list of token ids (whole numbers from 0 on) or a "
            "list of such lists"
        ),
    ]
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None

    best_of: int | None = None
    suffix: Nothing = None

    usual_tokens: ClassVar[int | None] = 16  # OpenAI's default

    @field_validator("best_of")
    @classmethod
    def _require_best_of_n(cls, given: int | None, info: ValidationInfo) -> int | None:
        if given not in (None, 1, info.data.get("n")):
            raise ValueError("best_of has to be 1 or equal to n")
        return given

    @model_validator(mode="after")
    def _require_tokens_or_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo: true")
        return self

    @property
    def alternatives(self) -> int | None:
        """See `Generation`."""
        return self.logprobs

    def answer_options(self) -> AnswerOptions:
        """See `Generation`."""
        return replace(super().answer_options(), echo=bool(self.echo))

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
    """A conversation, and how to render it."""

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Object | None = None
    allow_special_tokens: bool | None = None  # not a field of vLLM, which always allows them

    @model_validator(mode="after")
    def _one_of_the_two_ends(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError(
                "add_generation_prompt begins a new message and continue_final_message "
                "continues the last one; only one of the two can be true"
            )
        return self

    @property
    def offers(self) -> list[dict[str, Any]]:
        """The functions that the model may call, as chat templates expect them."""
        return []

    def conversation(self) -> Conversation:
        """Return the input of the chat template."""
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

    neutral: ClassVar[Neutral] = {
        **Generation.neutral,
        "documents": ([],),
        "echo": (False,),
        "function_call": ("auto", "none"),
        "functions": ([],),
        "include_reasoning": (True, False),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
    }

    add_special_tokens: Literal[False] | None = None  # the chat template writes them
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    audio: Nothing = None
    function_call: Nothing = None
    functions: Nothing = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        one_of("none, auto, required, or an object that names a function"),
    ] = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    metadata: Ignored = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
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
            return forms  # an answer of that form has no calls
        most = 1 if named or self.parallel_tool_calls is False else None
        return [*forms, partial(tools.grammar, offers, required=required, most=most)]
