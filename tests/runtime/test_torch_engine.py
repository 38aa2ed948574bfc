import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.engine import open_engine
from runtime.engines import torch as torch_engine
from runtime.engines.torch import VARIANTS, engine_of
from runtime.generate import generate
from runtime.kernels import choice, kernel_times, linears, operator
from runtime.static.replay import Eager
from runtime.static.room import Room
from runtime.static.steps import StaticSteps
from tests.conftest import MODEL_TYPES, VOCABULARY, Exported, MakeModel, stock_model
from tests.recipes import plain
from thanos_deploy.errors import (
    InputError,
    IntegrityError,
    PlatformError,
    ResourceError,
    UsageError,
)
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model
from thanos_deploy.model.packing import SEMI_STRUCTURED_MULTIPLES
from thanos_deploy.model.rounding import cast
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune

# torch.compile's own imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

PROMPTS = np.array([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5]])
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


# Every kind of step takes PyTorch a quarter of a minute to compile.
@pytest.mark.parametrize(
    ("variant", "decoded"), [("eager", 4), pytest.param("compiled", 1, marks=pytest.mark.slow)]
)
def test_logits_are_those_of_onnxruntime_also_with_padding_on_the_left(
    variant: str, decoded: int, exported_llama: Path
) -> None:
    reference = open_engine(exported_llama)
    engine = open_engine(exported_llama, backend=f"torch:{variant}")
    expected, actual = reference.prefill(PROMPTS, MASK), engine.prefill(PROMPTS, MASK)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    for _ in range(decoded):
        token = expected.argmax(axis=1)
        expected, actual = reference.decode(token), engine.decode(token)
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_greedy_text_is_that_of_onnxruntime(exported_llama: Path) -> None:
    prompt = [72, 101, 108, 108, 111]
    engines = (open_engine(exported_llama, backend=name) for name in ("onnxruntime", "torch"))
    expected, actual = (list(generate(engine, prompt, new_tokens=30)) for engine in engines)
    assert actual == expected


def test_a_new_prefill_forgets_the_text_before(exported_llama: Path) -> None:
    engine = open_engine(exported_llama, backend="torch")
    first = engine.prefill(PROMPTS)
    engine.decode(np.array([4, 5]))
    np.testing.assert_array_equal(engine.prefill(PROMPTS), first)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_decodes_as_its_whole_forward_pass_says(
    make_model: MakeModel, model_type: str
) -> None:
    model = stock_model(make_model(model_type), dtype=torch.float32)
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    engine = engine_of(model, ())
    np.testing.assert_allclose(engine.prefill(ids[:, :8].numpy()), expected[:, 7], atol=1e-4)
    np.testing.assert_allclose(engine.decode(ids[:, 8].numpy()), expected[:, 8], atol=1e-4)


@pytest.mark.parametrize(
    ("ids", "seen"),
    [
        (np.zeros((0, 3), np.int64), r"\[0, 3\]"),
        (np.array([[5, VOCABULARY]]), f"5 to {VOCABULARY}"),
        (np.zeros((1, 129), np.int64), "129 tokens: the model takes at most 128"),
    ],
)
def test_ids_that_cannot_be_read_are_refused(exported_llama: Path, ids: Any, seen: str) -> None:
    with pytest.raises(UsageError, match=seen):
        open_engine(exported_llama, backend="torch").prefill(ids)


def test_decoding_stops_at_the_longest_sequence(exported_llama: Path) -> None:
    engine = open_engine(exported_llama, backend="torch")
    engine.prefill(np.zeros((1, 128), np.int64))
    with pytest.raises(UsageError, match="129 tokens"):
        engine.decode(np.array([1]))


def test_a_changed_checkpoint_is_refused_before_it_is_read(
    exported_llama: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    path = bundle / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        open_engine(bundle, backend="torch")


def test_a_bundle_without_a_checkpoint_names_the_command(
    exported_llama: Path, tmp_path: Path
) -> None:
    manifest = json.loads((exported_llama / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "stages": {}}))
    with pytest.raises(InputError, match="no finished stage of the bundle wrote model/") as caught:
        open_engine(tmp_path, backend="torch")
    assert "thanos-deploy prune" in caught.value.fix


@pytest.mark.parametrize("backend", ["torch:fast", "onnxruntime:eager"])
def test_an_unknown_variant_is_a_usage_error_that_lists_what_there_is(
    exported_llama: Path, backend: str
) -> None:
    with pytest.raises(UsageError, match="has no variant") as caught:
        open_engine(exported_llama, backend=backend)
    assert ("torch:compiled" in caught.value.fix) == backend.startswith("torch")


def test_an_unknown_provider_is_a_usage_error(exported_llama: Path) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        open_engine(exported_llama, backend="torch", provider="tpu")


