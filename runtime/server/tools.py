"""Functions that a model may call: how they are described to it, and how its calls are read.

A call is written as models of the Hermes and Qwen families are trained to:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A chat template that takes tools describes the functions in its own words. For any other template, a
system message describes them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.grammars import json_within
from runtime.server.templates import Conversation
from thanos_deploy.bundle.codec import loads

_BEGIN, _END = "<tool_call>", "</tool_call>"

# Schema of the arguments of a function that has no schema.
_ANY: Mapping[str, Any] = {"type": "object"}

# Most calls in one answer to a request that requires calls.
_MOST_CALLS = 8


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model calls.

    Attributes:
        name: name of the function.
        arguments: the arguments, as JSON.
    """

    name: str
    arguments: str


def offered(
    conversation: Conversation, tools: Sequence[Mapping[str, Any]], *, native: bool
) -> Conversation:
    """Return a conversation that tells the model of functions, and of the calls so far.

    Args:
        conversation: the conversation to render; the arguments of its calls are objects.
        tools: the functions, as OpenAI's API describes them.
        native: the chat template takes tools.
    """
    if native:
        return replace(conversation, tools=tools or None)
    messages = [_written(message) for message in conversation.messages]
    if tools:
        told = "\n".join(
            [
                "You can call functions. Each of the next lines describes one:",
                *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools),
                "To call one, write its name and its arguments like this:",
                f'{_BEGIN}\n{{"name": "NAME", "arguments": {{}}}}\n{_END}',
                "The next message then has the result.",
            ]
        )
        if messages and messages[0]["role"] == "system":
            first, *messages = messages
            told = f"{first.get('content') or ''}\n\n{told}"
        messages = [{"role": "system", "content": told}, *messages]
    return replace(conversation, messages=messages)


def _written(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its calls written into its text."""
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [
        f"{_BEGIN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{_END}"
        for call in message.get("tool_calls", ())
    ]
    if calls:
        plain["content"] = "\n".join(filter(None, [message.get("content"), *calls]))
    return plain


def grammar(tools: Sequence[Mapping[str, Any]], *, required: bool, most: int | None = None) -> str:
    """Return the grammar of answers that call functions.

    Args:
        tools: the functions, as OpenAI's API describes them.
        required: the answer consists of calls only; otherwise it may have text and calls.
        most: 1 for at most one call; None for several.
    """
    bodies = [
        json.dumps(f'{{"name": {json.dumps(tool["function"]["name"])}, "arguments": ')
        + f" {json_within(tool['function'].get('parameters', _ANY))} "
        + '"}"'
        for tool in tools
    ]
    rules = [f"body_{number}: {body}" for number, body in enumerate(bodies)]
    names = " | ".join(f"body_{number}" for number in range(len(bodies)))
    rules.append(f"inner: {json.dumps(chr(10))} ({names}) {json.dumps(chr(10) + _END)}")
    if required:
        calls = most or _MOST_CALLS
        more = f' ("\\n" call){{0,{calls - 1}}}' if calls > 1 else ""
        return "\n".join([f"start: call{more}", f"call: {json.dumps(_BEGIN)} inner", *rules])
    times = "?" if most == 1 else "*"
    text = "TEXT: /(.|\\n)*/"
    return "\n".join(
        [
            f"start: call{times} rest",
            "rest: TEXT",
            text,
            f"begin[lazy]: TEXT {json.dumps(_BEGIN)}",
            "call: begin inner",
            *rules,
        ]
    )


class Calls:
    """Reads an answer as it comes: text, and calls of functions, each as soon as it is complete."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Add text, and return what is certain now: text outside of calls, and complete calls."""
        self._held += text
        plain, calls = "", []
        while (begin := self._held.find(_BEGIN)) >= 0:
            end = self._held.find(_END, begin)
            if end < 0:
                break
            if (call := _read(self._held[begin + len(_BEGIN) : end])) is None:
                plain += self._held[: end + len(_END)]
            else:
                plain += self._held[:begin]
                calls.append(call)
            self._held = self._held[end + len(_END) :].removeprefix("\n")
        keep = len(self._held) - begin if begin >= 0 else _doubtful(self._held)
        plain += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return plain, calls

    def finish(self) -> str:
        """Return what was held back, at the end of an answer: it is text after all."""
        held, self._held = self._held, ""
        return held


def _read(text: str) -> Call | None:
    """Parse a call; return None if the text is not a valid one."""
    try:
        content = loads(text)
        name, arguments = content["name"], content["arguments"]
    except (ValueError, TypeError, KeyError):
        return None
    return Call(str(name), json.dumps(arguments, ensure_ascii=False))


def _doubtful(text: str) -> int:
    """Return how many characters at the end of a text may begin a call."""
    return max(
        (length for length in range(1, len(_BEGIN)) if text.endswith(_BEGIN[:length])), default=0
    )
