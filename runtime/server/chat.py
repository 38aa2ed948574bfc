"""Chat templates: messages in, the prompt out, as transformers' `apply_chat_template` writes it.

The environment (sandbox, whitespace, extra functions) is described in the documentation of
transformers, "Writing a chat template". Templates come with the model; nothing that they do can
leave the sandbox, and what they refuse is an error of whoever sent the messages.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.text import verify_texts
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.model import tokenizer_files


class ChatTemplate:
    """How a model wants a conversation written down."""

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
        self._tokens = dict(tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, as far as the beginning of the answer.

        Args:
            messages: with `role` and `content`.

        Raises:
            UsageError: the template does not take such messages.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        # A template runs what its author wrote: a TypeError is as likely as a TemplateError.
        except Exception as error:
            raise UsageError(
                f"the model's chat template does not take these messages: {error}",
                fix="send the roles, and the order of them, that the model was trained with",
            ) from error


def open_chat_template(bundle: Path, *, verify: bool = True) -> ChatTemplate | None:
    """The chat template of a bundle; None if its tokenizer has none.

    Args:
        bundle: its folder.
        verify: compare the files with the hashes in the manifest first.

    Raises:
        InputError: it is not readable.
        IntegrityError: a file was changed.
    """
    opened = Bundle.open(bundle)
    if verify:
        verify_texts(opened, templates=True)
    model = bundle / "model"
    try:
        source = tokenizer_files.chat_template(model)
        return (
            None if source is None else ChatTemplate(source, tokenizer_files.special_tokens(model))
        )
    except (ValueError, TypeError, AttributeError, KeyError, jinja2.TemplateError) as error:
        raise InputError(
            f"{model}: not a readable chat template ({type(error).__name__}: {error})",
            fix="repair it in the model that the bundle was made from, and make the bundle again",
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
