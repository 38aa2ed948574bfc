"""The fields of OpenAI and vLLM for the form that an answer must have."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from runtime import grammars
from runtime.server.messages import Neutral, Object, Strict, Text
from thanos_deploy.bundle.codec import loads


class JsonSchema(Strict):
    """A schema and its name."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[Object | None, Field(alias="schema")] = None
    strict: bool | None = None


class PlainFormat(Strict):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(Strict):
    """vLLM's ways to give the form of an answer, of which a request may use one."""

    neutral: ClassVar[Neutral] = dict.fromkeys(
        ("disable_additional_properties", "disable_any_whitespace", "disable_fallback"), (False,)
    )

    json_: Annotated[Object | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Formed(Strict):
    """The fields of a request for the form of its answers."""

    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    guided_json: Object | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _an_answer_has_one_form(self) -> Self:
        if len(self.forms()) > 1:
            raise ValueError(
                "the request gives more than one form for the answer; give only one of "
                "response_format and the guided fields"
            )
        return self

    def grammar(self) -> Callable[[], str] | None:
        """Return a function that makes the grammar of the answer; None for any text."""
        forms = self.forms()
        return forms[0] if forms else None

    def forms(self) -> list[Callable[[], str]]:
        """Return functions that make a grammar, one for every field that gives a form."""
        other = self.structured_outputs or StructuredOutputs()
        forms: list[Callable[[], str]] = []
        match self.response_format:
            case PlainFormat(type="json_object"):
                forms.append(partial(grammars.of_schema, {"type": "object"}))
            case SchemaFormat(json_schema=form):
                forms.append(partial(grammars.of_schema, form.schema_ or {}))
        for schema in (self.guided_json, other.json_):
            if schema is not None:
                forms.append(partial(_of_schema, schema))
        for regex in (self.guided_regex, other.regex):
            if regex is not None:
                forms.append(partial(grammars.of_regex, regex))
        for choice in (self.guided_choice, other.choice):
            if choice is not None:
                forms.append(partial(grammars.of_choice, choice))
        for grammar in (self.guided_grammar, other.grammar):
            if grammar is not None:
                forms.append(partial(grammars.of_grammar, grammar))
        if other.json_object:
            forms.append(partial(grammars.of_schema, {"type": "object"}))
        return forms


def _of_schema(schema: dict[str, Any] | str) -> str:
    read = loads(schema) if isinstance(schema, str) else schema
    if not isinstance(read, dict):
        raise ValueError("a schema has to be a JSON object")
    return grammars.of_schema(read)
