"""Render a chat template in a process of its own, with limits of time and memory.

A template is a program that came with the model. The sandbox of Jinja limits what it can access,
but not its time and memory, so its process has limits for both. The process is killed when a
conversation takes too long, and started again for the next one.
"""

import subprocess
import sys
import threading

from runtime.server import template_messages as messages
from runtime.server.template_messages import Begin, Ready, Refused, Rendered
from runtime.server.templates import ChatTemplate, Conversation
from thanos_deploy.errors import UsageError

# Limits of a conversation, of the start, of a prompt and of the process. A long conversation takes
# milliseconds and a megabyte.
SECONDS, _START_SECONDS = 5.0, 60.0
_CHARACTERS = 16 << 20
_MEMORY_BYTES = 1 << 30


class Rendering:
    """The process that renders one template; it starts with the first conversation."""

    def __init__(self, template: ChatTemplate) -> None:
        self._begin = Begin(template.source, template.tokens)
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, conversation: Conversation, seconds: float | None = None) -> str:
        """Return the prompt of a conversation.

        Args:
            conversation: the conversation to render.
            seconds: time limit; None for `SECONDS`.

        Raises:
            UsageError: the template does not accept these messages, or exceeds its limits.
        """
        process = self._process or self._start()
        match _ask(process, conversation, SECONDS if seconds is None else seconds):
            case Rendered(prompt):
                return prompt
            case Refused(why):
                raise UsageError(
                    why,
                    fix="send the roles that the model was trained with, in the order that it "
                    "was trained with",
                )
            case _:
                self.close()
                raise UsageError(
                    "the model's chat template exceeded a limit of time or memory "
                    f"({SECONDS:g} s for one conversation), or crashed",
                    fix="send shorter messages, or use /v1/completions",
                )

    def close(self) -> None:
        """Kill the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",  # nothing is imported from the current folder
                "-m",
                "runtime.server.template_worker",
                str(_CHARACTERS),
                str(_MEMORY_BYTES),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # The start takes a while on a busy machine; this time does not count for a conversation.
        if _ask(self._process, self._begin, _START_SECONDS) is None:
            self.close()
            raise RuntimeError("the process for the chat template did not start")
        return self._process


def _ask(
    process: "subprocess.Popen[bytes]", message: Begin | Conversation, seconds: float
) -> Ready | Rendered | Refused | None:
    """Send a message to the process, and return its reply.

    Returns:
        the reply; None if the process crashed, or was killed because the time was over.
    """
    assert process.stdin
    assert process.stdout
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        process.stdin.write(messages.line(message))
        process.stdin.flush()
        line = process.stdout.readline()
    except (BrokenPipeError, ValueError):  # a closed pipe
        return None
    finally:
        timer.cancel()
    return messages.reply(line) if line.endswith(b"\n") else None
