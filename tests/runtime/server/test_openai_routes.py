"""OpenAI's routes, asked by OpenAI's own client.

The tests ask the same few servers, so they are in one long file.
"""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from runtime.engine import Engine, open_engine
from runtime.sampling import Sampling
from runtime.server.templates import ChatTemplate, Conversation
from runtime.text import Tokenizer, open_tokenizer, stream
from tests.runtime.server.conftest import TEMPLATE, Running, serving

PROMPT = "Once upon"
MESSAGES: Any = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return open_engine(bundle)


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Tokenizer:
    return open_tokenizer(bundle)


def test_the_model_is_listed(server: Running) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "thanos-deploy"


def test_greedy_text_is_that_of_the_runtime(
    server: Running, engine: Engine, tokenizer: Tokenizer
) -> None:
    expected = "".join(stream(engine, tokenizer, PROMPT, new_tokens=60))
    answer = server.openai().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=60, temperature=0
    )
    assert answer.choices[0].text == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert answer.usage.total_tokens - answer.usage.prompt_tokens <= 60


def test_an_answer_in_a_conversation_is_that_to_the_template(
    server: Running, engine: Engine, tokenizer: Tokenizer
) -> None:
    prompt = ChatTemplate(TEMPLATE, {}).render(Conversation(MESSAGES))
    assert prompt == "s:Be|u:Hi|a:"
    expected = "".join(stream(engine, tokenizer, prompt, new_tokens=40))
    answer = server.openai().chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=40, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_streamed_text_is_that_of_the_whole(server: Running, sampling: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 50, "n": 3, **sampling}
    client = server.openai()
    whole = client.completions.create(prompt=PROMPT, **asked)
    texts, reasons = [""] * 3, [""] * 3
    usage = None
    for event in client.completions.create(
        prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked
    ):
        for choice in event.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = event.usage
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage

    chat = client.chat.completions.create(messages=MESSAGES, **asked)
    texts = [""] * 3
    roles: list[str] = []
    for chunk in client.chat.completions.create(messages=MESSAGES, stream=True, **asked):
        for part in chunk.choices:
            texts[part.index] += part.delta.content or ""
            roles += [part.delta.role] if part.delta.role else []
        assert chunk.usage is None
    assert texts == [choice.message.content for choice in chat.choices]
    assert roles == ["assistant"] * 3


@pytest.mark.slow
def test_concurrent_requests_get_what_they_would_get_alone(server: Running) -> None:
    def ask(number: int) -> str:
        return (
            server.openai()
            .completions.create(
                model="tiny",
                prompt="x" * (1 + 5 * number),
                max_tokens=30,
                temperature=number % 2,
                seed=number,
            )
            .choices[0]
            .text
        )

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone
    assert len(set(alone)) > 6


def test_a_seed_decides_and_copies_count_it_up(
    server: Running, engine: Engine, tokenizer: Tokenizer
) -> None:
    answer = server.openai().completions.create(
        model="tiny", prompt="a", max_tokens=20, temperature=1, top_p=0.9, seed=7, n=2
    )
    assert [choice.text for choice in answer.choices] == [
        "".join(
            stream(
                engine,
                tokenizer,
                "a",
                new_tokens=20,
                sampling=Sampling(temperature=1, top_p=0.9, seed=seed),
            )
        )
        for seed in (7, 8)
    ]
    unseeded = {
        server.openai().completions.create(model="tiny", prompt="a", max_tokens=20).choices[0].text
        for _ in range(4)
    }
    assert len(unseeded) > 1


