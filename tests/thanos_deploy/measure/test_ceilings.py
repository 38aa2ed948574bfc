import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import exporters.onnx.graph
from tests.conftest import Exported, MakeModel, stock_model
from thanos_deploy.measure import ceilings
from thanos_deploy.measure.ceilings import Machine, Work
from thanos_deploy.measure.latency import Decode, Generate, OpenLoop, Prefill, Scenario
from thanos_deploy.model.checkpoint import Checkpoint

WORK = Work(weight_bytes=1000, cache_bytes_per_token=10, flops_per_token=600, flops_per_pair=2)


def exported(checkpoint: Path, out: Path, *, dtype: str = "fp32", logits: str = "all") -> Work:
    out.mkdir()
    model = Checkpoint.open(checkpoint)
    exporters.onnx.graph.export(model, out, pattern=None, dtype=dtype, logits=logits)
    return counted(out)


def counted(out: Path) -> Work:
    cache = json.loads((out / "export.json").read_text())["cache"]["bytes_per_token"]
    return ceilings.count(out / "model.onnx", cache_bytes_per_token=cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "logits"), [("gpt2", "all"), ("gemma2", "all"), ("gemma2", "last")]
)
def test_operations_are_those_that_pytorch_counts(
    make_model: MakeModel, tmp_path: Path, model_type: str, logits: str
) -> None:
    folder = make_model(model_type)
    work = exported(folder, tmp_path / "onnx", logits=logits)
    kept = 1 if logits == "last" else 0
    model = stock_model(folder, dtype=torch.float32, attn_implementation="eager")
    for batch, tokens in ((1, 8), (2, 5)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ids = torch.zeros(batch, tokens, dtype=torch.int64)
            model(ids, use_cache=False, logits_to_keep=kept)
        _, flops = work.step(batch=batch, tokens=tokens, past=0)
        # PyTorch multiplies the masked pairs too. It also counts the angles of rotary embeddings:
        # head_dim for each token.
        masked = batch * work.flops_per_pair * tokens * (tokens - 1) // 2
        assert flops + masked == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_the_work_of_onnxruntime_s_own_attention_is_counted_too(exported_ort: Exported) -> None:
    out = exported_ort("llama")
    work, model = counted(out / "onnx"), stock_model(out / "model", dtype=torch.float32)
    config = model.config
    blocks, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    assert work.flops_per_pair == 2 * 2 * width * blocks
    # The tables of rotary embeddings are not read as a whole.
    parameters = sum(4 * parameter.numel() for parameter in model.parameters())
    assert parameters <= work.weight_bytes < 1.02 * parameters


def test_a_head_that_reads_the_last_token_only_is_counted_once_a_sequence(
    exported_llama: Path, last_logits: Path
) -> None:
    every, last = counted(exported_llama / "onnx"), counted(last_logits)
    head = 2 * 257 * 32  # vocabulary and width
    assert last.flops_per_sequence == head
    for batch, tokens in ((2, 5), (3, 1)):
        saved = batch * head * (tokens - 1)
        whole = every.step(batch=batch, tokens=tokens, past=7)[1]
        assert last.step(batch=batch, tokens=tokens, past=7)[1] == whole - saved


@pytest.mark.slow
def test_bytes_are_those_of_the_weights_that_a_step_reads(
    tiny_llama: Path, exported_llama: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    tied = counted(exported_llama / "onnx")
    model = stock_model(tiny_llama, dtype=torch.float32)
    parameters = sum(4 * parameter.numel() for parameter in model.parameters())
    # Besides the weights the graph holds some constants.
    assert parameters <= tied.weight_bytes < 1.02 * parameters
    kv_heads, head_dim, blocks = 2, 8, 2
    assert tied.cache_bytes_per_token == 4 * 2 * kv_heads * head_dim * blocks
    # An embedding of its own is looked up, not read.
    untied = exported(make_model("llama", tie_word_embeddings=False), tmp_path / "untied")
    assert untied.weight_bytes == tied.weight_bytes


@pytest.mark.slow
def test_quantised_weights_are_fewer_bytes_and_as_many_operations(
    tiny_llama: Path, exported_llama: Path, tmp_path: Path
) -> None:
    whole = counted(exported_llama / "onnx")
    small = exported(tiny_llama, tmp_path / "int8", dtype="int8")
    # With one token every graph makes as many logits.
    operations = [work.step(batch=1, tokens=1, past=9)[1] for work in (whole, small)]
    assert operations[0] == operations[1]
    assert small.flops_per_pair == whole.flops_per_pair
    assert small.weight_bytes < 0.7 * whole.weight_bytes


def test_a_step_grows_with_batch_tokens_and_past() -> None:
    assert WORK.step(batch=1, tokens=1, past=0) == (1000 + 10, 600 + 2)
    # The first of the two tokens attends to 6 tokens and the second one to 7.
    assert WORK.step(batch=3, tokens=2, past=5) == (1000 + 3 * 7 * 10, 3 * (2 * 600 + (6 + 7) * 2))


@pytest.mark.parametrize(
    ("scenario", "steps"),
    [
        (Prefill(2, 7), [(7, 0)]),
        (Decode(2, 9, 4), [(1, 11)]),
        (Generate(2, 7, 3), [(7, 0), (1, 7), (1, 8)]),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_a_ceiling_is_the_slower_of_moving_and_multiplying(
    scenario: Scenario, steps: list[tuple[int, int]]
) -> None:
    works = [WORK.step(batch=2, tokens=tokens, past=past) for tokens, past in steps]
    for machine, bound in ((Machine(1.0, {"fp32": 1e9}), 0), (Machine(1e9, {"fp32": 1.0}), 1)):
        found = ceilings.ceiling(WORK, scenario, machine, "fp32")
        assert found is not None
        assert (found.bytes, found.flops) == tuple(map(sum, zip(*works, strict=True)))
        assert found.seconds == pytest.approx(sum(work[bound] for work in works))
        assert found.bound == ("memory", "compute")[bound]


def test_waiting_has_no_ceiling() -> None:
    machine = Machine(1.0, {"fp32": 1.0})
    assert ceilings.ceiling(WORK, OpenLoop(7, 3, 2), machine, "fp32") is None


@pytest.mark.slow
def test_the_machine_is_measured_and_left_as_it_was() -> None:
    before = torch.get_num_threads()
    machine = ceilings.measure(1 << 20, provider="cpu", threads=1)
    assert machine is not None
    assert machine.memory_bandwidth_bytes_per_second > 1e8
    assert machine.gemm_flops_per_second.keys() == {"fp32"}
    assert machine.gemm_flops_per_second["fp32"] > 1e8
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_arithmetic_is_what_onnxruntime_multiplies_in(provider: str) -> None:
    dtypes = ("fp32", "fp16", "int8")
    assert [ceilings.computed_in(dtype, provider="cpu") for dtype in dtypes] == ["fp32"] * 3
    on_gpu = [ceilings.computed_in(dtype, provider=provider) for dtype in dtypes]
    assert on_gpu == ["tf32", "fp16", "tf32"]


def test_each_kind_has_its_precision_and_leaves_it_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ceilings, "_MATRIX", {"cpu": 32})
    seen = []
    measure = ceilings._fastest

    def fastest(call: Callable[[], torch.Tensor], device: str) -> float:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return measure(call, device)

    monkeypatch.setattr(ceilings, "_fastest", fastest)
    before = torch.backends.cuda.matmul.fp32_precision
    assert all(ceilings._gemm(kind, "cpu") > 0 for kind in ("fp32", "tf32"))
    assert seen == ["ieee", "tf32"]
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_a_gpu_has_a_peak_of_each_kind_and_tensor_cores_are_faster() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    machine = ceilings.measure(1 << 28, provider="cuda", threads=1)
    assert machine is not None
    peaks = machine.gemm_flops_per_second
    assert peaks["fp32"] < peaks["tf32"] < peaks["fp16"]


def test_a_gpu_that_pytorch_cannot_use_is_not_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert ceilings.measure(1 << 20, provider="cuda", threads=1) is None
