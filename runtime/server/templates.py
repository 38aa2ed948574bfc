"""Chat templates: messages in, the prompt out, as transformers' `apply_chat_template` writes it.

The server renders them in a process of its own: see `runtime.server.rendering`.

The environment (sandbox, whitespace, extra functions) is described in the documentation of
transformers, "Writing a chat template". Templates come with the model; nothing that they do can
leave the sandbox, and what they refuse is an error of whoever sent the messages.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thanos_deploy.errors import UsageError

# Marks a place in a text; no text of Unicode's assigned characters has it.
_END = "\ufdd0end\ufdd1"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is to be written down.

    Attributes:
        messages: with `role` and `content`.
        begin: the beginning of the answer follows them.
        go_on: the last of them is not ended, so that the answer goes on with it.
        tools: functions that the model may call, as OpenAI's API describes them; None for none.
        variables: whatever else the template understands.
    """

    messages: Sequence[Mapping[str, Any]]
    begin: bool = True
    go_on: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """How a model wants a conversation written down.

    Attributes:
        source: of the template.
        tokens: special tokens by the names that templates have for them.
        takes_tools: it describes functions that the model may call.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the template.
            tokens: special tokens by the names that templates have for them, such as `bos_token`.

        Raises:
            jinja2.TemplateSyntaxError: it is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        self.source = source
        self.tokens = dict(tokens)

    def render(self, conversation: Conversation, *, most: int | None = None) -> str:
        """The prompt.

        Args:
            conversation: what to write down.
            most: characters that it may have; None for any number.

        Raises:
            UsageError: the template does not take such messages, or makes more of them.
        """
        messages = list(conversation.messages)
        if conversation.go_on:
            # The template may strip a text, so its end has to be marked.
            last = messages[-1]
            messages[-1] = {**last, "content": f"{last.get('content') or ''}{_END}"}
        try:
            parts, length = [], 0
            for part in self._template.generate(
                **{
                    **conversation.variables,
                    "messages": messages,
                    "tools": None if conversation.tools is None else list(conversation.tools),
                    "documents": None,
                    "add_generation_prompt": conversation.begin,
                    **self.tokens,
                }
            ):
                parts.append(part)
                length += len(part)
                if most is not None and length > most:
                    raise ValueError(f"the rendered prompt has more than {most} characters")
            text = "".join(parts)
            if not conversation.go_on:
                return text
            before, found, _ = text.rpartition(_END)
            if not found:
                raise ValueError(
                    "the template leaves out the last message, which has to be continued"
                )
            return before
        # A template runs what its author wrote: a TypeError is as likely as a TemplateError.
        except Exception as error:
            raise UsageError(
                f"the model's chat template does not accept these messages: {error}",
                fix="send the roles that the model was trained with, in the order that it was "
                "trained with",
            ) from error


class _Generation(Extension):
    """`{% generation %}` around what the model is to learn: without meaning for a prompt."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike Jinja's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
