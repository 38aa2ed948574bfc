import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import open_engine
from runtime.sampling import Sampling
from runtime.server.chat import open_chat_template
from runtime.server.templates import Conversation
from runtime.text import StopStrings, Tokenizer, open_tokenizer, pieces, stream, until
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
    st.lists(st.text("ab", max_size=3)),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=3),
)
@settings(max_examples=500)
def test_text_ends_before_the_first_stop_string(texts: list[str], stop: list[str]) -> None:
    """However the text is cut, it is that before the stop string that ends first."""
    whole = "".join(texts)
    ends = [
        place - len(end)
        for place in range(len(whole) + 1)
        for end in sorted(stop, key=len, reverse=True)
        if whole[:place].endswith(end)
    ]
    assert "".join(until(iter(texts), stop)) == (whole[: ends[0]] if ends else whole)


def test_the_work_on_a_character_does_not_grow_with_the_stop_strings() -> None:
    class Counted(str):
        compared = 0

        def __getitem__(self, place: object) -> str:
            Counted.compared += 1
            return super().__getitem__(place)  # type: ignore[index]

    strings = StopStrings([Counted("a" * 1000), Counted("a" * 999 + "b")])
    text = ("a" * 900 + "c") * 2
    assert "".join(map(strings.push, text)) == text
    assert Counted.compared < 20 * len(text)


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    """The id of a byte: byte-level tokenizers have a character for each."""
    same = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - same)
    symbol = chr(byte) if byte in same else chr(256 + others.index(byte))
    found: int = tokenizer._tokenizer.token_to_id(symbol)
    return found


class Counting(Tokenizer):
    """Counts the ids that it decodes."""

    decoded = 0

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        self.decoded += len(ids)
        return super().decode(ids, specials=specials)


@given(st.lists(st.sampled_from([0x61, 0x80, 0xE2, 0x82, 0xAC, 0xF0, 0x9F]), max_size=60))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_are_given_out_as_they_are_decoded(
    tokenizer: Tokenizer, content: list[int]
) -> None:
    ids = [byte_id(tokenizer, byte) for byte in content]
    assert "".join(pieces(tokenizer, ids)) == bytes(content).decode(errors="replace")


def test_what_never_becomes_a_character_is_decoded_in_short_pieces(
    tokenizer: Tokenizer,
) -> None:
    counting = Counting(tokenizer._tokenizer, tokenizer.stop)
    continuing = byte_id(tokenizer, 0x80)
    special = next(iter(tokenizer.stop))
    for token, text in ((continuing, "\ufffd" * 500), (special, "")):
        counting.decoded = 0
        assert "".join(pieces(counting, [token] * 500)) == text
        assert counting.decoded < 500 * 100


def test_a_long_text_is_encoded_and_decoded_while_other_threads_go_on(
    tokenizer: Tokenizer,
) -> None:
    """Python's lock is given back: only batches do that, so that nothing else may be called."""

    class Batches:
        def __getattr__(self, name: str) -> object:
            assert name not in ("encode", "decode")
            return getattr(tokenizer._tokenizer, name)

    batched = Tokenizer(Batches(), tokenizer.stop)
    assert batched.decode(batched.encode("a<|b"), specials=True) == "a<|b"


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
