from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from runtime.kernels import cusparselt, linears
from runtime.kernels.cusparselt import Algorithm, CusparseltWeight
from tests.runtime.kernels.oracle import inputs, require_close, two_four
from thanos_deploy.errors import PlatformError

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make PyTorch say that there is a GPU of a compute capability, with cuSPARSELt."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)

    return pretend


@pytest.mark.parametrize("maker", sorted(linears.MAKERS))
def test_every_maker_takes_an_a100(maker: str, capability: Callable[[int, int], None]) -> None:
    capability(8, 0)
    linears.require(maker, CUDA)


@pytest.mark.parametrize("maker", sorted(linears.MAKERS))
def test_every_maker_but_cutlass_takes_an_h100(
    maker: str, capability: Callable[[int, int], None]
) -> None:
    capability(9, 0)
    if maker != "cutlass":
        linears.require(maker, CUDA)
        return
    with pytest.raises(PlatformError, match=r"8\.x only, and the GPU has 9\.0"):
        linears.require(maker, CUDA)


@pytest.mark.parametrize("maker", sorted(linears.MAKERS))
def test_no_maker_takes_a_gpu_without_sparse_tensor_cores(
    maker: str, capability: Callable[[int, int], None]
) -> None:
    capability(7, 5)
    with pytest.raises(PlatformError, match=rf"{maker}: the GPU has compute capability 7\.5"):
        linears.require(maker, CUDA)


def test_a_build_without_cusparselt_is_told(
    capability: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability(9, 0)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(PlatformError, match=r"cusparselt-first: .* has no cuSPARSELt"):
        linears.require("cusparselt-first", CUDA)


@pytest.mark.parametrize("maker", ["cutlass", "cusparselt", "cusparselt-first", "mma-sp"])
def test_on_a_cpu_makers_that_need_a_gpu_say_so(maker: str) -> None:
    with pytest.raises(PlatformError, match=f"{maker} runs on an NVIDIA GPU only.* on cpu"):
        linears.MAKERS[maker](two_four(32, 64, torch.float16), "up_proj")


def test_on_a_cpu_triton_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_interprets", lambda: False)
    with pytest.raises(PlatformError, match="triton runs on an NVIDIA GPU only"):
        linears.require("triton", CPU)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_on_the_triton_kernels_gives_the_layer(bias: bool, device: torch.device) -> None:
    # One token takes one of the kernels, more take the other.
    layer = nn.Linear(24, 5, bias=bias, dtype=torch.float16, device=device)
    weight = two_four(5, 24, torch.float16)
    layer.weight = nn.Parameter(weight.to(device))
    expected_bias = layer.bias.detach().cpu() if bias else None
    model = nn.Sequential(layer)
    linears.replace(model, ["0"], "triton")
    for tokens in (1, 2, 5):
        x, _ = inputs(tokens, 5, 24, torch.float16, bias=False)
        y = model(x.to(device).reshape(1, tokens, 24))
        assert y.is_contiguous()
        require_close(y[0], x, weight, expected_bias)


class Library:
    """Stands in for cuSPARSELt behind torch's operators: as their meta kernels, but with values.

    Attributes:
        searched: how many columns the dense matrix had, each time.
        taken: the algorithms that products were asked for.
    """

    def __init__(self) -> None:
        self.searched: list[int] = []
        self.taken: list[Algorithm] = []

    def search(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        dtype: torch.dtype | None,
        transpose_result: bool,
    ) -> tuple[int, int, int, int]:
        assert (alpha, dtype) == (None, None)
        assert transpose_result == (dense.dtype == torch.bfloat16)
        self.searched.append(dense.shape[1])
        return 3, 2, 1, 9

    def multiply(
        self,
        compressed: Tensor,
        dense: Tensor,
        *,
        bias: Tensor | None,
        transpose_result: bool,
        alg_id: int,
        split_k: int,
        split_k_mode: int,
    ) -> Tensor:
        assert transpose_result == (dense.dtype == torch.bfloat16)
        assert dense.shape[1] % 8 == 0
        assert dense.T.is_contiguous()
        self.taken.append(Algorithm(alg_id, split_k, split_k_mode))
        product = dense.T.float() @ compressed.float().T
        y = (product + (0 if bias is None else bias.float())).to(dense.dtype)
        return y if transpose_result else y.T.contiguous()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in.multiply)
    namespace = type("Namespace", (), {"mm_search": staticmethod(stand_in.search)})
    monkeypatch.setattr(torch._C, "_cusparselt", namespace, raising=False)
    monkeypatch.setattr(cusparselt, "_found", {})
    return stand_in


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_cusparselt_searches_once_for_each_shape_and_power_of_two_of_tokens(
    library: Library, bias: bool, dtype: torch.dtype
) -> None:
    weight = two_four(32, 64, dtype)
    other = CusparseltWeight.of(two_four(64, 64, dtype))
    compressed = CusparseltWeight.of(weight)
    for tokens in (1, 5, 8, 9, 16, 17, 30):
        x, b = inputs(tokens, 32, 64, dtype, bias=bias)
        y = cusparselt.linear(x, compressed, b)
        assert y.is_contiguous()
        require_close(y, x, weight, b)
    assert library.searched == [8, 16, 32]
    cusparselt.linear(inputs(3, 64, 64, dtype, bias=False)[0], other)
    assert library.searched == [8, 16, 32, 8]
    assert set(library.taken) == {Algorithm(3, 2, 1)}


def test_cusparselt_without_a_search_takes_what_torch_takes(library: Library) -> None:
    weight = CusparseltWeight.of(two_four(32, 64, torch.float16))
    cusparselt.linear(inputs(3, 32, 64, torch.float16, bias=False)[0], weight, search=False)
    assert library.searched == []
    assert library.taken == [Algorithm(0, 1, -1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_s_operator_takes_what_is_given_and_returns_tokens_by_outputs(
    dtype: torch.dtype,
) -> None:
    # Tensors without values, on which torch's own rules of shapes and dtypes run.
    x, bias, compressed = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in [(13, 64), (32,), (32, 36)]
    )
    y = cusparselt.linear(x, CusparseltWeight(compressed, 32, 64), bias, search=False)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (13, 32), dtype)
    assert y.is_contiguous()


def test_without_a_search_torch_s_defaults_are_taken() -> None:
    schema = torch.ops.aten._cslt_sparse_mm.default._schema
    defaults = {each.name: each.default_value for each in schema.arguments}
    first = Algorithm()
    assert defaults["alg_id"] == first.number
    assert defaults["split_k"] == first.split_k
    assert defaults["split_k_mode"] == first.split_k_mode
