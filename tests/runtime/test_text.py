import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import open_engine
from runtime.sampling import Sampling
from runtime.server.chat import open_chat_template
from runtime.server.templates import Conversation
from runtime.text import Tokenizer, open_tokenizer, pieces, stream, until
from tests.conftest import stock_model
from thanos_deploy.errors import InputError, IntegrityError, PlatformError, UsageError
from thanos_deploy.model.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(exported_llama: Path) -> Tokenizer:
    return open_tokenizer(exported_llama)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_pieces_of_a_text_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    parts = list(pieces(tokenizer, iter(tokenizer.encode(text))))
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a€b")
    seen = []

    def feed() -> "list[int]":
        return ids

    for count in range(1, len(ids) + 1):
        seen.append("".join(pieces(tokenizer, iter(feed()[:count]))))
    assert seen == ["a", "a\ufffd", "a\ufffd", "a€", "a€b"]
    assert list(pieces(tokenizer, iter(ids))) == ["a", "€", "b"]


@given(
    st.lists(st.text("abc", max_size=3)),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_text_ends_before_the_first_stop_string(texts: list[str], stop: list[str]) -> None:
    whole = "".join(texts)
    cuts = [whole.find(end) for end in stop if end in whole]
    passed = "".join(until(iter(texts), stop))
    # The text may be cut at a stop string that ends earlier though it begins later.
    assert whole.startswith(passed)
    if cuts:
        assert not any(end in passed for end in stop)
        assert any(whole[len(passed) :].startswith(end) for end in stop)
    else:
        assert passed == whole


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert list(until(iter(["x<", "e", "nd", "y"]), ["<end>"])) == ["x", "<endy"]
    assert list(until(iter(["x<", "e", "nd", ">y"]), ["<end>"])) == ["x"]


def test_text_is_that_of_transformers(exported_llama: Path, tokenizer: Tokenizer) -> None:
    stock = load_tokenizer(exported_llama / "model")
    prompt = "Once upon"
    assert tokenizer.encode(prompt) == stock(prompt)["input_ids"]
    ids = torch.tensor([tokenizer.encode(prompt)])
    model = stock_model(exported_llama / "model", dtype=torch.float32)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    engine = open_engine(exported_llama)
    text = "".join(stream(engine, tokenizer, prompt, new_tokens=40))
    assert text == stock.decode(expected, skip_special_tokens=True)
    end = text[5:7]
    stopped = "".join(stream(engine, tokenizer, prompt, new_tokens=40, stop=[end]))
    assert stopped == text[: text.index(end)]


def test_sampled_text_follows_the_seed(exported_llama: Path, tokenizer: Tokenizer) -> None:
    engine = open_engine(exported_llama)
    texts = [
        "".join(
            stream(
                engine,
                tokenizer,
                "a",
                new_tokens=30,
                sampling=Sampling(temperature=1.0, seed=seed),
            )
        )
        for seed in (0, 0, 9)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("prompt", "stop"), [("", []), ("a", [""])])
def test_empty_text_is_a_usage_error(
    exported_llama: Path, tokenizer: Tokenizer, prompt: str, stop: list[str]
) -> None:
    with pytest.raises(UsageError, match="empty"):
        next(stream(open_engine(exported_llama), tokenizer, prompt, new_tokens=3, stop=stop))


def test_text_that_is_no_unicode_is_bad_input(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="invalid UTF-8 at character 2"):
        tokenizer.encode("ab\udcff")


def test_a_changed_tokenizer_is_refused(exported_llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "copy"))
    path = bundle / "model" / "tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"a"', b'"b"', 1))
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        open_tokenizer(bundle)
    path.write_text("{}")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        open_tokenizer(bundle, verify=False)
    path.write_bytes(content)
    config = bundle / "model" / "config.json"
    config.write_text(json.dumps({"eos_token_id": 1}))
    with pytest.raises(IntegrityError, match=r"config\.json"):
        open_tokenizer(bundle)


def test_a_bundle_without_a_tokenizer_is_bad_input(exported_llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "copy"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["stages"]["onnx"]["files"]["model/tokenizer.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"tokenizer\.json: no stage"):
        open_tokenizer(bundle)


def test_a_missing_package_names_what_to_install(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(PlatformError) as caught:
        open_tokenizer(exported_llama)
    assert caught.value.fix == "pip install tokenizers"


def test_a_prompt_is_neither_cut_nor_padded(exported_llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "copy"))
    path = bundle / "model" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["truncation"] = {
        **{"direction": "Right", "max_length": 3},
        **{"strategy": "LongestFirst", "stride": 0},
    }
    content["padding"] = {
        **{"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<end>"},
    }
    path.write_text(json.dumps(content))
    ids = open_tokenizer(bundle, verify=False).encode("Once upon a time")
    assert ids == open_tokenizer(exported_llama).encode("Once upon a time")
    assert len(ids) == len("Once upon a time")


def test_a_token_that_only_the_older_file_names_is_special(
    exported_llama: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "copy"))
    model = bundle / "model"
    (model / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<end>"}}))
    (model / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    template = open_chat_template(bundle, verify=False)
    assert template is not None
    assert template.render(Conversation([{"role": "user", "content": "x"}])) == "<end>x"


def test_what_names_special_tokens_is_checked(exported_llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "copy"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = manifest["stages"]["onnx"]["files"]
    files["model/special_tokens_map.json"] = files["model/config.json"]
    files["model/additional_chat_templates/default.jinja"] = files["model/config.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"special_tokens_map\.json"):
        open_tokenizer(bundle)
    shutil.copy(bundle / "model" / "config.json", bundle / "model" / "special_tokens_map.json")
    open_tokenizer(bundle)
    with pytest.raises(IntegrityError, match=r"default\.jinja"):
        open_chat_template(bundle)


@pytest.mark.parametrize(
    "name",
    ["special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/default.jinja"],
)
def test_a_text_file_that_no_stage_wrote_is_refused(
    exported_llama: Path, tmp_path: Path, name: str
) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "copy"))
    path = bundle / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(IntegrityError, match=f"{name}: no stage"):
        open_chat_template(bundle)
    if "template" in name:
        open_tokenizer(bundle)  # which reads none
    else:
        with pytest.raises(IntegrityError, match=f"{name}: no stage"):
            open_tokenizer(bundle)
