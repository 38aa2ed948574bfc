"""Real servers of a small random model, each in a thread, and an engine that can be held up."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from runtime.engine import Ids, Logits, open_slots
from runtime.server import listening, main
from runtime.server.access import Access, Keys
from runtime.server.service import Limits, Service
from tests.bundles import add_to_model

TEMPLATE = """\
{%- for tool in tools or [] -%}{{ tool.function.name }};{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' and not tools -%}{{ raise_exception('no tools here') }}{%- endif -%}
  {{ message.role[0] }}:{{ message.content }}
  {%- for call in message.tool_calls or [] -%}
    {{ call.function.name }}({{ call.function.arguments.n }})
  {%- endfor -%}
  |
{%- endfor -%}
{%- if mood is defined -%}{{ mood }}|{%- endif -%}
{%- if add_generation_prompt -%}a:{%- endif -%}
"""
LIMITS = Limits(answers=16, new_tokens=None, body_bytes=1 << 16, deadline_seconds=60)


class Gate:
    """An engine whose steps wait while the gate is shut, and a while when it is not.

    Attributes:
        open: is set while steps may be taken.
        seconds: that each of them takes longer.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.open = threading.Event()
        self.open.set()
        self.seconds = 0.0

    def decode(self, ids: Ids) -> Logits:
        self.open.wait()
        time.sleep(self.seconds)
        logits: Logits = self._engine.decode(ids)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass(frozen=True, eq=False)
class Running:
    """A server that answers."""

    url: str
    service: Service
    gate: Gate
    clients: ExitStack

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rsplit(":", 1)[1])

    @cache  # noqa: B019 - making a client takes longer than most requests
    def openai(self, **options: Any) -> OpenAI:
        given = {"api_key": "none", "max_retries": 0, **options}
        return self.clients.enter_context(OpenAI(base_url=f"{self.url}/v1", **given))

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, verify=False, **options)

    def wait_until(self, **state: int) -> None:
        """Wait until the batcher is in such a state."""
        seen = {}
        for _ in range(2000):
            now = self.service.batcher.state()
            seen = {name: getattr(now, name) for name in state}
            if seen == state:
                return
            time.sleep(0.01)
        raise AssertionError(f"{seen} instead of {state}")


Serve = Callable[..., AbstractContextManager[Running]]


@contextmanager
def serving(
    bundle: Path,
    *,
    limits: Limits = LIMITS,
    slots: int = 4,
    keys: tuple[str, ...] = (),
    hosts: tuple[str, ...] | None = None,
    origins: tuple[str, ...] = (),
    **options: Any,
) -> Iterator[Running]:
    """A server in a thread of this process; at the end no slot is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "open_slots", lambda *some, **more: Gate(open_slots(*some, **more)))
        with main.open_service(
            bundle,
            slots=slots,
            queue=limits.answers,
            limits=limits,
            **{"names": ("tiny",), **options},
        ) as service:
            ready: SimpleQueue[str] = SimpleQueue()
            server = main.Server(
                service,
                listening.listen("127.0.0.1", 0),
                access=Access(Keys(keys), hosts, origins),
                on_ready=ready.put,
            )
            thread = threading.Thread(target=server.run)
            thread.start()
            url = ready.get(timeout=30)
            assert isinstance(service.engine, Gate)
            running = Running(url, service, service.engine, ExitStack())
            try:
                with running.clients:
                    yield running
                running.wait_until(active=0, waiting=0)
            finally:
                running.gate.open.set()
                server.should_exit = True
                thread.join()


@pytest.fixture(scope="session")
def bundle(exported_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny LLaMA with a chat template. Not to be changed."""
    out = Path(shutil.copytree(exported_llama, tmp_path_factory.mktemp("chat") / "bundle"))
    add_to_model(out, "chat_template.jinja", TEMPLATE)
    return out


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[Running]:
    """A server for tests that leave it as it was."""
    with serving(bundle) as running:
        yield running


@pytest.fixture
def serve(bundle: Path) -> Serve:
    """Starts a server with other options."""
    return lambda **options: serving(bundle, **options)
