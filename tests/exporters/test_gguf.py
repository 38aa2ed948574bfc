"""GGUF files, run by llama.cpp and by its server."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import openai
import pytest
import torch
from conversion.base import TextModel
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

import exporters.gguf
import thanos_deploy as td
from exporters import llama_cpp, targets
from exporters.targets.gguf import GgufResult
from tests.conftest import VOCABULARY, Exported, MakeModel, stock_model
from thanos_deploy.bundle import manifest
from thanos_deploy.errors import GateError, ModelError, PlatformError, UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.quantise import quantise_model
from thanos_deploy.solver.grid import parse

pytestmark = pytest.mark.slow

PROMPT = [72, 101, 108, 108, 111]

# What some types need beside the sizes of the tiny models: the converter takes GPT-2 to be four
# times as wide inside, and Qwen2's tokenizer has tokens of its own.
SIZES: dict[str, dict[str, object]] = {"gpt2": {"n_inner": 128}, "qwen2": {"vocab_size": 260}}


@pytest.fixture(autouse=True)
def _known_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter knows tokenizers by a hash, and not the one that these models have."""
    monkeypatch.setattr(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")


def export(model: Path, out: Path, dtype: str = "fp32") -> GgufResult:
    return exporters.gguf.export(Checkpoint.open(model), out, dtype=dtype)


def greedy_by_torch(model: torch.nn.Module, tokens: int) -> list[int]:
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def follows_in_llama_cpp(path: Path, ids: list[int]) -> bool:
    """Every token after the prompt is the likeliest one to llama.cpp."""
    reading = llama_cpp.read(path, text="", ids=ids[:-1], prompt=len(PROMPT), ends=())
    return bool((reading.logits.argmax(axis=1) == ids[len(PROMPT) :]).all())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_llama_cpp_generates_the_tokens_of_torch(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    model = make_model(model_type, **SIZES.get(model_type, {}))
    result = export(model, tmp_path)
    assert result.conversion_error < result.limit
    assert not result.own_widths
    ids = greedy_by_torch(stock_model(model, dtype=torch.float32), 24)
    assert follows_in_llama_cpp(tmp_path / "model.gguf", ids)


def test_blocks_of_different_widths_generate_the_tokens_of_torch(
    exported_shrunk: Exported, tmp_path: Path
) -> None:
    model = exported_shrunk("llama") / "model"
    checkpoint = Checkpoint.open(model)
    assert len(set(checkpoint.widths)) > 1
    assert export(model, tmp_path).own_widths
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    for key, wanted in (
        ("feed_forward_length", [one.channels for one in checkpoint.widths]),
        ("attention.head_count", [one.heads for one in checkpoint.widths]),
        ("attention.head_count_kv", [one.kv_heads for one in checkpoint.widths]),
    ):
        field = reader.get_field(f"deci.{key}")
        assert field is not None
        assert field.contents() == wanted
    assert follows_in_llama_cpp(tmp_path / "model.gguf", greedy_by_torch(load_model(model), 24))


def test_widths_that_llama_cpp_does_not_read_are_refused(
    exported_shrunk: Exported, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="gpt2"):
        export(exported_shrunk("gpt2") / "model", tmp_path)


@pytest.mark.parametrize(
    ("dtype", "stored", "most"),
    [
        ("fp16", "F16", 1e-3),
        ("bf16", "BF16", 1e-2),
        ("q8_0", "Q8_0", 2e-2),
        ("q4_0", "Q4_0", 0.2),
        ("q4_k_m", "Q5_0", 0.1),  # in place of Q4_K, which needs rows of 256
    ],
)
def test_matrices_are_stored_in_the_type(
    make_model: MakeModel, tmp_path: Path, dtype: str, stored: str, most: float
) -> None:
    result = export(make_model("llama", intermediate_size=64), tmp_path, dtype)
    assert result.types[stored] >= 7
    assert result.conversion_error < result.stored_error < most
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_zeros_stay_zero(make_model: MakeModel, tmp_path: Path, dtype: str) -> None:
    model = make_model("llama", intermediate_size=64)
    path = model / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if "proj" in name:
            weight[:, ::2] = 0
    save_file(weights, path, metadata={"format": "pt"})
    export(model, tmp_path, dtype)
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            values = dequantize(tensor.data, tensor.tensor_type)
            assert not values[:, ::2].any()
            assert np.count_nonzero(values[:, 1::2]) > 0.8 * values[:, 1::2].size


@pytest.mark.parametrize(
    ("dtype", "spelling"),
    [
        ("q8_0", "int8:row"),
        ("q4_0", "int4"),
        ("q8_0", "int4:64"),
        ("q4_1", "int4:asym"),
    ],
)
def test_a_quantised_model_keeps_its_codes(
    make_model: MakeModel, tmp_path: Path, dtype: str, spelling: str
) -> None:
    """Row by row, in the order that the converter gives them."""
    for name in ("model", "codes", "gguf"):
        (tmp_path / name).mkdir()
    source = make_model("llama", intermediate_size=64)
    segments = torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0))
    quantise_model(
        *(Checkpoint.open(source), segments, tmp_path / "model", tmp_path / "codes"),
        parse(spelling),
    )
    checkpoint, codes = Checkpoint.open(tmp_path / "model"), Codes.open(tmp_path / "codes")
    result = exporters.gguf.export(checkpoint, tmp_path / "gguf", dtype=dtype, codes=codes)
    assert result.kept_codes == len(checkpoint.linears) == 14
    exact = tmp_path / "exact.gguf"
    exporters.gguf.convert(checkpoint, exact)
    wanted = {one.name: one for one in gguf.GGUFReader(exact).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            values = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(values, wanted[tensor.name].data)


def test_rows_that_are_no_multiple_of_a_block_are_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"inputs in blocks of 32, and .*down_proj has 48 inputs"):
        export(make_model("llama"), tmp_path, "q8_0")


