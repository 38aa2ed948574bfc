"""What is read from a tokenizer's files, beside what transformers makes of them."""

import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from runtime.server.templates import ChatTemplate, Conversation
from tests.conftest import MODEL_TYPES, MakeModel
from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import ModelError, PlatformError
from thanos_deploy.model import tokenizer_files
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.load import load_tokenizer

TEXTS = (
    "",
    " ",
    "Once upon a time, there was a text that is longer than any window.",
    "<s>a</s> <s> b<x> <x>c <pad>",
    "  two spaces\n\n\ttab  ",
    "naïve 東京 €5 🙂",
    "don't [stop] , now .",
)
WHOLE = ("TokenizersBackend", "PreTrainedTokenizerFast")
# The library has a class for this one, whatever its files say.
OWN_CLASS = "qwen2"


def _tokenizer(kind: str, *, framed: bool, named: bool) -> Tokenizer:
    letters = sorted({letter for text in TEXTS for letter in text} - {" "})
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*special, *symbols, "on", "th"]
        made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("o", "n"), ("t", "h")]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif kind == "pieces":
        rest = [f"<0x{byte:02X}>" for byte in range(256)]
        tokens = [*special, *rest, "▁", *letters, "▁t", "on"]
        made = Tokenizer(
            models.BPE(
                {t: i for i, t in enumerate(tokens)},
                [("▁", "t"), ("o", "n")],
                unk_token="<unk>",
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace()
    else:
        tokens = [*special, "Once", "a", "text", ",", ".", "there"]
        made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    if named:
        made.add_special_tokens(["<s>", "</s>"])
    if framed:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return made


def _spelled(token: str, how: str) -> Any:
    if how == "text":
        return token
    rules = {"content": token, "lstrip": how == "strips", "normalized": False}
    return {"__type": "AddedToken", **rules, "rstrip": False, "single_word": False}


HOW = st.sampled_from(["text", "rules", "strips"])
TOKENS = st.sampled_from(["<s>", "</s>", "<x>", "Once", "[stop]"])
ROLES = st.dictionaries(
    st.sampled_from(["bos_token", "eos_token", "unk_token", "pad_token", "image_token"]),
    st.builds(_spelled, TOKENS, HOW),
    max_size=4,
)
EXTRA = st.lists(TOKENS, max_size=2, unique=True)


@st.composite
def configurations(draw: st.DrawFn) -> Json:
    found = draw(ROLES)
    for name in ("add_bos_token", "add_eos_token", "split_special_tokens"):
        if (value := draw(st.sampled_from([None, False, True]))) is not None:
            found[name] = value
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if draw(st.booleans()):
            found[name] = draw(EXTRA)
    if draw(st.booleans()):
        found["model_max_length"] = 4
        found["padding_side"] = "left"
    if draw(st.booleans()):
        found["added_tokens_decoder"] = {
            str(id_): {"content": token, "lstrip": strip, "special": special}
            for id_, token, strip, special in (
                (1, "<s>", draw(st.booleans()), True),
                (700, "<x>", draw(st.booleans()), draw(st.booleans())),
            )
        }
    return found


def _older(tokens: Mapping[str, Any]) -> Json:
    """As special_tokens_map.json has them: rules without the mark."""
    return {
        name: {key: value for key, value in token.items() if key != "__type"}
        if isinstance(token, dict)
        else token
        for name, token in tokens.items()
    }


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Json]:
    """Files by their names."""
    kind = draw(st.sampled_from(["bytes", "pieces", "words"]))
    made = _tokenizer(kind, framed=draw(st.booleans()), named=draw(st.booleans()))
    if draw(st.booleans()):
        made.enable_truncation(3)
    if draw(st.booleans()):
        made.enable_padding(length=90, pad_id=0, pad_token="<unk>")
    files: dict[str, Json] = {"tokenizer.json": json.loads(made.to_str())}
    if draw(st.booleans()):
        files["tokenizer_config.json"] = draw(configurations())
    if draw(st.booleans()):
        files["special_tokens_map.json"] = _older(draw(ROLES))
        if draw(st.booleans()):
            files["special_tokens_map.json"]["additional_special_tokens"] = draw(EXTRA)
    if draw(st.booleans()):
        files["added_tokens.json"] = {"<x>": made.get_vocab_size()}
    return files


@contextmanager
def written(files: Mapping[str, Json]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_text(json.dumps(content))
        yield Path(folder)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The library warns of classes that it does not know."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def made_by(stock: Any) -> list[tuple[list[int], str]]:
    """Ids and texts of `TEXTS`, with what is put around them and without."""
    found = []
    for text in TEXTS:
        for framed in (True, False):
            ids = stock(text, add_special_tokens=framed)["input_ids"]
            found.append((ids, stock.decode(ids, skip_special_tokens=True)))
    return found


def require_same(folder: Path, stock: Any) -> None:
    ours = tokenizer_files.load(folder)
    found = []
    for text in TEXTS:
        for framed in (True, False):
            ids = ours.encode(text, add_special_tokens=framed).ids
            found.append((ids, ours.decode(ids)))
    assert found == made_by(stock)
    assert tokenizer_files.special_tokens(folder) == stock.special_tokens_map


@pytest.mark.slow
@given(
    files=folders(),
    kind=st.sampled_from(WHOLE),
    family=st.sampled_from(sorted({*MODEL_TYPES} - {OWN_CLASS})),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_files_say_what_transformers_makes_of_them(
    files: dict[str, Json], kind: str, family: str
) -> None:
    configuration = {**files.get("tokenizer_config.json", {}), "tokenizer_class": kind}
    whole = {
        **files,
        "tokenizer_config.json": configuration,
        "config.json": {"model_type": family},
    }
    with written(whole) as folder:
        require_same(folder, AutoTokenizer.from_pretrained(folder, local_files_only=True))


# Not among them: tokens that strip what is to the left of them, named for a class that transformers
# builds anew. There a copy can give other ids (of two such tokens in a row) than the original.
ADDED: dict[str, dict[str, Json]] = {
    "nothing named": {},
    "named in the configuration": {
        "tokenizer_config.json": {"bos_token": "<s>", "pad_token": "<x>"}
    },
    "named in the map alone": {
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"}
    },
    "another class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
}


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("named", ADDED)
def test_a_copy_says_what_the_library_adds(named: str, cuts: bool, family: str) -> None:
    made = _tokenizer("bytes", framed=True, named=True)
    if cuts:
        made.enable_truncation(3)
        made.enable_padding(length=90, pad_id=0, pad_token="<unk>")
    files = {
        "tokenizer.json": json.loads(made.to_str()),
        "config.json": {"model_type": family},
        **ADDED[named],
    }
    with written(files) as original, written({}) as copy:
        stock = AutoTokenizer.from_pretrained(original, local_files_only=True)
        copy_companions(original, copy, None)
        require_same(copy, stock)
        require_same(copy, AutoTokenizer.from_pretrained(copy, local_files_only=True))


NAMES = st.lists(st.sampled_from(["default", "tool_use", "rag"]), unique=True)


@given(
    file=st.booleans(),
    named=NAMES,
    inside=st.one_of(st.none(), st.just("inside"), NAMES),
    added=st.booleans(),
    bos=st.builds(_spelled, TOKENS, HOW),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_conversation_begins_as_transformers_begins_it(
    file: bool, named: list[str], inside: str | list[str] | None, added: bool, bos: Any
) -> None:
    made = _tokenizer("bytes", framed=False, named=True)
    write = "{{ bos_token }}{{ messages[0].content }}"
    configuration: Json = {"tokenizer_class": "TokenizersBackend"}
    if inside is not None:
        configuration["chat_template"] = (
            f"inside{write}"
            if isinstance(inside, str)
            else [{"name": name, "template": f"inside {name}{write}"} for name in inside]
        )
    if added:
        configuration |= {"added_tokens_decoder": {}, "bos_token": "<s>"}
    files: dict[str, Json] = {
        "tokenizer.json": json.loads(made.to_str()),
        "tokenizer_config.json": configuration,
        "special_tokens_map.json": _older({"bos_token": bos}),
        "config.json": {"model_type": "llama"},
    }
    with written(files) as original, written({}) as copy:
        if file:
            (original / tokenizer_files.TEMPLATE).write_text(f"file{write}")
        for name in named:
            path = original / tokenizer_files.TEMPLATES / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"named {name}{write}")
        copy_companions(original, copy, None)
        stock: Any = AutoTokenizer.from_pretrained(original, local_files_only=True)
        messages = [{"role": "user", "content": "x"}]
        for folder in (original, copy):
            source = tokenizer_files.chat_template(folder)
            if source is None:
                with pytest.raises(ValueError, match="template"):
                    stock.apply_chat_template(messages, tokenize=False)
            else:
                ours = ChatTemplate(source, tokenizer_files.special_tokens(folder))
                assert ours.render(Conversation(messages)) == stock.apply_chat_template(
                    messages, tokenize=False
                )


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_files_before_tokenizer_json_make_one(tmp_path: Path, add_bos: bool) -> None:
    """As OPT's official files have it: a vocabulary, merges, and a token in front of each text."""
    folder, copy = tmp_path / "model", tmp_path / "copy"
    for path in (folder, copy):
        path.mkdir()
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *symbols, "on", "th"]
    write(folder / "vocab.json", {token: id_ for id_, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\no n\nt h\n")
    end = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False}
    named = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": "<pad>"}
    own = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "add_bos_token": add_bos}
    write(folder / tokenizer_files.CONFIGURATION, {**own, **named})
    write(folder / tokenizer_files.SPECIAL_TOKENS, named)
    write(folder / "config.json", {"model_type": "opt"})
    copy_companions(folder, copy, None)
    library, ours = AutoTokenizer.from_pretrained(folder), tokenizer_files.load(copy)
    assert (copy / tokenizer_files.TOKENIZER).is_file()
    for text in TEXTS:
        ids = library(text)["input_ids"]
        assert ours.encode(text).ids == ids == AutoTokenizer.from_pretrained(copy)(text).input_ids
        assert ids[:1] == ([2] if add_bos else ids[:1])
    assert len(library("on")["input_ids"]) == 1 + add_bos


def test_a_sentencepiece_model_alone_names_the_package_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    write(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(PlatformError, match=r"tokenizer\.model: .* SentencePiece") as raised:
        load_tokenizer(tmp_path)
    assert "thanos-deploy[sentencepiece]" in raised.value.fix


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("length", ["far", [4], {"most": 4}], ids=["text", "list", "object"])
def test_a_length_that_is_no_number_is_refused_when_the_tokenizer_is_loaded(
    make_model: MakeModel, length: object
) -> None:
    """The library looks at it with the first text only."""
    folder = make_model("llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": length}))
    with pytest.raises(ModelError, match="no tokenizer that can be loaded"):
        load_tokenizer(folder)
