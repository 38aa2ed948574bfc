"""Chat templates: messages in, the prompt out, as transformers' `apply_chat_template` writes it.

The server renders them in a process of its own: see `runtime.server.rendering`.

The environment (sandbox, whitespace, extra functions) is described in the documentation of
transformers, "Writing a chat template". Templates come with the model, so they run in a sandbox of
Jinja. An exception of a template counts as an error in the client's messages.
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

# Marks the end of a text; has noncharacters of Unicode, which ordinary text does not contain.
_END = "\ufdd0end\ufdd1"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to render.

    Attributes:
        messages: messages with `role` and `content`.
        begin: add the beginning of the answer after the last message.
        go_on: leave the last message open, so that the answer continues it.
        tools: functions that the model may call, as OpenAI's API describes them; None for none.
        variables: further variables for the template.
    """

    messages: Sequence[Mapping[str, Any]]
    begin: bool = True
    go_on: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """The template with which a model's conversations are rendered.

    Attributes:
        source: source of the template.
        tokens: maps the names that templates use, such as `bos_token`, to special tokens.
        takes_tools: the template describes functions that the model may call.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: source of the template.
            tokens: maps the names that templates use, such as `bos_token`, to special tokens.

        Raises:
            jinja2.TemplateSyntaxError: the source is not a valid template.
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
        """Return the prompt of a conversation.

        Args:
            conversation: the conversation to render.
            most: longest prompt, in characters; None for any length.

        Raises:
            UsageError: the template does not accept these messages, or the prompt is too long.
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
    """The tag `{% generation %}` around text to train on, which has no effect on a prompt."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Convert to JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
