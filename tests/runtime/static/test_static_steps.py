from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from runtime.engines.torch import TorchEngine, engine_of
from runtime.static import steps as static_steps
from runtime.static.cache import block_shapes, cache_bytes
from runtime.static.replay import Eager, Step
from runtime.static.room import Room
from runtime.static.steps import StaticSteps
from tests.conftest import MODEL_TYPES, VOCABULARY, MakeModel, stock_model
from thanos_deploy.errors import ResourceError, UsageError
from thanos_deploy.model import widths
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.widths import Widths

# Two orders of the same float32 sums, relative to the largest logit.
TOLERANCE = 2e-6

# Sequences, tokens, places of the first one's padding: also longer than the sliding windows of 16,
# more sequences than before, fewer, and a shape for the third time, which is a recording by then.
PROMPTS = [(2, 5, 2), (1, 30, 0), (3, 8, 3), (1, 30, 0), (1, 30, 0), (2, 70, 20), (2, 1, 0)]


class Counted(Eager):
    """Records as a GPU does, by running the step some more times, and knows how often."""

    made: list["Counted"]

    def __init__(self, pool: Any = None) -> None:
        super().__init__(pool)
        self.made.append(self)

    def capture(self, step: Step) -> None:
        for _ in range(3):
            step()
        super().capture(step)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(Counted, "made", [], raising=False)
    return Counted


def static_engine(model: Any, room: Room, recording: type[Eager] = Eager) -> TorchEngine:
    steps = StaticSteps(model, room, recording=recording)
    return TorchEngine(steps, vocabulary=VOCABULARY, max_sequence=128)


def assert_same(expected: TorchEngine, actual: TorchEngine, *, decoded: int = 12) -> None:
    """Both engines give the same logits in rounds of all kinds, step by step."""
    random = np.random.default_rng(0)
    for batch, tokens, padding in PROMPTS:
        ids = random.integers(0, VOCABULARY, (batch, tokens))
        mask = np.ones_like(ids)
        mask[0, :padding] = 0
        given = mask if padding else None
        want, got = expected.prefill(ids, given), actual.prefill(ids, given)
        for _ in range(decoded):
            assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()
            token = want.argmax(axis=1)
            want, got = expected.decode(token), actual.decode(token)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_static_cache_gives_the_logits_of_one_that_grows(
    make_model: MakeModel, model_type: str, counted: type[Counted]
) -> None:
    folder = make_model(model_type)
    model, again = (stock_model(folder, dtype=torch.float32) for _ in range(2))
    assert_same(engine_of(model, ()), static_engine(again, Room(2, 16), counted))


def test_blocks_that_differ_in_width_have_caches_that_differ(make_model: MakeModel) -> None:
    source = make_model("llama")
    blocks = [Widths(heads=2, kv_heads=1, channels=32), Widths(heads=4, kv_heads=2, channels=48)]
    models = [_resized(source, blocks) for _ in range(2)]
    assert [shape.heads for shape in block_shapes(models[0])] == [1, 2]
    assert_same(engine_of(models[0], ()), static_engine(models[1], Room(1, 128)))


def _resized(folder: Any, blocks: list[Widths]) -> Any:
    model = stock_model(folder, dtype=torch.float32)
    checkpoint = Checkpoint.open(folder)
    layers = model.get_submodule(checkpoint.family.blocks)
    widths.resize(layers, checkpoint.family, blocks, checkpoint.head_size)
    torch.manual_seed(1)
    for module in layers.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(0.2 * torch.randn(parameter.shape)))
    return model


def test_answers_outgrow_their_room_and_stay_the_same(tiny_model: Any) -> None:
    growing, static = engine_of(tiny_model, ()), static_engine(tiny_model, Room(1, 4))
    ids = np.array([[5, 6, 7], [0, 8, 9]])
    mask = np.array([[1, 1, 1], [0, 1, 1]])
    want, got = growing.prefill(ids, mask), static.prefill(ids, mask)
    for _ in range(128 - 3):
        token = want.argmax(axis=1)
        want, got = growing.decode(token), static.decode(token)
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()
    with pytest.raises(UsageError, match="129 tokens"):
        static.decode(token)


@pytest.fixture
def tiny_model(make_model: MakeModel) -> Any:
    return stock_model(make_model("llama"), dtype=torch.float32)


def test_a_step_is_recorded_once_for_each_size_of_batch_and_anew_in_a_larger_room(
    tiny_model: Any, counted: type[Counted]
) -> None:
    steps = StaticSteps(tiny_model, Room(2, 32), recording=counted)
    for batch in (1, 2, 1, 2):
        ids = np.zeros((batch, 3 + batch), dtype=np.int64)
        steps.prefill(ids, np.ones_like(ids))
        for _ in range(4):
            steps.decode(np.zeros(batch, dtype=np.int64))
    assert len(counted.made) == 2
    steps.prefill(np.zeros((1, 40), dtype=np.int64), None)
    steps.decode(np.zeros(1, dtype=np.int64))
    assert len(counted.made) == 3
    assert steps.room == Room(2, 64)


