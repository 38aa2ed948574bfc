import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.forecast import fit, sizes
from tests.conftest import MODEL_TYPES, MakeModel
from tests.gpu_rows import CARD, ROWS
from tests.model_types import MIXTURES
from tests.thanos_deploy.model.test_experts import write_mixture
from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.forecast.datasheets import GPUS, SPARSE_FACTOR, Datasheet, find
from thanos_deploy.forecast.forecast import (
    Generation,
    Variant,
    architecture,
    forecast,
    is_two_of_four,
    plan,
    variant,
)
from thanos_deploy.forecast.measurements import published_measurements, read_measurements
from thanos_deploy.forecast.roofline import (
    FITTED,
    Architecture,
    Block,
    Efficiency,
    Gemm,
    Measurement,
    Setting,
    Step,
)
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import StepRow
from thanos_deploy.model import linear
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.widths import Widths
from thanos_deploy.pattern import parse

# One block with numbers that can be followed by hand, on a GPU that reaches what it promises.
TINY = Architecture(
    blocks=((Block((Gemm("linear", 128, 64),), Widths(4, 2, 48), 8, elementwise=100), 3),),
    head=Gemm("lm_head", 10, 64),
    parameters=50_000,
)
IDEAL = Efficiency(1.0, 1.0, 1.0, kernel_seconds=0.5, sparse_gain=1.5)


def ideal(peak: float, bandwidth: float, dtype: str = "fp16") -> Setting:
    gpu = Datasheet("", "", {"fp16": peak, "fp8": 2 * peak}, bandwidth, 1e9, "")
    return Setting(gpu, dtype, efficiency=IDEAL)


def times(model: Architecture, step: Step, setting: Setting, *, sparse: bool = False) -> Any:
    found = forecast(Variant("", model, sparse), step, setting)
    return sum(one.likely for one in found), sum(one.best for one in found)


def test_a_kernel_takes_as_long_as_its_arithmetic_or_its_traffic_and_a_constant() -> None:
    step = Step(batch=2, tokens=3, past=4)
    operations = {
        "linear": 2 * 6 * 128 * 64,
        # Six rows that see 4 past tokens and on average 2 of the 3 new ones, twice.
        "attention": 4 * 6 * 6 * 4 * 8,
        "norms, activation": 0,
        "lm_head": 2 * 2 * 10 * 64,
    }
    moved = {
        "linear": 2 * (128 * 64 + 6 * (128 + 64)),
        "attention": 2 * (2 * 6 * 4 * 8 + 2 * 2 * 7 * 2 * 8),
        "norms, activation": 2 * 6 * 100,
        "lm_head": 2 * (10 * 64 + 2 * (10 + 64)),
    }
    launches = {"linear": 1, "attention": 1, "norms, activation": 3, "lm_head": 1}
    for peak, bandwidth in ((1e3, 1e9), (1e9, 1e3)):
        found = forecast(Variant("", TINY, sparse=False), step, ideal(peak, bandwidth))
        assert {one.name for one in found} == set(operations)
        for one in found:
            part = max(operations[one.name] / peak, moved[one.name] / bandwidth)
            times = 1 if one.name == "lm_head" else 3
            assert one.likely == pytest.approx(times * (part + 0.5 * launches[one.name]))


@pytest.mark.parametrize(("dtype", "size", "packed"), [("fp16", 2, 9 / 16), ("fp8", 1, 5 / 8)])
def test_sparse_tensor_cores_speed_up_arithmetic_and_at_best_reading_as_well(
    dtype: str, size: int, packed: float
) -> None:
    weights, traffic = size * 128 * 64, size * 64 + 2 * 128
    reading = (weights + traffic) / (packed * weights + traffic)
    for peak, bandwidth, likely, best in ((1e-3, 1e9, 1.5, 2.0), (1e9, 1e-3, 1.0, reading)):
        setting = ideal(peak, bandwidth, dtype)
        dense, sparse = (
            forecast(Variant("", TINY, sparse), Step(1, 1, 1), setting)[0]
            for sparse in (False, True)
        )
        assert dense.likely / sparse.likely == pytest.approx(likely, rel=1e-4)
        assert dense.likely / sparse.best == pytest.approx(best, rel=1e-4)


