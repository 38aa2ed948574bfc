"""Rows of data sets as texts: the supported fields, and how a conversation becomes a text.

A row is an object with fields. Its text is in the field that the user names. If that is missing, it
is a conversation (`messages`, or ShareGPT's `conversations`), or a `prompt` and its `completion`.
A conversation becomes text through the model's own chat template.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A chat template: maps the messages, {"role": ..., "content": ...} each, to the text.
Template = Callable[[Sequence[Mapping[str, str]]], str]

_MESSAGES = ("messages", "conversations")
_PROMPT, _COMPLETION = "prompt", "completion"

# ShareGPT's names of the roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}

_JSON_TYPES = {bool: "a truth value", int: "a number", float: "a number", list: "a list"}


class RowError(ValueError):
    """A row has no text.

    Attributes:
        said: what the row has instead.
        fix: what the user can do.
    """

    def __init__(self, said: str, fix: str) -> None:
        super().__init__(said)
        self.said, self.fix = said, fix


def text_of(row: object, field: str, template: Template | None) -> str:
    """Return the text of a row.

    Args:
        row: the decoded row, of any JSON type.
        field: name of the field that holds the text, or a conversation.
        template: the model's chat template; None if it has none.

    Raises:
        RowError: the row has no text.
    """
    if not isinstance(row, dict):
        raise RowError(
            f"no text field {field!r}: the row is of type {type(row).__name__}, not an object",
            "give rows that are JSON objects, and name the field that holds the text with "
            "--text-field",
        )
    if field in row:
        value = row[field]
        return _conversation(value, template) if _is_conversation(value) else _text(field, value)
    for name in _MESSAGES:
        if name in row and _is_conversation(row[name]):
            return _conversation(row[name], template)
    if _PROMPT in row and _COMPLETION in row:
        prompt, completion = row[_PROMPT], row[_COMPLETION]
        if _is_conversation(prompt) and _is_conversation(completion):
            return _conversation([*prompt, *completion], template)
        return _text(_PROMPT, prompt) + _text(_COMPLETION, completion)
    raise RowError(
        f"no text field {field!r}; found {', '.join(row) or 'none'}",
        "name the field that holds the text, or the messages of a conversation, with --text-field",
    )


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _conversation(messages: Sequence[Mapping[str, Any]], template: Template | None) -> str:
    if template is None:
        raise RowError(
            "the row is a conversation, and the model has no chat template to turn it into a text",
            "give rows with a text, or use a model with a chat template",
        )
    return template([_message(number, one) for number, one in enumerate(messages, start=1)])


def _message(number: int, message: Mapping[str, Any]) -> Mapping[str, str]:
    """Return a message with the field and role names that chat templates expect."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(
            f"message {number} has neither the fields role and content nor the fields from "
            f"and value with texts; found {', '.join(message) or 'nothing'}",
            "remove or correct such rows",
        )
    return {"role": _ROLES.get(role, role), "content": _text("content", content)}


def _text(field: str, value: object) -> str:
    if problem := _no_text(value):
        raise RowError(
            f"the field {field!r} {problem}",
            "remove or correct such rows, or name another field with --text-field",
        )
    assert isinstance(value, str)
    return value


def _no_text(value: object) -> str:
    """Describe why a field's value is not a text, for a message; empty if it is one."""
    if value is None:
        return "is null, not a text"
    if not isinstance(value, str):
        what, shown = _JSON_TYPES.get(type(value), "an object"), json.dumps(value, default=str)
        return f"is {what}, not a text: {shown if len(shown) <= 60 else f'{shown[:60]}...'}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"has half of a surrogate pair, {value[error.start]!a}, which is not a character"
    return ""