def test_prompts_are_recorded_when_their_shape_repeats_and_only_a_few_of_them(
    tiny_model: Any, counted: type[Counted]
) -> None:
    steps = StaticSteps(tiny_model, Room(1, 64), recording=counted)
    for tokens in range(1, 10):
        steps.prefill(np.zeros((1, tokens), dtype=np.int64), None)
    assert not counted.made
    for _ in range(2):
        for tokens in range(1, 10):
            steps.prefill(np.zeros((1, tokens), dtype=np.int64), None)
    assert len(counted.made) == static_steps._MOST_PROMPTS


def test_logits_that_were_given_out_do_not_change_with_the_next_step(tiny_model: Any) -> None:
    engine = static_engine(tiny_model, Room(1, 16))
    first = engine.prefill(np.array([[1, 2, 3]]))
    kept = first.copy()
    engine.decode(np.array([9]))
    np.testing.assert_array_equal(first, kept)


class OneDevice(TorchDispatchMode):
    """Refuses operators on several devices: copies, and tensors of one value that may be mixed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, found)) if torch.is_tensor(one)]
        assert len({one.device for one in tensors}) <= 1, func
        return found


def test_a_decode_step_mixes_no_devices_and_asks_for_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The tensors hold nothing, so wanting a value is an error. PyTorch without CUDA can pretend to
    # have a device of no kind but this one.
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shapes = block_shapes(model)
    monkeypatch.setattr(static_steps, "block_shapes", lambda _: shapes)
    with functorch.patch(fake_tensor_allow_meta=True), FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update(
                    (name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
                    for name, tensor in tensors.items()
                    if tensor is not None
                )
        steps = StaticSteps(model, Room(2, 32), recording=Eager)
        steps.prefill(np.zeros((2, 5), dtype=np.int64), None)
        with OneDevice():
            steps._decode_step(2, 32)
        found = steps.decode(np.zeros(2, dtype=np.int64))
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 64), torch.float32)


@pytest.fixture
def full_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes allocations of more than some bytes fail, as on a GPU that is full."""
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))

    def allow(most: int) -> None:
        def limited(*size: Any, dtype: torch.dtype, **options: Any) -> torch.Tensor:
            found = zeros(*size, dtype=dtype, **options)
            if found.nbytes > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
            return found

        monkeypatch.setattr(torch, "zeros", limited)

    return allow


def test_a_gpu_that_is_full_when_opened_is_a_resource_error_that_names_the_bytes(
    tiny_model: Any, full_gpu: Any
) -> None:
    # Keys and values of 2 blocks, 2 heads of 8 channels, float32.
    size = 3 * 100 * 2 * 2 * 2 * 8 * 4
    assert cache_bytes(block_shapes(tiny_model), Room(3, 100)) == size
    full_gpu(10_000)
    with pytest.raises(ResourceError, match=r"cache for 3 sequences of 100 tokens, with") as one:
        StaticSteps(tiny_model, Room(3, 100))
    needed = size + 3 * (VOCABULARY * 4 + 100 * 9)
    assert f"with {needed} bytes for the KV cache and the logits" in one.value.message
    assert "1000 of 2000 bytes are free" in one.value.message
    assert "CUDA out of memory. Tried to allocate" in one.value.message
    assert one.value.exit_code == 5


def test_a_gpu_that_is_full_when_a_room_grows_keeps_the_sequences_or_takes_smaller_ones(
    tiny_model: Any, full_gpu: Any
) -> None:
    ids = np.array([[5, 6, 7, 8, 9, 10, 11]])
    expected = static_engine(tiny_model, Room(1, 32))
    engine = static_engine(tiny_model, Room(1, 8))
    for each in (expected, engine):
        each.prefill(ids)
        each.decode(np.array([4]))
    full_gpu(2 * 12 * 8 * 4)
    with pytest.raises(ResourceError, match=r"a KV cache for 1 sequences of 16 tokens"):
        engine.decode(np.array([3]))
    full_gpu(10_000)
    np.testing.assert_allclose(
        engine.decode(np.array([3])), expected.decode(np.array([3])), rtol=0, atol=1e-5
    )
    with pytest.raises(ResourceError, match=r"a KV cache for 9 sequences of 100 tokens"):
        engine.prefill(np.zeros((9, 99), dtype=np.int64))
    np.testing.assert_allclose(engine.prefill(ids), expected.prefill(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "recorded"),
    [
        (None, True),
        ({"rope_type": "llama3"}, True),
        ({"rope_type": "dynamic"}, False),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}, False),
    ],
)
def test_a_rotary_embedding_that_the_host_adapts_is_not_recorded(
    rope: object, recorded: bool
) -> None:
    class Model:
        class config:  # noqa: N801 - as transformers calls it
            rope_parameters = rope

    assert static_steps._is_recordable(Model) == recorded
