import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

from runtime.kernels import blockwise, linears
from runtime.kernels.operator import by_tokens, hold, plan_of
from tests.runtime.kernels.oracle import inputs, require_close, two_four
from thanos_deploy.errors import InputError, ModelError, PlatformError
from thanos_deploy.model.packing import pack, unpack_anywhere
from thanos_deploy.pattern import SemiStructured

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FEW = "blockwise:2,dense"


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 5), st.booleans())
def test_the_blockwise_product_is_the_product(
    rows: int, groups: int, tokens: int, bias: bool
) -> None:
    # A few rows at a time, the last time fewer.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_BYTES_AT_ONCE", 7 * 4 * groups * 4)
        weight = two_four(rows, 4 * groups, torch.float32)
        x, b = inputs(tokens, rows, 4 * groups, torch.float32, bias=bias)
        require_close(blockwise.linear(x, *blockwise.hold(weight), b), x, weight, b)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_weight_takes_its_kept_half_and_a_bit_for_each_entry(dtype: torch.dtype) -> None:
    weight = two_four(48, 64, dtype)
    held = hold("blockwise", weight, "up").tensors
    assert sum(tensor.nbytes for tensor in held) == weight.nbytes // 2 + weight.numel() // 8


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_never_more_than_some_rows_are_dense(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_BYTES_AT_ONCE", dtype.itemsize << 12)
    seen = []
    unpack = blockwise._unpack

    def spy(planes: Tensor, codes: Tensor, out: Tensor) -> None:
        seen.append(out.numel())
        unpack(planes, codes, out)

    monkeypatch.setattr(blockwise, "_unpack", spy)
    held = hold("blockwise", two_four(256, 64, dtype), "up")
    held(torch.zeros(1, 64, dtype=dtype), None)
    assert seen == [1 << 12] * 4


def test_every_bit_of_an_entry_comes_back() -> None:
    special = torch.tensor([[-0.0, float("inf"), 0, 0], [0, 1e-45, 0, -1.5]]).reshape(1, 8)
    planes, codes = blockwise.hold(special)
    out = torch.empty(1, 4, 2)
    blockwise._unpack(planes, codes, out)
    assert out.transpose(1, 2).reshape(1, 8).view(torch.int32).equal(special.view(torch.int32))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 9))
def test_unpacking_on_any_device_undoes_packing(rows: int, groups: int) -> None:
    weight = two_four(rows, 4 * groups, torch.float16)
    assert unpack_anywhere(*pack(weight, SemiStructured(2, 4)), 4 * groups).equal(weight)


def test_a_dense_weight_and_another_dtype_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"up: 32 groups .* does not hold 2:4"):
        hold("blockwise", torch.ones(8, 16), "up")
    with pytest.raises(
        InputError, match=r"up: the blockwise product does not support torch\.float64"
    ):
        hold("blockwise", torch.zeros(8, 16, dtype=torch.float64), "up")
    with pytest.raises(PlatformError, match="blockwise runs on a CPU only"):
        linears.require("blockwise", torch.device("cuda"))


@pytest.mark.parametrize(
    ("kernels", "plan"),
    [
        (["a"] * 3, "a"),
        (["a", "a", "b"], "a:4,b"),
        (["a", "b", "a"], "a:1,b:4,a"),
    ],
)
def test_a_plan_names_a_kernel_for_each_range_of_tokens(kernels: list[str], plan: str) -> None:
    assert plan_of(kernels, [1, 4]) == plan


def test_the_number_of_tokens_says_which_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = two_four(5, 24, torch.float16)
    blocks, dense = (hold(kernel, weight, "up") for kernel in ("blockwise", "dense"))
    held = by_tokens([blocks, blocks, dense], [1, 2])
    assert (held.plan, len(held.tensors)) == (FEW, 3)
    used = []
    product = blockwise.linear

    def spy(x: Tensor, *rest: Tensor) -> Tensor:
        used.append(len(x))
        return product(x, *rest)

    monkeypatch.setattr(blockwise, "linear", spy)
    for tokens in (1, 2, 3):
        x, b = inputs(tokens, 5, 24, torch.float16, bias=True)
        require_close(held(x, b), x, weight, b)
    assert used == [1, 2]


@pytest.mark.parametrize("kernel", ["blockwise", "dense", "triton"])
@pytest.mark.parametrize("bias", [True, False])
def test_pytorch_finds_nothing_wrong_with_the_operator(kernel: str, bias: bool) -> None:
    held = hold(kernel, two_four(5, 24, torch.float16), "up")
    x, b = inputs(3, 5, 24, torch.float16, bias=bias)
    opcheck(
        torch.ops.thanos_deploy.sparse_linear.default,
        (x, list(held.tensors), b, held.plan, held.outputs),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_compiled_layer_is_one_graph_for_all_numbers_of_tokens() -> None:
    layer = nn.Linear(24, 5)
    weight = two_four(5, 24, torch.float32)
    layer.weight = nn.Parameter(weight)
    bias = layer.bias.detach()
    model = nn.Sequential(layer)
    linears.replace(model, ["0"], "blockwise")
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.inference_mode():
        for tokens in (7, 3, 9):  # no other size is 7
            x, _ = inputs(tokens, 5, 24, torch.float32, bias=False)
            require_close(compiled(x), x, weight, bias)
    assert len(graphs) == 1