def test_a_type_that_the_converter_does_not_know_is_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="OPTForCausalLM"):
        export(make_model("opt"), tmp_path)


def test_a_tokenizer_that_the_converter_does_not_know_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with pytest.raises(ModelError, match="pre-tokenizer"):
        export(tiny_llama, tmp_path)


def test_other_tokens_than_the_tokenizers_are_a_missed_gate(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """A pair over the end of a word, which llama.cpp never joins."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["dĠ"] = vocabulary.pop("ÀÁ")
    tokenizer["model"]["merges"] = [["d", "Ġ"]]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(GateError, match="a text with other tokens"):
        export(model, tmp_path)


def test_other_logits_than_torchs_are_a_missed_gate(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = exporters.gguf._logits
    monkeypatch.setattr(
        exporters.gguf,
        "_logits",
        lambda checkpoint, ids: logits(checkpoint, [(one + 1) % VOCABULARY for one in ids]),
    )
    with pytest.raises(GateError, match="logits differ"):
        export(tiny_llama, tmp_path)


def test_what_llama_cpp_says_of_a_broken_file_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "exact.gguf"
    exporters.gguf.convert(Checkpoint.open(tiny_llama), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(GateError, match="not within the file bounds"):
        llama_cpp.read(path, text="", ids=PROMPT, prompt=5, ends=())


@pytest.mark.parametrize("module", ["conversion", "cyllama"])
def test_a_missing_package_names_what_to_install(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PlatformError) as caught:
        export(tiny_llama, tmp_path)
    assert "thanos-deploy[gguf]" in caught.value.fix


def test_a_bundle_gets_a_file_that_verify_accepts(two_four_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(two_four_bundle, out)
    exported = td.Bundle(out).export("gguf", dtype="q4_k_m")
    assert isinstance(exported.result, GgufResult)
    assert exported.result.dtype == "q4_k_m"
    bundle = manifest.Bundle.open(out)
    (check,) = targets.get("gguf").verify(bundle, "gguf")
    assert check.outcome == "PASS"
    assert "in Q5_0" in check.detail
    (out / "gguf" / "model.gguf").write_bytes(b"GGUF")
    (check,) = targets.get("gguf").verify(bundle, "gguf")
    assert check.outcome == "FAIL"


SERVER = """
import sys, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.port, settings.n_ctx = sys.argv[1], 0, 128
settings.n_parallel, settings.warmup = 1, False
settings.cpuparams.n_threads = 1
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def served(tiny_llama: Path, tmp_path: Path) -> Iterator[str]:
    """The address of llama.cpp's own server with the tiny LLaMA."""
    export(tiny_llama, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, tmp_path / "model.gguf"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = next(line.strip() for line in process.stdout if line.startswith("http"))
        yield address
        process.stdin.close()


def test_llama_cpps_server_answers_the_openai_client(tiny_llama: Path, served: str) -> None:
    client = openai.OpenAI(base_url=f"{served}/v1", api_key="none", timeout=60)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    ids = greedy_by_torch(stock_model(tiny_llama, dtype=torch.float32), 8)[len(PROMPT) :]
    assert answer.choices[0].text == load_tokenizer(tiny_llama).decode(ids)