def test_a_layer_whose_sizes_sparse_kernels_refuse_stays_dense() -> None:
    odd = replace(TINY, blocks=((replace(TINY.blocks[0][0], gemms=(Gemm("a", 100, 64),)), 1),))
    setting = ideal(1.0, 1.0)
    assert times(odd, Step(1, 9, 0), setting) == times(odd, Step(1, 9, 0), setting, sparse=True)


steps = st.builds(Step, st.integers(1, 64), st.integers(1, 4096), st.integers(0, 8192))
gpus = st.sampled_from(GPUS)


@settings(deadline=None)  # the first call makes the model
@given(steps, gpus, st.floats(1.0, 10.0), st.sampled_from(["fp16", "int8"]))
def test_a_better_gpu_is_never_slower(
    step: Step, gpu: Datasheet, factor: float, dtype: str
) -> None:
    model = sizes("LLaMA-7B")
    slow, _ = times(model, step, Setting(gpu, dtype))
    wider = replace(gpu, bandwidth=gpu.bandwidth * factor)
    stronger = replace(gpu, peak={name: peak * factor for name, peak in gpu.peak.items()})
    for better in (wider, stronger):
        assert times(model, step, Setting(better, dtype))[0] <= slow


@settings(deadline=None)  # the first call makes the model
@given(steps, gpus, st.sampled_from(["fp16", "int8"]))
def test_sparsity_is_never_slower_and_never_more_than_twice_as_fast(
    step: Step, gpu: Datasheet, dtype: str
) -> None:
    model, setting = sizes("Llama-3-8B"), Setting(gpu, dtype)
    dense, _ = times(model, step, setting)
    likely, best = times(model, step, setting, sparse=True)
    assert dense / SPARSE_FACTOR <= best <= likely <= dense


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_smaller_model_is_never_slower(make_model: MakeModel, model_type: str) -> None:
    checkpoint = Checkpoint.outline(make_model(model_type, hidden_size=64, intermediate_size=256))
    dense, small = architecture(checkpoint), variant(checkpoint, parse("structured:0.15"))
    for step in (Step(1, 1, 64), Step(8, 64, 0)):
        for gpu in GPUS:
            setting = Setting(gpu, "fp16")
            layers = zip(
                forecast(Variant("", dense, sparse=False), step, setting),
                forecast(small, step, setting),
                strict=True,
            )
            assert all(after.likely <= before.likely for before, after in layers)
    linears = [model.memory("fp16", 0) for model in (dense, small.architecture)]
    assert linears[1] < linears[0]


def test_a_mixture_is_forecast_with_the_experts_that_stay(tmp_path: Path) -> None:
    family = family_of("qwen3_moe")
    checkpoint = Checkpoint.outline(write_mixture(tmp_path, family, MIXTURES["qwen3_moe"]))
    cut = variant(checkpoint, parse("structured:0.1")).architecture
    left = sorted(block.widths.experts for block, _ in cut.blocks)
    assert left == [0, 3]
    dense = architecture(checkpoint)
    assert dense.parameters - cut.parameters == 3 * 24 * 32 + 32


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_large_layers_of_one_sequence_wait_for_memory_when_decoding(gpu: Datasheet) -> None:
    model = sizes("Llama-3-8B")
    layers = forecast(Variant("", model, sparse=False), Step(1, 1, 128), Setting(gpu, "fp16"))
    assert {one.bound for one in layers if one.shape is not None} == {"memory"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_configuration_alone_gives_the_sizes_of_the_model(
    make_model: MakeModel, model_type: str
) -> None:
    folder = make_model(model_type)
    whole = Checkpoint.open(folder)
    found = architecture(whole)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert architecture(Checkpoint.outline(folder)) == found
    block = whole.skeleton().get_submodule(f"{whole.family.blocks}.0")
    weights_of_a_block = sum(
        linear.matrix(block.get_submodule(name)).numel() for name in whole.blocks[0].linears
    )
    ((kind, count),) = found.blocks
    assert count == 2
    assert sum(gemm.outputs * gemm.inputs for gemm in kind.gemms) == weights_of_a_block
    assert found.head.outputs == whole.config.vocab_size
    stored = sum(parameter.numel() for parameter in whole.skeleton().parameters())
    cache = 2 * sum(width.kv_heads for width in whole.widths) * whole.head_size
    assert found.memory("fp16", 10) == 2 * (stored + 10 * cache)
    assert found.memory("int8", 10) == 2 * (stored + 10 * cache) - count * weights_of_a_block


@pytest.mark.parametrize(
    ("pattern", "holds"),
    [
        ("2:4", True),
        ("1:4", True),
        ("1:2", True),
        ("3:4", False),
        ("4:8", False),
        ("2:8", False),
        ("unstructured:0.5", False),
    ],
)
def test_tensor_cores_take_what_is_two_of_four(pattern: str, holds: bool) -> None:
    assert is_two_of_four(parse(pattern)) == holds


def test_the_verdict_is_computed(tiny_llama: Path) -> None:
    request = Generation(batches=(1,), prompt=16, new_tokens=8)
    patterns = [parse("2:4"), parse("structured:0.4")]
    # Of a tiny model only the launches are left to see, unless they cost nothing.
    for kernel_seconds, expected in (
        (1.0, "is bound by kernel launches"),
        (0.0, "is bound by memory bandwidth"),
    ):
        efficiency = replace(FITTED, kernel_seconds=kernel_seconds)
        setting = Setting(find("H100"), "fp16", efficiency=efficiency)
        result = plan(Checkpoint.open(tiny_llama), patterns, setting, request)
        assert [sentence.split()[0] for sentence in result.verdict] == ["Prefill", "Decode"]
        decode = result.verdict[1]
        assert expected in decode
        assert "2:4 will not help (1.00x" in decode
        assert f"structured:0.4 {'will not' if kernel_seconds else 'will'} help" in decode
        seconds = result.passes[0].seconds
        for name, total in seconds["request"].items():
            parts = seconds["prefill"][name].likely + 7 * seconds["decode"][name].likely
            assert total.likely == pytest.approx(parts)


def test_a_request_longer_than_the_model_allows_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="the 128 tokens that the model takes"):
        plan(
            Checkpoint.open(tiny_llama), [], Setting(find("L4"), "fp16"), Generation((1,), 100, 29)
        )


