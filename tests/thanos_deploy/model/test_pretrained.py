"""No code that comes with a model runs, whatever asks for it and whatever is answered."""

import ast
import builtins
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.conftest import MODEL_TYPES, VOCABULARY, Invoke, MakeModel, stock_model
from tests.gguf_file import write_gguf
from thanos_deploy.errors import ModelError
from thanos_deploy.model import pretrained
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer

ROOT = Path(__file__).parents[3]
PACKAGES = ("thanos_deploy", "exporters", "runtime", "benchmarks")
LOADERS = {"from_pretrained", "from_config", "load_dataset", "get_class_from_dynamic_module"}

CANARY = """
from pathlib import Path
Path({ran!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Words(PreTrainedTokenizerFast): pass
def generate(model, **_): return None
"""


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model with Python beside it, which leaves a file where it runs."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    plant(folder, tmp_path / "ran")
    return folder


def plant(folder: Path, ran: Path) -> None:
    content = CANARY.format(ran=str(ran))
    for name in ("canary.py", "custom_generate/generate.py", "__init__.py", "conftest.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


@pytest.fixture(autouse=True)
def _yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever asks on the terminal is answered yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


def edit(path: Path, **entries: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **entries}))


def config_class(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "canary.Config"})


def model_class(folder: Path) -> None:
    edit(
        folder / "config.json",
        auto_map={
            "AutoConfig": "canary.Config",
            "AutoModelForCausalLM": "canary.Model",
            "AutoTokenizer": ["canary.Words", "canary.Words"],
        },
    )


def elsewhere(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "owner/repo--canary.Model"})


def tokenizer_class(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "canary.Words"]},
        tokenizer_class="Words",
    )


def old_tokenizer_class(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map=["canary.Words", None], tokenizer_class="Words")


def strange_tokenizer_class(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "canary.Words"})


def processor(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor.json"):
        edit(folder / name, auto_map={"AutoProcessor": "canary.Words"}, processor_class="Words")


def generation(folder: Path) -> None:
    edit(
        folder / "generation_config.json",
        auto_map={"GenerationConfig": "canary.Config"},
        custom_generate=".",
        trust_remote_code=True,
    )


def attention(folder: Path) -> None:
    edit(
        folder / "config.json",
        attn_implementation="owner/kernel",
        _attn_implementation="owner/kernel",
        _attn_implementation_internal="owner/kernel",
        trust_remote_code=True,
    )


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os }}"
    )


PLACES = [
    *(config_class, model_class, elsewhere, tokenizer_class, old_tokenizer_class),
    *(strange_tokenizer_class, processor, generation, attention, template),
]


@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_model_never_runs(
    model: Path, tmp_path: Path, invoke: Invoke, place: Callable[[Path], None]
) -> None:
    place(model)
    out = tmp_path / "out"
    code, _, said = invoke(
        "prune",
        model,
        "--pattern",
        "2:4",
        "--nsamples",
        "2",
        "--seqlen",
        "16",
        "--preset",
        "paper",
        "-o",
        out,
    )
    assert code == 0, said  # an architecture and a tokenizer.json that the library knows
    load_model(out / "model")
    load_tokenizer(out / "model")
    assert not (tmp_path / "ran").exists()
    assert not list(out.rglob("*.py"))
    assert not (tmp_path / "modules").exists()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_family_asks_for_its_tokenizers_code(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder = make_model(model_type)
    plain = load_tokenizer(folder)("Ännchen's 3.")["input_ids"]
    plant(folder, tmp_path / "ran")
    for place in (tokenizer_class, model_class):
        place(folder)
    assert load_tokenizer(folder)("Ännchen's 3.")["input_ids"] == plain
    load_model(folder)
    assert not (tmp_path / "ran").exists()


def unknown_type(folder: Path) -> None:
    edit(
        folder / "config.json",
        model_type="canary",
        auto_map={"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model"},
    )


def tokenizer_of_code_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    tokenizer_class(folder)


@pytest.mark.parametrize("place", [unknown_type, tokenizer_of_code_alone])
def test_a_model_that_is_nothing_without_its_code_is_refused(
    model: Path, tmp_path: Path, invoke: Invoke, place: Callable[[Path], None]
) -> None:
    place(model)
    for command in ("prune", "eval"):
        options = ["--pattern", "2:4", "-o", tmp_path / "out"] if command == "prune" else []
        code, _, said = invoke(command, model, *options)
        assert code == 3, said
        assert "Traceback" not in said
    assert not (tmp_path / "ran").exists()


def test_the_refusal_names_the_code(model: Path) -> None:
    tokenizer_of_code_alone(model)
    with pytest.raises(
        ModelError, match=r"would run code that comes with the model.*canary\.Words"
    ):
        load_tokenizer(model)


def test_no_kernel_of_a_configuration_is_fetched(model: Path) -> None:
    attention(model)
    config = Checkpoint.open(model).config
    assert config._attn_implementation is None
    assert load_model(model).config._attn_implementation == "sdpa"
    assert "owner/kernel" not in str(Checkpoint.open(model).skeleton().config)


def test_the_base_model_of_an_adapter_is_not_looked_for(model: Path) -> None:
    edit(model / "adapter_config.json", base_model_name_or_path="../../elsewhere")
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_model(model)


def test_pickles_are_not_read(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="may run code"):
        load_model(model)
    with pytest.raises(ModelError):
        pretrained.load_model(model)


def test_what_lies_beside_a_gguf_file_is_not_looked_at(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model("qwen2", max_position_embeddings=512)
    beside = tmp_path / "downloads"
    beside.mkdir()
    write_gguf(folder, beside / "model.gguf")
    plant(beside, tmp_path / "ran")
    for place in (model_class, tokenizer_class, generation):
        place(beside)
    loaded, _ = pretrained.load_gguf(beside / "model.gguf")
    assert loaded.config.model_type == "qwen2"
    assert not (tmp_path / "ran").exists()


def test_a_gguf_file_is_parsed_once(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time takes seconds for a vocabulary; and the package is as it was afterwards."""
    folder = make_model("qwen2", max_position_embeddings=512)
    write_gguf(folder, tmp_path / "model.gguf")
    parsed = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    loaded, tokenizer = pretrained.load_gguf(tmp_path / "model.gguf")
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counting
    expected = stock_model(folder).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    ids = list(range(VOCABULARY))
    assert tokenizer.convert_ids_to_tokens(ids) == load_tokenizer(folder).convert_ids_to_tokens(ids)


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def called(call: ast.Call) -> str:
    match call.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def test_one_module_makes_all_calls_that_could_run_code() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(called(call) in LOADERS for call in calls(path))
    }
    assert found == {"thanos_deploy/model/pretrained.py"}


def test_every_such_call_forbids_code() -> None:
    made = [
        call
        for call in calls(ROOT / "thanos_deploy/model/pretrained.py")
        if called(call) in LOADERS
    ]
    assert len(made) >= 6
    for call in made:
        given: dict[str | None, Any] = {keyword.arg: keyword.value for keyword in call.keywords}
        assert ast.literal_eval(given["trust_remote_code"]) is False
        if called(call) == "from_pretrained":
            assert ast.literal_eval(given["local_files_only"]) is True


def test_nothing_else_speaks_of_trust() -> None:
    for path in sources():
        for call in calls(path):
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.literal_eval(keyword.value) is False, path
