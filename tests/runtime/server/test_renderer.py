"""A chat template that never ends or never stops growing ends its own request, and nothing else."""

import asyncio
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from runtime.batching import Busy
from runtime.server import chat, rendering
from runtime.server.chat import Renderer
from runtime.server.templates import ChatTemplate, Conversation
from tests.runtime.server.conftest import TEMPLATE, serving
from thanos_deploy.errors import UsageError

ENDLESS = "{% for i in range(99999999999999999999999) %}{% endfor %}"
LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
LARGE = "{{ 'x' * 99999999 }}"
DOUBLING = (
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
WHEN = "{% if messages[0].content == 'break' %}" + LOOP + "{% else %}" + TEMPLATE + "{% endif %}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_conversation_is_rendered_as_in_this_process_and_after_one_that_breaks() -> None:
    template = ChatTemplate(WHEN, {"bos_token": "<s>"})
    renderer = Renderer(template)
    said = Conversation([{"role": "user", "content": "häh\u2028\ud800"}])
    try:
        for _ in range(2):
            assert asyncio.run(renderer.render(said)) == template.render(said)
        with pytest.raises(UsageError, match=r"exceeded a limit of time or memory \(1 s"):
            asyncio.run(renderer.render(Conversation([{"role": "user", "content": "break"}])))
        assert asyncio.run(renderer.render(said)) == template.render(said)
        with pytest.raises(UsageError, match="no tools here"):
            asyncio.run(renderer.render(Conversation([{"role": "tool", "content": "x"}])))
    finally:
        renderer.close()


@pytest.mark.slow
@pytest.mark.parametrize("source", [LOOP, LARGE, DOUBLING, ENDLESS], ids=str)
@pytest.mark.usefixtures("quick")
def test_time_and_memory_of_a_template_are_limited(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(rendering, "_CHARACTERS", 1 << 20)
    monkeypatch.setattr(rendering, "_MEMORY_BYTES", 1 << 29)
    renderer = Renderer(ChatTemplate(source, {}))
    try:
        with pytest.raises(UsageError, match="chat template"):
            asyncio.run(renderer.render(Conversation([{"role": "user", "content": "x"}])))
    finally:
        renderer.close()


def test_what_waits_when_the_server_is_to_end_has_as_long_as_one_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [10.0]
    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    renderer = Renderer(ChatTemplate(TEMPLATE, {}))
    said = Conversation([{"role": "user", "content": "x"}])
    try:
        renderer.hurry()
        assert asyncio.run(renderer.render(said)) == "u:x|a:"
        now[0] += rendering.SECONDS
        with pytest.raises(Busy, match="closing"):
            asyncio.run(renderer.render(said))
    finally:
        renderer.close()


def test_an_endless_template_holds_up_neither_completions_nor_the_end(
    bundle: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (out / "model" / "chat_template.jinja").write_text(LOOP)
    threads = []
    with serving(out, verify=False) as running:
        client = running.openai(timeout=60)

        def ask() -> None:
            with pytest.raises(openai.APIError):
                client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "x"}]
                )

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        answer = client.completions.create(model="tiny", prompt="a", max_tokens=1)
        assert answer.choices
        running.service.renderer.close()  # type: ignore[union-attr]
    for thread in threads:
        thread.join()
