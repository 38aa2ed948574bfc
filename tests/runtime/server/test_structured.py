"""Answers of a form, and calls of functions, asked by OpenAI's own client."""

import asyncio
import json
import re
from typing import Any

import jsonschema
import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel, Field

from runtime.grammars import closed
from runtime.server.templates import Conversation
from runtime.server.tools import Call, Calls, grammar, offered
from tests.runtime.server.conftest import Running

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "word": {"enum": ["yes", "no"]},
    },
    "required": ["n", "word"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("add", "take")
]


class Count(BaseModel):
    """An answer's type."""

    n: int = Field(ge=0, le=99)


def chat(running: Running, **asked: Any) -> Any:
    # Random: what holds is the form, whatever the model prefers.
    return running.openai().chat.completions.create(
        **{"model": "tiny", "messages": MESSAGES, "max_tokens": 100, "seed": 5, **asked}
    )


@pytest.mark.parametrize("seed", range(4))
def test_json_is_of_its_schema(server: Running, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    answer = chat(server, response_format=form, seed=seed, n=3)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert choice.finish_reason == "stop"
    events = chat(server, response_format=form, seed=seed, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == answer.choices[0].message.content


def test_a_parsed_answer_is_one_of_the_clients_types(server: Running) -> None:
    answer = server.openai().chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Count, max_tokens=60
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    assert 0 <= parsed.n <= 99


@pytest.mark.parametrize(
    ("fields", "matches"),
    [
        ({"guided_regex": "[ab]{3}-[0-9]{2}"}, "[ab]{3}-[0-9]{2}"),
        ({"guided_choice": ["one", 'tw"o\n']}, 'one|tw"o\n'),
        ({"guided_choice": ["é\u2028"]}, "é\u2028"),
        ({"guided_json": json.dumps(SCHEMA)}, r'\{"n": \d+, "word": "(yes|no)"\}'),
        ({"guided_grammar": 'root ::= "a" | "b" root'}, "b*a"),
        ({"guided_grammar": 'start: "a" | "b" start'}, "b*a"),
        ({"structured_outputs": {"regex": "x{5}"}}, "x{5}"),
        ({"structured_outputs": {"choice": ["u", "v"]}}, "[uv]"),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"n": \d+, "word": "(yes|no)"\}'),
    ],
    ids=str,
)
def test_vllms_fields_are_kept_to_on_both_routes(
    server: Running, fields: dict[str, Any], matches: str
) -> None:
    client = server.openai()
    plain = client.completions.create(model="tiny", prompt="a", max_tokens=100, extra_body=fields)
    conversation = chat(server, extra_body=fields)
    for choice, text in (
        (plain.choices[0], plain.choices[0].text),
        (conversation.choices[0], conversation.choices[0].message.content),
    ):
        assert choice.finish_reason == "stop"
        assert re.fullmatch(matches, text)


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "("},
        {"guided_regex": "a{9999999999}"},
        {"guided_json": {"type": "wrong"}},
        {"guided_json": "{"},
        {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        {"guided_grammar": "start: nothing"},
        {"guided_grammar": "::="},
        {"guided_choice": []},
        {"guided_choice": ["a"], "guided_regex": "a"},
        {"structured_outputs": {"regex": "a", "nonsense": 1}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        {"tools": [{"type": "function", "function": {"name": "no good"}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}]},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_a_form_that_cannot_be_kept_to_is_refused(server: Running, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(server, extra_body=fields)


@pytest.mark.parametrize("field", ["guided_grammar", "guided_regex", "guided_json"])
def test_a_form_that_is_no_unicode_is_refused(server: Running, field: str) -> None:
    # OpenAI's client cannot send it.
    body = json.dumps({"model": "tiny", "prompt": "a", field: 'start: "\ud800"'})
    with server.http(headers={"Content-Type": "application/json"}) as http:
        assert http.post("/v1/completions", content=body).status_code == 400


def test_objects_have_no_other_properties_unless_the_schema_says_so() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "null"}}}
    shut = {**inner, "additionalProperties": False}
    assert closed({"properties": {"a": inner}}) == {
        "properties": {"a": shut},
        "additionalProperties": False,
    }
    assert closed({"anyOf": [inner, {"type": "array", "items": inner}], "$defs": {"x": inner}}) == {
        "anyOf": [shut, {"type": "array", "items": shut}],
        "$defs": {"x": shut},
    }
    for said in (
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "allOf": [inner]},
        {"type": "object"},
        {"enum": [{"properties": 1}]},
    ):
        assert closed(said) == said


