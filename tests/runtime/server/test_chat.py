import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from runtime.server.chat import open_chat_template
from runtime.server.templates import ChatTemplate, Conversation
from tests.byte_tokenizer import save_byte_tokenizer
from thanos_deploy.errors import InputError, UsageError

# What templates do: special tokens, missing tools, loops with breaks, JSON, whitespace, generation.
TEMPLATES = [
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}\n{% endfor %}",
    "{%- if tools is not none %}tools{% endif %}\n"
    "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
    "  {{ m | tojson }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content.strip() }}{% endgeneration %}"
    "{% else %}{{ ns.n }}{{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}",
    "{{ messages[0] | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ documents is none }}",
]
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text()}
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("source", TEMPLATES)
@given(messages=MESSAGES)
@settings(max_examples=30, deadline=None)
def test_a_prompt_is_that_of_transformers(
    stock: Any, source: str, messages: list[dict[str, str]]
) -> None:
    ours = ChatTemplate(source, {"eos_token": "<end>"}).render(Conversation(messages))
    assert ours == stock.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.at.all }}",
        "{{ messages + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_what_a_template_refuses_is_a_usage_error(source: str) -> None:
    with pytest.raises(UsageError, match="chat template does not accept these messages"):
        ChatTemplate(source, {}).render(Conversation([{"role": "user", "content": "x"}]))


def test_a_template_is_found_where_tokenizers_keep_it(exported_llama: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    out = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    assert open_chat_template(out) is None
    configuration = out / "model" / "tokenizer_config.json"
    token = {"content": "<s>", "lstrip": False}
    for template in (
        "{{ bos_token }}{{ messages[0].content }}",
        [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
        ],
    ):
        configuration.write_text(json.dumps({"chat_template": template, "bos_token": token}))
        found = open_chat_template(out, verify=False)
        assert found is not None
        assert found.render(Conversation(messages)) == "<s>x"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{% for %}"),
        ("chat_template.jinja", "{{ " + "(" * 3000 + ")" * 3000 + " }}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"x": 1}]}'),
    ],
)
def test_an_unreadable_template_is_bad_input(
    exported_llama: Path, tmp_path: Path, name: str, content: str
) -> None:
    out = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    (out / "model" / name).write_text(content)
    with pytest.raises(InputError, match="not a readable chat template"):
        open_chat_template(out, verify=False)
