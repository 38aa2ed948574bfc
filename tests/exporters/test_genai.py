import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exporters.genai
import exporters.onnx.graph
from tests.conftest import MODEL_TYPES, Exported, stock_model
from thanos_deploy.errors import GateError, InputError, PlatformError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer

pytestmark = pytest.mark.slow

genai = exporters.genai.library()

PROMPT = [72, 101, 108, 108, 111]


def export(onnx: Path, model: Path, out: Path) -> Path:
    result = exporters.genai.export(onnx, model, out)
    assert result.logits_error < result.limit
    return out


@pytest.fixture(scope="module")
def half_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA in half precision, for at most 50 tokens."""
    onnx, folder = (tmp_path_factory.mktemp(name) for name in ("onnx", "genai"))
    exporters.onnx.graph.export(
        Checkpoint.open(tiny_llama), onnx, pattern=None, dtype="fp16", max_sequence=50
    )
    return export(onnx, tiny_llama, folder)


def greedy_by_genai(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def greedy_by_torch(model: Any, prompt: list[int], new_tokens: int, end: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == end:
                break
    return ids[len(prompt) :]


def test_a_graph_of_the_last_logits_generates_the_same_tokens(
    tiny_llama: Path, exported_llama: Path, last_logits: Path, tmp_path: Path
) -> None:
    texts = []
    for name, onnx in (("all", exported_llama / "onnx"), ("last", last_logits)):
        (tmp_path / name).mkdir()
        texts.append(greedy_by_genai(export(onnx, tiny_llama, tmp_path / name), PROMPT, 12))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_generates_the_tokens_of_torch(
    exported_two_four: Exported, tmp_path: Path, model_type: str
) -> None:
    folder = exported_two_four(model_type)
    model = stock_model(folder / "model", dtype=torch.float32)
    expected = greedy_by_torch(model, PROMPT, 24, end=256)
    exported = export(folder / "onnx", folder / "model", tmp_path)
    assert greedy_by_genai(exported, PROMPT, 24) == expected


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_with_widths_of_its_own_in_each_block_generates_the_tokens_of_torch(
    exported_shrunk: Exported, tmp_path: Path, model_type: str
) -> None:
    folder = exported_shrunk(model_type)
    expected = greedy_by_torch(load_model(folder / "model"), PROMPT, 24, end=256)
    exported = export(folder / "onnx", folder / "model", tmp_path)
    assert greedy_by_genai(exported, PROMPT, 24) == expected


def test_half_precision_runs(half_llama: Path) -> None:
    assert len(greedy_by_genai(half_llama, PROMPT, 4)) == 4


def test_the_folder_has_the_models_tokenizer_and_limits(half_llama: Path, tiny_llama: Path) -> None:
    config = json.loads((half_llama / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 50
    assert config["model"]["eos_token_id"] == 256
    text = "A café, 3 €."
    tokenizer = genai.Tokenizer(genai.Model(str(half_llama)))
    ids = load_tokenizer(tiny_llama)(text)["input_ids"]
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.decode(np.array(ids, dtype=np.int32)) == text


def test_other_logits_than_those_of_onnx_runtime_are_a_missed_gate(
    exported_llama: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = exporters.genai._logits

    def other(session: Any, ids: Any) -> Any:
        return logits(session, (ids + 1) % 257)

    monkeypatch.setattr(exporters.genai, "_logits", other)
    with pytest.raises(GateError, match="logits differ"):
        exporters.genai.export(exported_llama / "onnx", tiny_llama, tmp_path)


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(PlatformError) as caught:
        exporters.genai.library()
    assert "thanos-deploy[genai]" in caught.value.fix


def test_a_missing_export_is_bad_input(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export\.json"):
        exporters.genai.export(tmp_path, tiny_llama, tmp_path)
