import ctypes
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.kernels import cuda_module, sparse_mma
from runtime.kernels.packed import DTYPES
from runtime.kernels.sparse_mma import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    MMA,
    WGMMA,
    Kernel,
    SparseMmaWeight,
)
from tests.runtime.kernels import simulated_gpu
from tests.runtime.kernels.oracle import inputs, require_close, two_four
from thanos_deploy.errors import InputError, PlatformError

SHAPES = [(37, 148, 1), (130, 68, 70), (128, 320, 64), (300, 64, 17)]

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def columns_of(metadata: Tensor) -> np.ndarray:
    """Where each kept value comes from, int[rows, kept], as sparse_mma.cu says mma.sp is told.

    Word (columns / 32, row // 32, lane): lane 4 g + t is about rows g + 16 (t // 2) (low half) and
    8 below (high half), columns 16 (t % 2) to 16 (t % 2) + 15; of every four columns two 2-bit
    indices, the first in the lowest bits.
    """
    rows, columns = metadata.shape[0], metadata.shape[1] * 16
    words = metadata.contiguous().view(torch.int32).numpy().view(np.uint32).reshape(-1, rows)
    found = np.zeros((rows, columns // 2), np.int64)
    for row in range(rows):
        for kept in range(columns // 2):
            group = kept // 2
            lane = row % 8 * 4 + row % 32 // 16 * 2 + group % 8 // 4
            word = int(words[group // 8, row // 32 * 32 + lane])
            shift = row % 16 // 8 * 16 + group % 4 * 4 + kept % 2 * 2
            found[row, kept] = group * 4 + (word >> shift & 3)
    return found


def test_the_metadata_says_which_input_every_kept_value_meets() -> None:
    weight = two_four(160, 128, torch.float16)
    packed = SparseMmaWeight.of(weight)
    columns = columns_of(packed.metadata)
    x = inputs(5, 160, 128, torch.float16, bias=False)[0]
    # The definition of mma.sp: of each group, the two inputs that the indices name.
    picked = np.take(x.double().numpy(), columns, axis=1)
    y = (picked * packed.values.double().numpy()).sum(axis=2)
    expected = x.double().numpy() @ weight.double().numpy().T
    np.testing.assert_allclose(y[:, :160], expected, atol=1e-12)
    assert not y[:, 160:].any()
    # mma.sp::ordered_metadata promises that the first index is below the second.
    assert (columns[:, 0::2] < columns[:, 1::2]).all()


def test_what_the_kernel_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"up_proj: the 2:4 kernels do not support torch\.float32"):
        SparseMmaWeight.of(torch.zeros(4, 4), "up_proj")
    with pytest.raises(InputError, match=r"up_proj: 2 groups .* first in row 1 from column 0 on"):
        SparseMmaWeight.of(
            torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).half(), "up_proj"
        )


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels compiled for the CPU, with a sanitizer."""
    program = tmp_path_factory.mktemp("simulated") / "program"
    simulated_gpu.compile("simulated_program.cpp", program, "-g", f"-fsanitize={request.param}")
    return program


def simulate(
    program: Path,
    kernel: Kernel,
    splits: int,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    packed = SparseMmaWeight.of(weight)
    readable = sparse_mma.readable(x)
    rows, columns = packed.values.shape[0], 2 * packed.values.shape[1]
    sizes = (kernel.threads, kernel.shared_bytes, kernel.tokens, splits, rows, columns)
    sizes += (*readable.shape, packed.rows, int(bias is not None))
    arrays = (packed.values, packed.metadata, readable, *(() if bias is None else (bias,)))
    done = subprocess.run(
        [program, kernel.name(x.dtype), *map(str, sizes)],
        input=b"".join(a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    return torch.frombuffer(bytearray(done.stdout), dtype=x.dtype).reshape(len(x), packed.rows)


# Each kernel, with tokens and rows that do not fill its blocks: kernel, rows, columns, tokens,
# splits and dtype. Columns of 576 make 9 steps, so that every stage goes round twice.
SIMULATED = [
    (MMA[0], 37, 148, 1, 1, torch.float16),
    (MMA[0], 130, 576, 7, 4, torch.bfloat16),
    (MMA[1], 128, 576, 20, 2, torch.float16),
    (MMA[2], 128, 320, 32, 5, torch.bfloat16),
    (MMA[3], 130, 68, 70, 1, torch.float16),
    (MMA[3], 136, 192, 64, 3, torch.bfloat16),
    (WGMMA[0], 37, 148, 1, 1, torch.float16),
    (WGMMA[0], 130, 576, 70, 1, torch.bfloat16),
    (WGMMA[0], 130, 576, 33, 3, torch.float16),
    (WGMMA[1], 136, 320, 130, 2, torch.float16),
    (WGMMA[1], 128, 64, 17, 1, torch.bfloat16),
    (WGMMA[2], 128, 576, 258, 1, torch.float16),
    (WGMMA[2], 37, 148, 20, 1, torch.bfloat16),
]


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize(
    ("kernel", "rows", "columns", "tokens", "splits", "dtype"),
    SIMULATED,
    ids=lambda value: f"{value.family}-{value.tokens}" if isinstance(value, Kernel) else None,
)
def test_the_kernels_on_a_simulated_gpu_give_the_product_without_race_or_stray_access(
    program: Path,
    kernel: Kernel,
    rows: int,
    columns: int,
    tokens: int,
    splits: int,
    dtype: torch.dtype,
) -> None:
    weight = two_four(rows, columns, dtype)
    x, bias = inputs(tokens, rows, columns, dtype, bias=dtype == torch.float16)
    require_close(simulate(program, kernel, splits, weight, x, bias), x, weight, bias)


@pytest.mark.slow
@needs_gxx
def test_the_host_launches_each_kernel_with_what_it_takes(tmp_path: Path) -> None:
    with simulated_gpu.driver(tmp_path):
        # mma with blocks that share a tile and count themselves; wgmma without and with them.
        for rows, columns, tokens in ((37, 1028, 5), (130, 68, 17), (37, 1028, 70)):
            weight = two_four(rows, columns, torch.bfloat16)
            packed = SparseMmaWeight.of(weight)
            x, bias = inputs(tokens, rows, columns, torch.bfloat16, bias=True)
            for given_bias in (bias, None):
                require_close(sparse_mma.linear(x, packed, given_bias), x, weight, given_bias)
                assert not packed.arrivals.any()


def test_without_a_compiler_nothing_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(PlatformError, match=r"g\+\+ is not installed"),
        simulated_gpu.driver(tmp_path),
    ):
        pytest.fail("there is a driver")


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 400),
    tokens=st.integers(1, 5000),
    capability=st.sampled_from([(8, 0), (8, 9), (9, 0), (10, 0)]),
    multiprocessors=st.integers(1, 200),
)
def test_a_plan_covers_the_product_with_a_kernel_that_the_gpu_has(
    rows: int, columns: int, tokens: int, capability: tuple[int, int], multiprocessors: int
) -> None:
    rows, columns = rows * BLOCK_ROWS, columns * BLOCK_COLUMNS
    found = sparse_mma.plan(rows, columns, tokens, capability, multiprocessors)
    assert found.row_blocks * BLOCK_ROWS == rows
    assert 0 <= found.token_blocks * found.kernel.tokens - tokens < found.kernel.tokens
    assert found.kernel in MMA or capability == (9, 0)
    # Every split has a step of columns, and a counter; and all blocks run at a time.
    assert 1 <= found.splits <= max(1, columns // BLOCK_COLUMNS // 4)
    tiles = found.row_blocks * found.token_blocks
    if found.splits > 1:
        assert tiles <= len(SparseMmaWeight.of(two_four(1, 4, torch.float16)).arrivals)
        assert tiles * found.splits <= found.kernel.blocks_wanted * multiprocessors


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "kernel", "blocks"),
    [
        (4096, 4096, 1, MMA[0], 256),
        (1024, 4096, 16, MMA[1], 128),
        (1024, 4096, 64, WGMMA[0], 40),
        (4096, 14336, 64, WGMMA[0], 128),
        (4096, 4096, 256, WGMMA[0], 128),
        (14336, 4096, 256, WGMMA[2], 112),
        (1024, 4096, 2048, WGMMA[1], 128),
        (4096, 4096, 2048, WGMMA[2], 256),
    ],
)
def test_the_layers_of_an_8b_model_occupy_an_h100(
    rows: int, columns: int, tokens: int, kernel: Kernel, blocks: int
) -> None:
    found = sparse_mma.plan(rows, columns, tokens, (9, 0), 132)
    assert found.kernel == kernel
    assert found.row_blocks * found.token_blocks * found.splits == blocks


def test_x_is_copied_only_where_the_kernels_cannot_read_it() -> None:
    x = torch.randn(4, 72).half()
    assert sparse_mma.readable(x) is x
    padded = sparse_mma.readable(x[:, :68])
    assert padded.shape == (4, 72)
    assert padded[:, :68].equal(x[:, :68])
    assert not padded[:, 68:].any()
    shifted = torch.empty(4 * 72 + 1).half()[1:].view(4, 72)
    assert sparse_mma.readable(shifted).data_ptr() % 16 == 0


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    ("family", "capability", "instructions", "copies"),
    [
        ("sparse_mma", (8, 0), ("HMMA.SP.16832.F32",), "LDGSTS.E.BYPASS.LTC128B.128"),
        ("sparse_mma", (9, 0), ("HMMA.SP.16832.F32",), "LDGSTS.E.BYPASS.LTC128B.128"),
        (
            "sparse_wgmma",
            (9, 0),
            tuple(f"HGMMA.SP.64x{tokens}x32.F32" for tokens in (64, 128, 256)),
            "UTMALDG.2D",
        ),
    ],
)
def test_nvcc_makes_sparse_tensor_core_instructions_of_it(
    family: str,
    capability: tuple[int, int],
    instructions: tuple[str, ...],
    copies: str,
    tmp_path: Path,
) -> None:
    from benchmarks.kernel_resources import compile_cuda, disassemble, inspect

    cubin = tmp_path / "cubin"
    compile_cuda(cubin, f"{family}.cu", cuda_module.target(capability))
    found = inspect(family, 0, cubin.read_bytes(), 0)
    both = {f"{each}{suffix}" for each in instructions for suffix in ("", ".BF16")}
    assert set(found.tensor_instructions) == both
    assert found.stack_bytes == 0
    words = {word.rstrip(",;") for word in disassemble(cubin.read_bytes()).split()}
    # Loads of W and x go to shared memory by themselves, and y leaves in pieces of 16 bytes.
    assert {copies, "STG.E.128"} <= words
    assert not {word for word in words if word.startswith(("LDL", "STL"))}


def test_nvrtc_compiles_it_without_a_toolkit() -> None:
    nvrtc = None
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        with suppress(OSError):
            nvrtc = nvrtc or ctypes.CDLL(name)
    if nvrtc is None:
        pytest.skip("libnvrtc is not on the library path")
    for capability in ((8, 0), (8, 9), (9, 0)):
        architecture = cuda_module.target(capability)
        assert cuda_module.compile("sparse_mma.cu", architecture, nvrtc)[:4] == b"\x7fELF"
    assert cuda_module.compile("sparse_wgmma.cu", "sm_90a", nvrtc)[:4] == b"\x7fELF"
    with pytest.raises(PlatformError, match="does not compile for sm_75"):
        cuda_module.compile("sparse_mma.cu", "sm_75", nvrtc)


def test_a_gpu_without_sparse_tensor_cores_is_refused() -> None:
    with pytest.raises(PlatformError, match=r"compute capability 7\.5"):
        cuda_module.target((7, 5))


def test_an_old_driver_is_told_from_the_toolkit() -> None:
    class OldDriver:
        """The two functions of libcuda that say what is wrong."""

        def cuDriverGetVersion(self, version: Any) -> None:  # noqa: N802
            version._obj.value = 12040

        def cuGetErrorString(self, result: int, text: Any) -> None:  # noqa: N802
            text._obj.value = b"device kernel image is invalid"

    error = cuda_module.not_loaded("sparse_mma.cu", "sm_80", cast(ctypes.CDLL, OldDriver()), 200)
    assert "is refused by the driver, which is for CUDA 12.4: device kernel image" in str(error)
    assert "install a driver for CUDA" in error.fix


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize(("rows", "columns", "tokens"), [*SHAPES, (4096, 4096, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_on_a_gpu_gives_the_product(
    rows: int, columns: int, tokens: int, dtype: torch.dtype
) -> None:
    weight = two_four(rows, columns, dtype)
    x, bias = inputs(tokens, rows, columns, dtype, bias=True)
    assert bias is not None
    y = sparse_mma.linear(x.cuda(), SparseMmaWeight.of(weight.cuda()), bias.cuda())
    require_close(y, x, weight, bias)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("tokens", [1, 16, 64, 100])
def test_a_cuda_graph_replays_the_product_bit_by_bit(tokens: int) -> None:
    weight = two_four(1024, 4096, torch.float16)
    packed = SparseMmaWeight.of(weight.cuda())
    x, _ = inputs(tokens, 1024, 4096, torch.float16, bias=False)
    on_gpu = x.cuda()
    first = sparse_mma.linear(on_gpu, packed)
    require_close(first, x, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = sparse_mma.linear(on_gpu, packed)
    for _ in range(3):
        again.fill_(float("nan"))
        graph.replay()
        assert again.equal(first)
    assert not packed.arrivals.any()
