import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runtime.engine import backends, open_engine, stop_ids
from runtime.engines import onnxruntime as backend
from runtime.generate import generate
from tests.conftest import VOCABULARY, stock_model
from thanos_deploy.errors import InputError, PlatformError


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return stock_model(tiny_llama, dtype=torch.float32)


def test_prefill_and_decode_agree_with_torch(exported_llama: Path, model: Any) -> None:
    engine = open_engine(exported_llama)
    ids = torch.randint(VOCABULARY, (3, 12))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    np.testing.assert_allclose(engine.prefill(ids[:, :8].numpy()), expected[:, 7], atol=1e-5)
    for position in range(8, 12):
        logits = engine.decode(ids[:, position].numpy())
        np.testing.assert_allclose(logits, expected[:, position], atol=1e-5)


def test_a_new_prefill_forgets_the_text_before(exported_llama: Path) -> None:
    engine = open_engine(exported_llama)
    ids = np.array([[1, 2, 3]])
    first = engine.prefill(ids)
    engine.decode(np.array([4]))
    np.testing.assert_array_equal(engine.prefill(ids), first)


def test_padding_on_the_left_changes_nothing(exported_llama: Path) -> None:
    engine = open_engine(exported_llama)
    alone = engine.prefill(np.array([[7, 8, 9]]))
    then = engine.decode(np.array([10]))
    padded = np.array([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5]])
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_allclose(engine.prefill(padded, mask)[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(engine.decode(np.array([10, 6]))[0], then[0], atol=1e-5)


def test_greedy_text_is_that_of_transformers(exported_llama: Path, model: Any) -> None:
    prompt = [72, 101, 108, 108, 111]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    ids = list(generate(open_engine(exported_llama), prompt, new_tokens=40, stop={256}))
    assert prompt + ids == [token for token in expected[0].tolist() if token != 256]


class Counter:
    """An engine without a model: the next token is the last one plus one."""

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        return self.decode(ids[:, -1])

    def decode(self, ids: np.ndarray) -> np.ndarray:
        logits: np.ndarray = np.eye(100, dtype=np.float32)[ids + 1]
        return logits


def test_generation_ends_at_the_limit_or_before_a_stop_token() -> None:
    assert list(generate(Counter(), [1, 5], new_tokens=4)) == [6, 7, 8, 9]
    assert list(generate(Counter(), [5], new_tokens=4, stop={8})) == [6, 7]
    assert list(generate(Counter(), [5], new_tokens=0)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": '{"eos_token_id": 3}'}, {3}),
        (
            {
                "config.json": '{"eos_token_id": 3}',
                "generation_config.json": '{"eos_token_id": [4, 5]}',
            },
            {4, 5},
        ),
        ({"config.json": '{"eos_token_id": 3}', "generation_config.json": "{}"}, {3}),
        ({"config.json": "{}"}, set()),
        ({}, set()),
    ],
)
def test_stop_tokens_come_from_the_models_configuration(
    tmp_path: Path, files: dict[str, str], expected: set[int]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert stop_ids(tmp_path) == expected


def test_an_unreadable_configuration_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config\.json"):
        stop_ids(tmp_path)


def test_a_missing_model_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_engine(tmp_path)
    assert "thanos-deploy export" in caught.value.fix


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_a_truncated_model_is_bad_input(exported_llama: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "onnx" / name).write_bytes((exported_llama / "onnx" / name).read_bytes())
    path = tmp_path / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="ONNX Runtime cannot load it"):
        open_engine(tmp_path)


def test_another_provider_than_asked_for_is_an_error(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime without a GPU takes this request and answers with the CPU, silently."""
    monkeypatch.setattr(backend, "PROVIDER", "CUDAExecutionProvider")
    with pytest.raises(PlatformError, match=r"asked ONNX Runtime for CUDA.* and got CPU"):
        backend.open_engine(exported_llama)


def test_a_missing_backend_names_what_to_install(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PlatformError) as caught:
        open_engine(exported_llama)
    assert caught.value.fix == "pip install onnxruntime-gpu"


def test_backends_are_found_by_their_files() -> None:
    assert backends() == ["onnxruntime"]


def test_importing_the_runtime_loads_no_torch_no_transformers_and_no_onnx() -> None:
    code = (
        "import sys, runtime.engine, runtime.generate, runtime.latency, runtime.paired\n"
        "print(*({'torch', 'transformers', 'onnx', 'onnxruntime'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_cache_is_handed_on_without_a_copy_through_python(exported_llama: Path) -> None:
    engine = open_engine(exported_llama)
    assert isinstance(engine, backend.OnnxRuntimeEngine)
    seen: list[dict[str, object]] = []
    run = engine._session.run_with_ort_values

    def spy(outputs: list[str], feeds: dict[str, object]) -> object:
        seen.append(feeds)
        return run(outputs, feeds)

    engine._session = SimpleNamespace(run_with_ort_values=spy)
    engine.prefill(np.array([[1, 2]]))
    before = list(engine._cache)
    engine.decode(np.array([3]))
    assert [seen[1][name] for name in engine._past] == before
