"""What vLLM's and OpenAI's fields do, asked by OpenAI's own client."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from numpy.typing import NDArray

from runtime.engine import Engine, open_engine
from runtime.text import Tokenizer, open_tokenizer
from tests.runtime.server.conftest import Running, Serve
from thanos_deploy import __version__

END = 256
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return open_engine(bundle)


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Tokenizer:
    return open_tokenizer(bundle)


def logprobs(engine: Engine, text: list[int]) -> NDArray[np.float64]:
    """float64[tokens - 1, vocabulary], of what follows each token but the last."""
    rows = [engine.prefill(np.array([text[:1]]))]
    rows += [engine.decode(np.array([token])) for token in text[1:-1]]
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def ids_of(running: Running, **asked: Any) -> list[int]:
    """The ids of an answer to "ab"."""
    answer = running.openai().completions.create(
        prompt="ab", logprobs=0, **{**GREEDY, "max_tokens": 30, **asked}
    )
    found = answer.choices[0].logprobs
    assert found is not None
    tokens = running.service.tokenizer
    known = {tokens.name_of(token): token for token in range(257)}
    return [known[name] for name in found.tokens or []]


def test_penalties_lower_what_was_generated(server: Running, engine: Engine) -> None:
    logits = engine.prefill(np.array([[65, 66]]))[0]
    for field in ("presence_penalty", "frequency_penalty"):
        ids = ids_of(server, extra_body={"ignore_eos": True}, **{field: 2.0})
        expected: list[int] = []
        logits = engine.prefill(np.array([server.service.tokenizer.encode("ab")]))[0]
        for _ in range(30):
            scores = logits.astype(np.float64)
            for token, count in Counter(expected).items():
                scores[token] -= 2.0 * (count if field == "frequency_penalty" else 1)
            expected.append(int(scores.argmax()))
            logits = engine.decode(np.array(expected[-1:]))[0]
        assert ids == expected


def test_a_bias_decides(server: Running) -> None:
    assert ids_of(server, logit_bias={"7": 100}) == [7] * 30
    first = ids_of(server)[0]
    assert first not in ids_of(server, logit_bias={str(first): -100})


def test_ids_end_a_text_but_not_before_the_least_number_of_tokens(server: Running) -> None:
    usual = ids_of(server, extra_body={"ignore_eos": True})
    end = usual[4]
    first = usual.index(end)
    stopped = ids_of(server, extra_body={"stop_token_ids": [end]})
    assert stopped == usual[:first]
    longer = ids_of(server, extra_body={"stop_token_ids": [end], "min_tokens": first + 3})
    assert len(longer) >= first + 3
    assert end not in longer[: first + 3]
    # Nor does a stop string.
    text = server.service.tokenizer.decode(usual)
    asked = {**GREEDY, "prompt": "ab", "max_tokens": 30, "stop": text[0]}
    short = server.openai().completions.create(**asked)
    long = server.openai().completions.create(**asked, extra_body={"min_tokens": 5})
    assert short.choices[0].text == ""
    assert long.usage is not None
    assert long.usage.completion_tokens >= 5
    assert text.startswith(long.choices[0].text[:4])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 3])
def test_an_echo_has_the_prompt_and_its_log_probabilities(
    server: Running, engine: Engine, tokenizer: Tokenizer, most: int, stream: bool
) -> None:
    prompts = ["Once upon", "x"]
    asked: Any = {**GREEDY, "prompt": prompts, "max_tokens": most, "logprobs": 2, "echo": True}
    answer = server.openai().completions.create(**asked, stream=stream, n=2)
    events: list[Any] = list(answer) if stream else [answer]
    for index, prompt in enumerate([prompts[0], prompts[0], prompts[1], prompts[1]]):
        choices = [one for event in events for one in event.choices if one.index == index]
        text = "".join(choice.text for choice in choices)
        assert text.startswith(prompt)
        assert choices[-1].finish_reason in (("length",) if not most else ("length", "stop"))
        found = [choice.logprobs for choice in choices]
        values = [value for one in found for value in one.token_logprobs]
        tops = [value for one in found for value in one.top_logprobs]
        ids = tokenizer.encode(prompt)
        assert values[0] is None
        assert tops[0] is None
        expected = logprobs(engine, ids) if len(ids) > 1 else np.zeros((0, 257))
        for place, row in enumerate(expected, start=1):
            assert values[place] == pytest.approx(row[ids[place]], abs=1e-4)
            assert max(tops[place].values()) == pytest.approx(row.max(), abs=1e-4)
        assert len(ids) <= len(values) <= len(ids) + most


def test_an_echo_without_log_probabilities_is_text(server: Running) -> None:
    answer = server.openai().completions.create(**GREEDY, prompt="ab", echo=True, max_tokens=5)
    plain = server.openai().completions.create(**GREEDY, prompt="ab", max_tokens=5)
    assert answer.choices[0].text == "ab" + plain.choices[0].text
    assert answer.choices[0].logprobs is None


def test_lm_evaluation_harness_gets_the_likelihoods_of_the_model(
    server: Running, bundle: Path, engine: Engine, tokenizer: Tokenizer
) -> None:
    model = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(bundle / "model"),
        tokenized_requests=True,
        batch_size=2,
        max_retries=1,
    )
    pairs = [("The capital", " of France"), ("ab", "c"), ("Once upon a", " time there")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (context, text), (total, greedy) in zip(pairs, model.loglikelihood(asked), strict=True):
        ids, begin = tokenizer.encode(context + text), len(tokenizer.encode(context))
        rows = logprobs(engine, ids)[begin - 1 :]
        assert total == pytest.approx(sum(rows[np.arange(len(rows)), ids[begin:]]), abs=1e-3)
        assert greedy == (rows.argmax(axis=1).tolist() == ids[begin:])
    (rolling,) = model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("Once upon a time",), 0)]
    )
    ids = [END, *tokenizer.encode("Once upon a time")]
    rows = logprobs(engine, ids)
    assert rolling == pytest.approx(sum(rows[np.arange(len(rows)), ids[1:]]), abs=1e-3)


def test_a_prefill_is_gone_on_with(server: Running) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    asked = {**GREEDY, "messages": messages, "max_tokens": 8}
    for fields, prompt in (
        ({"continue_final_message": True}, "u:Hi|a:Well, "),
        ({"continue_final_message": True, "add_generation_prompt": False}, "u:Hi|a:Well, "),
        ({"add_generation_prompt": False}, "u:Hi|a:Well, |"),
        ({}, "u:Hi|a:Well, |a:"),
    ):
        answer = server.openai().chat.completions.create(**asked, extra_body=fields)
        plain = server.openai().completions.create(**GREEDY, prompt=prompt, max_tokens=8)
        assert answer.choices[0].message.content == plain.choices[0].text
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt begins a new"):
        server.openai().chat.completions.create(
            **asked, extra_body={"continue_final_message": True, "add_generation_prompt": True}
        )


def test_special_tokens_of_a_user_are_text(server: Running) -> None:
    """Of the tokens that end a message, only the template's count."""
    with server.http() as http:

        def tokens(content: str, **fields: object) -> list[int]:
            messages = [{"role": "user", "content": content}]
            answer = http.post("/tokenize", json={"messages": messages, **fields})
            found: list[int] = answer.json()["tokens"]
            return found

        assert END not in tokens("a<end>b")
        assert END in tokens("a<end>b", allow_special_tokens=True)
        assert len(tokens("a<end>b")) == len("u:a<end>b|a:")
        text = http.post("/detokenize", json={"tokens": tokens("a<end>b\ufdd20\ufdd2")}).json()
        assert text == {"prompt": "u:a<end>b0|a:"}


