"""Messages between `rendering` and the process of a chat template, `template_worker`.

Each message is a line of JSON. The process sends one reply when it has compiled the template, and
then one to every conversation.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.server.templates import Conversation
from thanos_deploy.bundle.codec import decode, encode


@dataclass(frozen=True, slots=True)
class Begin:
    """The template to compile; see `ChatTemplate`."""

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
    """A reply of the process; its kind is known from the fields, which are different in each."""

    said: Ready | Rendered | Refused


def line(message: Begin | Conversation | Reply) -> bytes:
    """Encode a message as the line to send."""
    return json.dumps(encode(message)).encode() + b"\n"


def begin(line: bytes) -> Begin:
    """Decode the first message to the process."""
    return decode(Begin, json.loads(line))


def conversation(line: bytes) -> Conversation:
    """Decode a conversation to render."""
    return decode(Conversation, json.loads(line))


def reply(line: bytes) -> Ready | Rendered | Refused:
    """Decode a reply of the process."""
    return decode(Reply, json.loads(line)).said
