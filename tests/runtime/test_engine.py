"""Engines behind one contract: what they compute, what they read, and what they refuse.

The tests share the bundles that they open, so they are in one long file.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import exporters.onnx.graph
from runtime.engine import backends, open_engine, stop_ids
from runtime.engines import onnxruntime as backend
from runtime.generate import generate
from tests.conftest import VOCABULARY, Exported, stock_model
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import claim
from thanos_deploy.bundle.record import Source
from thanos_deploy.errors import InputError, IntegrityError, PlatformError, UsageError
from thanos_deploy.gpu import driver
from thanos_deploy.model.checkpoint import Checkpoint


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

    max_sequence = 7

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        return self.decode(ids[:, -1])

    def decode(self, ids: np.ndarray) -> np.ndarray:
        logits: np.ndarray = np.eye(100, dtype=np.float32)[ids + 1]
        return logits


def test_generation_ends_at_the_limit_or_before_a_stop_token() -> None:
    assert list(generate(Counter(), [1, 5], new_tokens=4)) == [6, 7, 8, 9]
    assert list(generate(Counter(), [5], new_tokens=4, stop={8})) == [6, 7]
    assert list(generate(Counter(), [5], new_tokens=0)) == []


def test_generation_ends_where_the_engine_takes_no_more() -> None:
    assert list(generate(Counter(), [1, 2, 3, 4, 5], new_tokens=9)) == [6, 7, 8]


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


def test_a_folder_that_is_no_bundle_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a bundle"):
        open_engine(tmp_path)


@pytest.fixture
def bundle(exported_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported_llama, tmp_path / "copy"))


def forbid_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "export.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_file_is_refused_before_onnxruntime_sees_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    path = bundle / "onnx" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    if damage == "remove":
        path.unlink()
    forbid_onnxruntime(monkeypatch)
    with pytest.raises(IntegrityError, match=name) as caught:
        open_engine(bundle)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_without_the_check_a_truncated_model_is_bad_input(bundle: Path, keep: int) -> None:
    path = bundle / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        InputError, match=r"model\.onnx: (ONNX Runtime cannot load it|not readable as an ONNX)"
    ):
        open_engine(bundle, verify=False)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "export.json"])
def test_without_the_check_a_missing_file_is_bad_input(bundle: Path, name: str) -> None:
    (bundle / "onnx" / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        open_engine(bundle, verify=False)


@pytest.mark.parametrize("content", ["[", "{}", '{"max_sequence": "8"}', "[1]"])
def test_an_unreadable_record_is_bad_input(bundle: Path, content: str) -> None:
    (bundle / "onnx" / "export.json").write_text(content)
    with pytest.raises(InputError, match=r"export\.json"):
        open_engine(bundle, verify=False)


def test_a_graph_with_other_inputs_is_bad_input(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]
    graph.graph.input[0].name = "tokens"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(InputError, match="inputs tokens, attention_mask"):
        open_engine(bundle, verify=False)


def test_a_bundle_of_a_newer_format_is_bad_input(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(InputError, match="bundle format 2"):
        open_engine(bundle)


def test_a_bundle_without_an_export_names_the_command(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "stages": {}}))
    with pytest.raises(InputError) as caught:
        open_engine(bundle)
    assert "thanos-deploy export" in caught.value.fix


@pytest.mark.parametrize(
    ("ids", "seen"),
    [
        (np.zeros((0, 3), np.int64), r"\[0, 3\]"),
        (np.zeros((1, 0), np.int64), r"\[1, 0\]"),
        (np.zeros(3, np.int64), r"\[3\]"),
        (np.array([[5, VOCABULARY]]), f"5 to {VOCABULARY}"),
        (np.array([[-1, 5]]), "-1 to 5"),
        (np.zeros((1, 129), np.int64), "129 tokens: the export is made for at most 128"),
    ],
)
def test_ids_that_cannot_be_read_are_refused(
    exported_llama: Path, ids: np.ndarray, seen: str
) -> None:
    with pytest.raises(UsageError, match=seen):
        open_engine(exported_llama).prefill(ids)


def test_decoding_stops_at_the_longest_sequence(exported_llama: Path) -> None:
    engine = open_engine(exported_llama)
    engine.prefill(np.zeros((1, 127), np.int64))
    engine.decode(np.array([1]))
    with pytest.raises(UsageError, match="129 tokens"):
        engine.decode(np.array([1]))


def test_an_unknown_backend_or_provider_is_a_usage_error(exported_llama: Path) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        open_engine(exported_llama, backend="tpu")
    with pytest.raises(UsageError, match="'tpu'"):
        open_engine(exported_llama, provider="tpu")


@pytest.mark.slow
def test_half_precision_agrees_with_torch(
    tiny_llama: Path, exported_llama: Path, model: Any, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(exported_llama, tmp_path / "half"))
    exporters.onnx.graph.export(
        Checkpoint.open(tiny_llama), out / "onnx", pattern=None, dtype="fp16"
    )
    engine = open_engine(out, verify=False)
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    spread = expected.max() - expected.min()
    for actual, position in (
        (engine.prefill(ids[:, :8].numpy()), 7),
        (engine.decode(ids[:, 8].numpy()), 8),
    ):
        assert actual.dtype == np.float32
        assert np.abs(actual - expected[:, position]).max() < 5e-3 * spread


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_onnx_runtime_silently_replaces_is_an_error(
    exported_llama: Path,
    provider: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if driver.probe().gpus:
        pytest.skip("there is a GPU: the provider may well be there")
    # As on a machine with a GPU whose libraries do not fit.
    monkeypatch.setattr(driver, "require", lambda: None)
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda **_: print("Failed to load libcublas.so.13: no such")
    )
    said = r"asked ONNX Runtime for \w+ and got (CPU|none).*: Failed to load libcublas\.so\.13"
    with pytest.raises(PlatformError, match=said):
        open_engine(exported_llama, provider=provider)
    assert capsys.readouterr().out == ""  # which belongs to the results of a command


def test_the_cuda_libraries_of_pips_packages_are_loaded_before_the_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may lie in another folder of packages than ONNX Runtime."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    loaded: list[str] = []

    def preload_dlls(directory: str | None = None) -> None:
        loaded.append(directory or "")
        if str(folder) not in loaded or directory not in (None, str(folder)):
            print("Failed to load libcudart.so.13")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload_dlls)
    assert backend._load_cuda(onnxruntime) == ""
    assert str(folder) in loaded
    assert loaded[-1] == ""  # what counts is what can be found in the end


def test_a_missing_backend_names_what_to_install(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PlatformError) as caught:
        open_engine(exported_llama)
    assert caught.value.fix == "pip install onnxruntime-gpu"


def test_backends_are_found_by_their_files() -> None:
    assert backends() == ["onnxruntime", "tensorrt", "torch"]


def test_importing_the_runtime_loads_no_torch_no_transformers_and_no_onnx() -> None:
    code = (
        "import sys, runtime.engine, runtime.generate, runtime.text\n"
        "import thanos_deploy.measure.latency, thanos_deploy.measure.paired\n"
        "print(*({'torch', 'transformers', 'onnx', 'onnxruntime'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_generating_text_loads_no_torch_no_transformers_and_no_onnx(exported_llama: Path) -> None:
    code = (
        "import sys\n"
        "from thanos_deploy import cli\n"
        f"sys.argv = ['thanos-deploy', 'generate', {str(exported_llama)!r}, 'Hello']\n"
        "cli._run()\n"
        "print(*({'torch', 'transformers', 'onnx'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert done.stdout.strip()


def test_the_cache_is_handed_on_without_a_copy_through_python(exported_llama: Path) -> None:
    engine = open_engine(exported_llama)
    assert isinstance(engine, backend.OnnxRuntimeEngine)
    steps: list[Any] = []
    graph = engine._graph
    run = graph._session.run_with_iobinding

    def spy(binding: Any) -> None:
        run(binding)
        steps.append(binding)

    session = graph._session
    graph._session = SimpleNamespace(io_binding=session.io_binding, run_with_iobinding=spy)
    engine.prefill(np.array([[1, 2]]))
    held = [tensor.address for tensor in engine._cache]
    assert held == [value.data_ptr() for value in steps[0].get_outputs()[1:]]
    bound = {}
    io_binding = session.io_binding

    def watch() -> Any:
        binding = io_binding()
        bind = binding.bind_input

        def record(name: str, *place: Any) -> None:
            bound[name] = place[-1]
            bind(name, *place)

        binding.bind_input = record
        return binding

    graph._session.io_binding = watch
    engine.decode(np.array([3]))
    assert [bound[entry.name] for entry in graph._past] == held


def test_tensorrt_is_asked_for_sparse_kernels_exactly_where_the_graph_holds_two_four(
    exported_two_four: Exported, exported_llama: Path, tmp_path: Path
) -> None:
    def options_of(graph: Path) -> dict[str, str]:
        def produce(folder: Path) -> Json:
            shutil.copytree(graph, folder / "onnx")
            return {}

        with claim(tmp_path / graph.parent.name, Source("folder", "tiny", "", "")) as bundle:
            bundle.run("onnx", produce, options={}, inputs={})
            return backend.tensorrt_options(bundle)

    sparse = options_of(exported_two_four("llama") / "onnx")
    dense = options_of(exported_llama / "onnx")
    assert (sparse["trt_sparsity_enable"], dense["trt_sparsity_enable"]) == ("1", "0")
    # A cache of another graph is never taken for this one's.
    assert sparse["trt_engine_cache_path"] != dense["trt_engine_cache_path"]
    assert "past_key_values.1.value:1x2x0x8" in sparse["trt_profile_min_shapes"].split(",")
    assert "input_ids:1x128" in sparse["trt_profile_opt_shapes"].split(",")
    assert "past_key_values.0.key:8x2x127x8" in sparse["trt_profile_max_shapes"].split(",")
    names = {shape.partition(":")[0] for shape in sparse["trt_profile_max_shapes"].split(",")}
    session = onnxruntime.InferenceSession(
        exported_two_four("llama") / "onnx" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert names == {entry.name for entry in session.get_inputs()}


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_provider_without_a_gpu_is_refused(exported_llama: Path, provider: str) -> None:
    if driver.probe().gpus:
        pytest.skip("there is a GPU")
    with pytest.raises(PlatformError, match="no GPU"):
        open_engine(exported_llama, provider=provider)