def test_a_stop_string_ends_a_text_and_is_not_in_it(server: Running) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    client = server.openai()
    text = client.completions.create(**asked).choices[0].text
    end = text[8:11]
    stopped = client.completions.create(**asked, stop=["nowhere", end])
    assert stopped.choices[0].text == text[: text.index(end)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens < 60
    parts = [
        event.choices[0].text for event in client.completions.create(**asked, stop=end, stream=True)
    ]
    assert "".join(parts) == text[: text.index(end)]


def test_log_probabilities_are_those_of_the_logits(
    server: Running, engine: Engine, tokenizer: Tokenizer
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    ids = tokenizer.encode(PROMPT)
    logits = engine.prefill(np.array([ids]))[0].astype(np.float64)
    expected = np.sort(logits - np.log(np.exp(logits).sum()))[::-1]

    plain = server.openai().completions.create(prompt=PROMPT, logprobs=3, **asked).choices[0]
    assert plain.logprobs is not None
    assert plain.logprobs.token_logprobs is not None
    assert plain.logprobs.top_logprobs is not None
    assert plain.logprobs.tokens is not None
    assert plain.logprobs.token_logprobs[0] == pytest.approx(expected[0], abs=1e-5)
    assert list(plain.logprobs.top_logprobs[0].values()) == pytest.approx(
        list(expected[:3]), abs=1e-5
    )
    assert plain.logprobs.top_logprobs[0][plain.logprobs.tokens[0]] == pytest.approx(expected[0])
    assert len(plain.logprobs.tokens) == 6

    chat = server.openai().chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=2, **asked
    )
    assert chat.choices[0].logprobs is not None
    tokens = chat.choices[0].logprobs.content
    assert tokens is not None
    assert len(tokens) == 6
    for token in tokens:
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
        assert (token.bytes is None) == token.token.startswith("token_id:")

    streamed = [
        token
        for chunk in server.openai().chat.completions.create(
            messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True, **asked
        )
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == tokens


def test_offsets_point_into_the_text(server: Running) -> None:
    choice = (
        server.openai()
        .completions.create(
            model="tiny", prompt=PROMPT, logprobs=0, max_tokens=30, seed=1, temperature=0.4
        )
        .choices[0]
    )
    assert choice.logprobs is not None
    for token, offset in zip(
        choice.logprobs.tokens or [], choice.logprobs.text_offset or [], strict=True
    ):
        if token.startswith("token_id:"):
            break
        assert choice.text[offset:].startswith(token)


def test_several_prompts_as_text_and_as_ids(server: Running, tokenizer: Tokenizer) -> None:
    prompts = ["ab", "xyz"]
    client = server.openai()
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "temperature": 0}
    texts = [choice.text for choice in client.completions.create(prompt=prompts, **asked).choices]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert texts == [
        choice.text for choice in client.completions.create(prompt=ids, **asked).choices
    ]
    assert texts[1] == client.completions.create(prompt=ids[1], **asked).choices[0].text


def test_a_conversation_goes_on_with_what_the_client_got(server: Running) -> None:
    client = server.openai()
    first = client.chat.completions.create(
        model="tiny", messages=[{"role": "developer", "content": "Be"}], max_tokens=5
    )
    parts: Any = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    second = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be"},
            first.choices[0].message.model_dump(),  # type: ignore[list-item]
            {"role": "user", "content": parts},
        ],
        max_tokens=5,
    )
    assert second.choices[0].finish_reason in ("stop", "length")