def test_a_form_that_is_too_large_is_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.grammars._CHARACTERS", 1000)
    with pytest.raises(openai.BadRequestError, match="more than the 1000"):
        chat(server, extra_body={"guided_json": {"enum": ["v" * 1000]}})


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"add", "take"}),
        ({"type": "function", "function": {"name": "take"}}, {"take"}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_calls_are_of_the_functions_that_may_be_called(
    server: Running, choice: Any, names: set[str], seed: int
) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
    answer = chat(server, **asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name in names
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    events = list(chat(server, stream=True, **asked))
    (streamed,) = [part for event in events for part in event.choices[0].delta.tool_calls or []]
    assert (streamed.function, streamed.index) == (
        type(streamed.function)(**call.function.model_dump()),
        0,
    )
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices[0].finish_reason == "tool_calls"


def test_the_model_may_answer_with_text_or_with_calls(server: Running) -> None:
    text = chat(server, tools=TOOLS, max_tokens=5).choices[0]
    assert text.message.content
    assert text.message.tool_calls is None
    none = chat(server, tools=TOOLS, tool_choice="none", max_tokens=5).choices[0]
    plain = chat(server, max_tokens=5).choices[0]
    assert none.message.content == plain.message.content


def test_a_call_and_its_result_are_in_the_conversation(server: Running) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"n": 3}'}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "4"},
    ]
    asked: Any = {"temperature": 0, "max_tokens": 8}
    answer = chat(server, messages=messages, tools=TOOLS, tool_choice="auto", **asked).choices[0]
    # Text that may have calls is Unicode, at least.
    told = server.openai().completions.create(
        model="tiny",
        prompt="add;take;u:Hi|a:add(3)|t:4|a:",
        extra_body={"guided_regex": r"(.|\n)*"},
        **asked,
    )
    assert answer.message.content == told.choices[0].text
    call["function"] = {"name": "add", "arguments": "[1"}
    with pytest.raises(openai.BadRequestError, match="arguments"):
        chat(server, messages=messages, tools=TOOLS)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own
def test_what_the_client_made_of_an_answer_may_be_in_the_conversation(server: Running) -> None:
    client = server.openai()
    ask: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 99}
    tool = pydantic_function_tool(Count, name="add")
    parsed = client.chat.completions.parse(**ask, response_format=Count).choices[0].message
    called = client.chat.completions.parse(
        **ask, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    assert parsed.parsed
    assert called.message.tool_calls
    result: Any = {"role": "tool", "tool_call_id": called.message.tool_calls[0].id, "content": "4"}
    said: Any = [*MESSAGES, parsed, called.message, result]
    answer = client.chat.completions.create(model="tiny", messages=said, tools=[tool], max_tokens=2)
    assert answer.usage
    assert answer.usage.prompt_tokens > 20


def test_a_template_without_tools_is_told_of_them_in_a_system_message() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"n": 3}}}
    conversation = Conversation(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add."},
            {"role": "assistant", "tool_calls": [call]},
        ]
    )
    first, _, last = offered(conversation, TOOLS, native=False).messages
    assert first["content"].startswith("Be brief.\n\n")
    assert all(json.dumps(tool["function"]) in first["content"] for tool in TOOLS)
    assert last["content"] == '<tool_call>\n{"name": "add", "arguments": {"n": 3}}\n</tool_call>'
    assert Calls().push(last["content"]) == ("", [Call("add", '{"n": 3}')])
    native = offered(conversation, TOOLS, native=True)
    assert (native.messages, native.tools) == (conversation.messages, TOOLS)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_wherever_the_text_is_cut(size: int) -> None:
    one = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'
    text = f"Well <tool\n{one}\n{one}<tool_call>oops</tool_call>end<tool_call>\n{{"
    reader, plain, calls = Calls(), "", []
    for start in range(0, len(text), size):
        some, found = reader.push(text[start : start + size])
        plain += some
        calls += found
    assert calls == [Call("add", '{"n": 1}')] * 2
    plain += reader.finish()
    assert plain.replace("\n", "") == "Well <tool<tool_call>oops</tool_call>end<tool_call>{"


def test_the_grammar_of_answers_that_may_call_takes_both(server: Running) -> None:
    compiler = server.service.compiler
    written = grammar(TOOLS, required=False)
    compiled = asyncio.run(compiler.compile(lambda: written))
    one = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'
    for text, good in (
        ("plain", True),
        (f"so: {one}", True),
        (f"{one}{one} and so", True),
        (one.replace("add", "sub"), False),
        (one.replace("1", "11"), False),
    ):
        match = compiled.begin()
        allowed = []
        for token in server.service.tokenizer.encode(text):
            allowed.append(bool(match.allowed()[token]))
            if not allowed[-1]:
                break
            match.take(token)
        assert all(allowed) == good
        if good:
            assert match.allowed()[256]