def test_tokens_and_texts_are_told(server: Running, tokenizer: Tokenizer) -> None:
    with server.http() as http:
        answer = http.post(
            "/tokenize", json={"model": "tiny", "prompt": "häh", "return_token_strs": True}
        ).json()
        assert answer["tokens"] == tokenizer.encode("häh")
        assert (answer["count"], answer["max_model_len"]) == (4, 128)
        assert answer["token_strs"][0] == "h"
        ids = {"tokens": [*answer["tokens"], END]}
        assert http.post("/detokenize", json=ids).json() == {"prompt": "häh<end>"}
        assert http.post("/detokenize", json={"tokens": [257]}).status_code == 400
        assert http.post("/tokenize", json={"prompt": "a", "model": "other"}).status_code == 404
        assert http.post("/tokenize", json={"prompt": "a", "x": 1}).status_code == 400
        assert http.post("/tokenize", json=[]).status_code == 400
        assert http.get("/version").json() == {"version": __version__}


def test_a_template_is_given_its_variables(serve: Serve, bundle: Path) -> None:
    with serve(names=("tiny", "org/tiny")) as running:
        client = running.openai()
        assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
        assert client.models.retrieve("org/tiny").id == "org/tiny"
        answer = client.completions.create(model="org/tiny", prompt="a", max_tokens=1)
        assert answer.model == "org/tiny"
        with running.http() as http:
            body = {"messages": [{"role": "user", "content": "x"}]}
            texts = [
                running.service.tokenizer.decode(
                    http.post("/tokenize", json=asked).json()["tokens"]
                )
                for asked in (body, {**body, "chat_template_kwargs": {"mood": "glad", "tools": 1}})
            ]
        assert texts == ["u:x|a:", "u:x|glad|a:"]