def test_without_a_limit_a_text_is_as_long_as_the_model_takes(server: Running) -> None:
    answer = server.openai().chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    # The last token is not read any more.
    assert answer.usage.total_tokens == 128 + 1
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": "a", "nonsense": 1}, "unknown_parameter", "nonsense"),
        ({"prompt": "a", "max_tokens": 500}, "context_length_exceeded", "max_tokens"),
        ({"prompt": "a" * 200}, "context_length_exceeded", None),
        ({"prompt": "a", "n": 17}, "too_many_answers", "n"),
        ({"prompt": "a", "temperature": -1}, "greater_than_equal", "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "float_type", "temperature"),
        ({"prompt": "a", "top_p": 0}, "greater_than", "top_p"),
        ({"prompt": "a", "max_tokens": 1 << 70}, "less_than", "max_tokens"),
        ({"prompt": "a", "frequency_penalty": 2.5}, "less_than_equal", "frequency_penalty"),
        ({"prompt": "a", "presence_penalty": -3}, "greater_than_equal", "presence_penalty"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "less_than_equal", "logit_bias"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "value_error", None),
        ({"prompt": "a", "logit_bias": {"257": 1}}, "invalid", "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [257]}, "invalid", "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "greater_than_equal", "stop_token_ids"),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "value_error", None),
        ({"prompt": "a", "max_tokens": 0}, "value_error", None),
        ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "value_error", None),
        ({"prompt": "a", "stop": ["a", 1]}, "value_error", "stop"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "value_error", None),
        ({"prompt": "a", "guided_json": "[]"}, "invalid", None),
        ({"prompt": "a", "best_of": 3, "n": 2}, "value_error", "best_of"),
        ({"prompt": [1, -1]}, "value_error", "prompt"),
        ({"prompt": [5000]}, "invalid", "prompt"),
        ({"prompt": ""}, "invalid", "prompt"),
        ({"prompt": []}, "value_error", "prompt"),
        ({}, "missing", "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused(
    server: Running, body: dict[str, Any], code: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().completions.create(
            model="tiny", prompt=None, extra_body={"prompt": openai.omit, **body}
        )
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "prediction": None, "response_format": None},
        {"stop": "", "top_k": -1, "logit_bias": {}, "presence_penalty": 0.0},
        {
            **{"functions": [], "function_call": "none", "top_logprobs": 0, "verbosity": "medium"},
            **{"reasoning_effort": "none", "stream_options": {"include_usage": False}},
            **{"stop": [""], "logprobs": False, "modalities": ["text"]},
        },
        {
            **{"skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0},
            **{"bad_words": [], "echo": False, "add_special_tokens": False, "priority": 3},
            **{"documents": [], "include_reasoning": True, "return_token_ids": False},
            "structured_outputs": {"regex": None, "disable_fallback": False, "backend": None},
        },
        {"guided_json": None, "anything_at_all": None, "user": "me", "store": False},
        {"messages": [{**MESSAGES[0], "reasoning_content": None}, *MESSAGES[1:]]},
    ],
    ids=["OpenAI's", "values", "more of OpenAI's", "vLLM's", "null", "null in a message"],
)
def test_fields_that_ask_for_nothing_are_taken(server: Running, fields: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "seed": 1}
    client = server.openai()
    plain = client.chat.completions.create(**asked)
    answer = client.chat.completions.create(**asked, extra_body=fields)
    assert answer.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [{"type": "function"}]}, "function: Field required"),
        ({"functions": [{"name": "x"}]}, "functions: not supported"),
        ({"prediction": {"type": "content"}}, "prediction: not supported"),
        ({"best_of": 3}, "best_of: not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort: not supported"),
        ({"length_penalty": True}, "length_penalty: not supported"),
        ({"add_special_tokens": True}, "add_special_tokens: Input should be False"),
        ({"stop": 5}, "stop: give a text, or a list of at most four texts"),
        ({"tool_choice": "any"}, "tool_choice: give none, auto, required, or an object that names"),
        ({"tool_choice": "required"}, "400 - tool_choice: required needs tools"),
        ({"anything_at_all": 1}, "Unrecognized request argument supplied: anything_at_all"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(server: Running, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        server.openai().chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=2, extra_body=fields
        )


def test_ids_outside_of_the_vocabulary_are_refused_with_its_range(server: Running) -> None:
    with pytest.raises(
        openai.BadRequestError,
        match=r"prompt: the token id 5000 is outside of the vocabulary, whose ids are 0 to",
    ):
        server.openai().completions.create(model="tiny", prompt=[5000])


def test_an_answer_that_ends_at_once_has_no_log_probabilities_and_says_so(
    server: Running,
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
    usual = server.openai().chat.completions.create(**asked, max_tokens=1)
    first = usual.choices[0].message.content
    assert first
    answer = server.openai().chat.completions.create(
        **asked, max_tokens=1, logprobs=True, stop=first
    )
    assert answer.choices[0].message.content == ""
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None


def test_more_log_probabilities_than_fit_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.service._LOGPROBS", 100)
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "logprobs": True}
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().chat.completions.create(**asked, n=2, max_tokens=8, top_logprobs=6)
    assert caught.value.code == "too_many_logprobs"
    assert server.openai().chat.completions.create(**asked, n=2, max_tokens=8, top_logprobs=5)


def test_another_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai().completions.create(model="gpt-4", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.openai().models.retrieve("gpt-4")


def test_messages_that_the_template_refuses_are_the_clients_fault(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="no tools here"):
        server.openai().chat.completions.create(
            model="tiny", messages=[{"role": "tool", "content": "1", "tool_call_id": "x"}]
        )


def test_a_model_without_a_template_says_so(exported_llama: Path) -> None:
    with serving(exported_llama) as running:
        with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
            running.openai().chat.completions.create(model="tiny", messages=MESSAGES)
        assert caught.value.code == "no_chat_template"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_reads_the_stream(server: Running) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "stream": True, "temperature": 0}
    result = subprocess.run(
        ["curl", "-sSN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json",
         "-d", json.dumps(body)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *events, done, end = result.stdout.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    text = "".join(
        json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events
    )
    whole = server.openai().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=5, temperature=0
    )
    assert text == whole.choices[0].text