@pytest.mark.parametrize("variant", sorted(linears.MAKERS))
def test_two_four_variants_need_a_gpu(exported_llama: Path, variant: str) -> None:
    with pytest.raises(PlatformError, match=f"variant {variant} runs on an NVIDIA GPU only"):
        open_engine(exported_llama, backend=f"torch:{variant}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(exported_llama: Path) -> None:
    with pytest.raises(PlatformError, match="PyTorch finds no NVIDIA GPU"):
        open_engine(exported_llama, backend="torch:cutlass", provider="cuda")


def test_every_variant_is_known_to_the_engine() -> None:
    assert {"eager", "compiled", "sparse", linears.BLOCKWISE, *linears.MAKERS} == set(VARIANTS)


def test_without_pytorch_the_message_names_what_to_install(
    exported_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlatformError, match="transformers is not installed"):
        open_engine(exported_llama, backend="torch")


@pytest.mark.parametrize("library", ["cutlass", "cusparselt"])
def test_a_dense_layer_is_refused_by_name_and_group_before_torch_halves_it(library: str) -> None:
    model = nn.ModuleDict({"up_proj": nn.Linear(64, 32, dtype=torch.float16)})
    with pytest.raises(InputError, match=r"up_proj: 512 groups .* in row 0 from column 0 on"):
        linears.replace(model, ["up_proj"], library)


@pytest.mark.parametrize(
    ("library", "shape", "dtype"),
    [
        ("cutlass", (32, 96), torch.float16),
        ("cutlass", (16, 64), torch.bfloat16),
        ("cusparselt", (24, 64), torch.float16),
        ("cusparselt", (32, 64), torch.float32),
    ],
)
def test_a_shape_or_dtype_that_the_library_does_not_take_is_refused_by_name(
    library: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    with pytest.raises(
        InputError, match=f"up_proj: {library} does not support a 2:4 weight of {dtype}"
    ):
        linears.MAKERS[library](torch.zeros(shape, dtype=dtype), "up_proj")


def test_the_shapes_that_are_refused_are_those_that_torch_refuses() -> None:
    for library, held in (
        ("cutlass", torch.sparse.SparseSemiStructuredTensorCUTLASS),
        ("cusparselt", torch.sparse.SparseSemiStructuredTensorCUSPARSELT),
    ):
        rules = held._DTYPE_SHAPE_CONSTRAINTS
        for dtype, multiples in SEMI_STRUCTURED_MULTIPLES[library].items():
            assert multiples == (rules[dtype].sparse_min_rows, rules[dtype].sparse_min_cols)


def test_a_model_on_our_kernels_gives_the_logits_of_the_model_itself(
    exported_two_four: Exported,
) -> None:
    # GPT-2 has biases and stores its weights transposed.
    checkpoint = Checkpoint.open(exported_two_four("gpt2") / "model")
    engines = []
    for maker in (None, "triton"):
        model = load_model(checkpoint.folder)
        cast(model, torch.float16)
        if maker:
            linears.replace(model, checkpoint.linears, maker)
        engines.append(engine_of(model, ()))
    # Two tokens at once take the decode kernel, two prompts of five the prefill kernel.
    for step in (
        lambda engine: engine.prefill(PROMPTS, MASK),
        lambda engine: engine.decode(np.array([10, 6])),
    ):
        expected, actual = map(step, engines)
        # Two ways to round to float16 after every layer.
        assert np.abs(actual - expected).max() < 5e-3 * np.ptp(expected)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_variant_for_cpus_gives_the_logits_of_eager(
    exported_two_four: Exported, model_type: str
) -> None:
    folder = exported_two_four(model_type) / "model"
    engines = [
        torch_engine.open_model(folder, variant=variant) for variant in ("eager", "blockwise")
    ]
    for step in (
        lambda engine: engine.prefill(PROMPTS, MASK),
        lambda engine: engine.decode(np.array([10, 6])),
    ):
        expected, actual = map(step, engines)
        assert np.abs(actual - expected).max() < 1e-5 * np.ptp(expected)


def test_attention_gets_channels_side_by_side_from_exchanged_layers(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's fast attention wants a last stride of 1.
    strides: list[int] = []
    attend = nn.functional.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, **options: Any) -> Any:
        strides.extend(tensor.stride(-1) for tensor in (query, key, value))
        return attend(query, key, value, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setitem(
        linears.MAKERS, "fake", lambda weight, name: lambda x, bias: x @ weight.T.contiguous()
    )
    for room in (None, Room(2, 16)):
        model = load_model(tiny_llama)
        linears.replace(model, Checkpoint.open(tiny_llama).linears, "fake")
        engine = engine_of(model, (), room=room)
        engine.prefill(PROMPTS)
        engine.decode(np.array([1, 2]))
    assert set(strides) == {1}


def test_the_sparse_variant_measures_once_and_keeps_that_beside_the_bundle(
    exported_two_four: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked = []

    def clock(calls: Sequence[Callable[[], object]]) -> float:
        clocked.append(calls)
        return 1.0 if len(clocked) % 2 else 2.0

    origin = kernel_times.Origin(card="fake", torch="2", triton=None, tool="1")
    monkeypatch.setattr(kernel_times.Origin, "here", lambda: origin)
    monkeypatch.setitem(operator._KERNELS, "again", operator._KERNELS[choice.DENSE])
    candidates = {name: partial(operator.hold, name) for name in (choice.DENSE, "again")}
    monkeypatch.setattr(choice, "makers", lambda: candidates)
    monkeypatch.setattr(choice, "replayed", clock)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    checkpoint = Checkpoint.open(exported_two_four("llama") / "model")
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    logits = []
    for variant in ("eager", "sparse", "sparse"):
        model = load_model(checkpoint.folder)
        cast(model, torch.bfloat16)
        torch_engine._exchange(model, checkpoint.linears, variant, tmp_path / "engines")
        logits.append(engine_of(model, (), room=Room(2, 16)).prefill(ids))
    kept = tmp_path / "engines" / "torch-sm90" / "kernels.json"
    rows = json.loads(kept.read_text())["rows"]
    # Two kernels in every bucket, each shape once: q and o, k and v, gate and up, down.
    assert len(rows) == 4
    assert len(clocked) == 2 * len(choice.TOKENS) * len(rows)
    np.testing.assert_array_equal(logits[1], logits[0])
    np.testing.assert_array_equal(logits[2], logits[0])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))


@pytest.mark.usefixtures("hopper")
def test_cutlass_is_refused_beyond_compute_capability_8(tiny_llama: Path) -> None:
    with pytest.raises(PlatformError, match=r"compute capability 8\.x only, and the GPU has 9\.0"):
        torch_engine.open_model(tiny_llama, provider="cuda", variant="cutlass")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("variant", ["sparse", "triton"])
def test_a_gpu_without_sparse_tensor_cores_is_refused(
    tiny_llama: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    with pytest.raises(PlatformError, match=rf"{variant}: the GPU has compute capability 7\.5"):
        torch_engine.open_model(tiny_llama, provider="cuda", variant=variant)


@pytest.mark.usefixtures("hopper")
def test_a_model_that_the_gpu_does_not_hold_is_a_resource_error_that_names_its_bytes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = PreTrainedModel.to

    def full(model: PreTrainedModel, place: torch.device) -> Any:
        if place.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(model, place)

    monkeypatch.setattr(PreTrainedModel, "to", full)
    size = 2 * sum(parameter.numel() for parameter in load_model(tiny_llama).parameters())
    with pytest.raises(ResourceError, match=f"takes at least {size} bytes") as caught:
        torch_engine.open_model(tiny_llama, provider="cuda")
    assert "1000 of 2000 bytes are free" in caught.value.message


def test_a_room_that_is_longer_than_the_model_reads_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="a KV cache for 129 tokens: the model takes at most 128"):
        torch_engine.open_model(tiny_llama, room=Room(1, 129))


@pytest.fixture
def two_four_model(make_model: MakeModel, tmp_path: Path) -> Path:
    # All sizes are multiples of 64, which every library takes.
    source = make_model("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    ids = torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0))
    prune(
        Checkpoint.open(source),
        ids,
        tmp_path,
        plain(SemiStructured(2, 4)),
    )
    return tmp_path


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("variant", ["sparse", *sorted(linears.MAKERS)])
def test_every_two_four_variant_gives_the_logits_of_eager_on_a_gpu(
    two_four_model: Path, variant: str
) -> None:
    def opened(variant: str) -> torch_engine.TorchEngine:
        return torch_engine.open_model(two_four_model, provider="cuda", variant=variant)

    if variant == "cutlass" and torch.cuda.get_device_capability()[0] != 8:
        with pytest.raises(PlatformError, match=r"8\.x only"):
            opened(variant)
        return
    expected, actual = (opened(each).prefill(PROMPTS, MASK) for each in ("eager", variant))
    assert np.abs(actual - expected).max() < 5e-3 * np.ptp(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_recorded_steps_give_the_logits_of_steps_that_are_not(two_four_model: Path) -> None:
    engines = []
    for recording in (Eager, None):
        model: Any = load_model(two_four_model)
        model.cuda()
        steps = StaticSteps(model, Room(1, 16), recording=recording)
        engines.append(torch_engine.TorchEngine(steps, vocabulary=VOCABULARY, max_sequence=128))
    plain, recorded = engines
    # The third prompt is a recording; the room grows while it is answered.
    for mask in (MASK, None, None):
        want, got = plain.prefill(PROMPTS, mask), recorded.prefill(PROMPTS, mask)
        for _ in range(30):
            assert np.abs(got - want).max() < 1e-5 * np.ptp(want)
            token = want.argmax(axis=1)
            want, got = plain.decode(token), recorded.decode(token)
