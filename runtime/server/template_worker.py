"""The process that renders a chat template, `python -m runtime.server.template_worker`.

A template can take any time and memory, so it runs here rather than in the server; `rendering`
starts this process and ends it.
"""

import resource
import sys

from runtime.server import template_messages as messages
from runtime.server.template_messages import Ready, Refused, Rendered, Reply
from runtime.server.templates import ChatTemplate
from thanos_deploy.errors import UsageError


def serve(characters: int, memory_bytes: int) -> None:
    """Render the conversations on standard input, one per line, until its end.

    Args:
        characters: longest prompt, in characters.
        memory_bytes: largest address space of this process, in bytes.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    first = messages.begin(sys.stdin.buffer.readline())
    template = ChatTemplate(first.source, first.tokens)
    _say(Ready())
    for line in sys.stdin.buffer:
        try:
            _say(Rendered(template.render(messages.conversation(line), most=characters)))
        except UsageError as error:
            _say(Refused(error.message))
        except MemoryError:
            _say(Refused("the model's chat template takes too much memory for these messages"))


def _say(what: Ready | Rendered | Refused) -> None:
    sys.stdout.buffer.write(messages.line(Reply(what)))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
