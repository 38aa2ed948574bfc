"""What `rendering` tells the process of a chat template, `template_worker`, and what that answers.

Each message is a line of JSON. The process answers once it has compiled the template, and then
every conversation.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.server.templates import Conversation
from thanos_deploy.bundle.codec import decode, encode


@dataclass(frozen=True, slots=True)
class Begin:
    """The template that is to be rendered; see `ChatTemplate`."""

    source: str
    tokens: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ready:
    """The template is compiled."""

    ready: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """The prompt that a conversation becomes."""

    prompt: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there is no prompt for a conversation."""

    refused: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; no two kinds have the same fields."""

    said: Ready | Rendered | Refused


def line(message: Begin | Conversation | Reply) -> bytes:
    """A message as the line that is sent."""
    return json.dumps(encode(message)).encode() + b"\n"


def begin(line: bytes) -> Begin:
    """The message with which the process begins."""
    return decode(Begin, json.loads(line))


def conversation(line: bytes) -> Conversation:
    """A conversation that is to be rendered."""
    return decode(Conversation, json.loads(line))


def reply(line: bytes) -> Ready | Rendered | Refused:
    """The answer in a line."""
    return decode(Reply, json.loads(line)).said