@pytest.mark.slow
def test_the_constants_are_what_the_published_figures_give() -> None:
    found = fit()
    for name in Efficiency.__slots__:
        assert getattr(FITTED, name) == pytest.approx(getattr(found, name), rel=0.01), name


def record(kernel: str, seconds: float | None, **sizes: object) -> dict[str, Any]:
    times = None if seconds is None else [seconds, 10 * seconds, seconds / 10]
    shape = {"tokens": 6, "outputs": 128, "inputs": 64} | sizes
    return {"kernel": kernel, "seconds": times, **shape}


def measured(
    tmp_path: Path, *records: dict[str, Any], gpu: str = "NVIDIA L4", dtype: str = "fp16"
) -> tuple[Measurement, ...]:
    path = tmp_path / "products.json"
    path.write_text(json.dumps({"gpu": gpu, "dtype": dtype, "records": records}))
    return read_measurements(path, find("L4"), "fp16")


def test_a_measured_product_replaces_the_roofline_of_similar_ones(tmp_path: Path) -> None:
    known = measured(
        tmp_path,
        record("dense", 1.0, outputs=256),
        record("cutlass", None, outputs=256),
        record("dense", 7.0),
        record("cutlass", 5.0),
        record("cusparselt", 4.0),
    )
    assert len(known) == 2
    setting = replace(ideal(1e3, 1e9), measured=known)
    step = Step(batch=2, tokens=3, past=4)
    for sparse, expected in ((False, 7.0), (True, 4.0)):
        layers = forecast(Variant("", TINY, sparse), step, setting)
        assert layers[0].measured
        assert layers[0].likely == layers[0].best == pytest.approx(3 * expected)
        assert not any(one.measured for one in layers[1:])
    # Half as many rows: near enough, and half the arithmetic. A quarter is too far.
    half = forecast(Variant("", TINY, sparse=False), Step(1, 3, 4), setting)[0]
    roofline = [times(TINY, Step(batch, 3, 4), ideal(1e3, 1e9))[0] for batch in (1, 2)]
    assert half.measured
    assert half.likely < 21.0
    assert roofline[0] < roofline[1]
    assert not forecast(Variant("", TINY, sparse=False), Step(1, 1, 4), setting)[0].measured


def test_a_sparse_kernel_that_was_slower_is_not_used(tmp_path: Path) -> None:
    known = measured(tmp_path, record("dense", 7.0), record("cutlass", 9.0))
    setting = replace(ideal(1e3, 1e9), measured=known)
    sparse = forecast(Variant("", TINY, sparse=True), Step(2, 3, 4), setting)[0]
    assert sparse.likely == pytest.approx(3 * 7.0)


def test_products_of_another_gpu_or_dtype_are_not_taken(tmp_path: Path) -> None:
    for other in ({"gpu": "NVIDIA H100 PCIe"}, {"gpu": "GeForce 2"}, {"dtype": "bf16"}):
        with pytest.raises(InputError, match="no product"):
            measured(tmp_path, record("dense", 1.0), **other)


def test_the_file_of_gpu_check_is_taken_too(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    gemm = {"gpu": "NVIDIA L4", "dtype": "fp16", "records": [record("dense", 7.0)]}
    path.write_text(json.dumps({"checks": [], "steps": {"gemm": gemm}}))
    (known,) = read_measurements(path, find("L4"), "fp16")
    assert (known.m, known.n, known.k, known.dense) == (6, 128, 64, 7.0)


def test_records_of_a_gpu_are_read_where_they_count(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    card = replace(CARD, name="NVIDIA H100 80GB HBM3")
    gpu_records.write(path, Records((card, *ROWS[1:])))
    (known,) = read_measurements(path, find("H100"), "bf16")
    assert known == Measurement(m=1, n=14336, k=4096, dense=4e-5, sparse=2.5e-5)
    for gpu, dtype in (("H100", "fp16"), ("A100", "bf16")):
        with pytest.raises(InputError, match="has products of NVIDIA H100 80GB HBM3 in bf16"):
            read_measurements(path, find(gpu), dtype)
    busy = StepRow("gemm", "PASS", "", other_processes=("process 7, 4.0 GB",))
    for rows, why in (
        ((card, *ROWS, busy), "INVALID"),
        ((replace(card, device="cpu"),), "REHEARS"),
    ):
        gpu_records.write(path, Records(rows))
        with pytest.raises(InputError, match=why):
            read_measurements(path, find("H100"), "bf16")
    path.write_text('{"format": 99, "rows": []}')
    with pytest.raises(InputError, match="format 99"):
        read_measurements(path, find("H100"), "bf16")


BAD = [
    {"gpu": "NVIDIA L4", "dtype": "fp16"},
    {"gpu": "NVIDIA L4", "dtype": "fp16", "records": [{}]},
    {"gpu": "NVIDIA L4", "dtype": "fp16", "records": []},
    *(
        {"gpu": "NVIDIA L4", "dtype": "fp16", "records": [record("dense", 1.0, tokens=size)]}
        for size in (0, -1, "a")
    ),
    {"gpu": "NVIDIA L4", "dtype": "fp16", "records": [record("cutlass", 1.0)]},
]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[]", "\x00", *map(json.dumps, BAD)])
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "products.json"
    path.write_text(content)
    with pytest.raises(InputError, match="products"):
        read_measurements(path, find("L4"), "fp16")


def test_a_gpu_is_found_by_either_name_and_an_unknown_one_lists_the_known() -> None:
    for gpu in GPUS:
        assert find(gpu.name.lower()) == find(gpu.product) == gpu
    with pytest.raises(UsageError, match="V100") as caught:
        find("V100")
    assert all(gpu.name in caught.value.fix for gpu in GPUS)


def test_a_dtype_without_tensor_cores_is_refused() -> None:
    with pytest.raises(UsageError, match="A10 has no tensor cores for fp8"):
        Setting(find("A10"), "fp8")


def test_published_products_are_taken_for_the_gpu_that_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = replace(CARD, name="NVIDIA H100 80GB HBM3")
    run = gpu_figures.figures(Records((card, *ROWS[1:])))
    assert run is not None
    doubtful = replace(run, date="2027-01-01", reasons=("another process used the GPU",))
    monkeypatch.setattr(gpu_figures, "published", lambda: (doubtful, run))
    expected = Measurement(m=1, n=14336, k=4096, dense=4e-5, sparse=2.5e-5)
    assert published_measurements(find("H100"), "bf16") == (expected,)
    assert published_measurements(find("H100"), "fp16") == ()
    assert published_measurements(find("A100"), "bf16") == ()
    monkeypatch.setattr(gpu_figures, "published", lambda: (doubtful,))
    assert published_measurements(find("H100"), "bf16") == ()
