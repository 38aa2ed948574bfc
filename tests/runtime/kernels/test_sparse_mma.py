import ctypes
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.kernels import sparse_mma
from runtime.kernels.packed import DTYPES
from runtime.kernels.sparse_mma import SparseMmaWeight
from tests.runtime.kernels.oracle import inputs, require_close, two_four
from thanos_deploy.errors import InputError, PlatformError

HERE = Path(__file__).parent
SHAPES = [(37, 148, 1), (130, 68, 70), (128, 320, 64), (300, 64, 17)]

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
    with pytest.raises(InputError, match=r"up_proj: the 2:4 kernels take no torch\.float32"):
        SparseMmaWeight.of(torch.zeros(4, 4), "up_proj")
    with pytest.raises(InputError, match=r"up_proj: 2 groups .* first in row 1 from column 0 on"):
        SparseMmaWeight.of(
            torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).half(), "up_proj"
        )


@pytest.fixture(
    scope="module",
    params=[
        (sanitizer, variant)
        for sanitizer in ("address,undefined", "thread")
        for variant in ("MMA", "WARPGROUP")
    ],
    ids="-".join,
)
def simulated_gpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel compiled for the CPU, with a sanitizer and one of its two ways to multiply."""
    sanitizer, variant = request.param
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("simulated") / "gpu"
    options = ["-std=c++20", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", f"-D{variant}"]
    options += ["-I", str(sparse_mma.SOURCE.parent), "-o", str(program)]
    subprocess.run(["g++", *options, str(HERE / "simulated_gpu.cpp")], check=True)
    return program


@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_on_a_simulated_gpu_gives_the_product_without_race_or_stray_access(
    simulated_gpu: Path, rows: int, columns: int, tokens: int, dtype: torch.dtype
) -> None:
    weight = two_four(rows, columns, dtype)
    x, bias = inputs(tokens, rows, columns, dtype, bias=dtype == torch.float16)
    packed = SparseMmaWeight.of(weight)
    padded_rows, padded_columns = packed.values.shape[0], 2 * packed.values.shape[1]
    padded = torch.nn.functional.pad(x, (0, padded_columns - columns))
    sizes = (padded_rows, padded_columns, tokens, rows, int(bias is not None))
    arrays = (packed.values, packed.metadata, padded, *(() if bias is None else (bias,)))
    done = subprocess.run(
        [simulated_gpu, str(dtype).removeprefix("torch."), *map(str, sizes)],
        input=b"".join(a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    y = torch.frombuffer(bytearray(done.stdout), dtype=dtype).reshape(tokens, rows)
    require_close(y, x, weight, bias)


@needs_nvcc
@pytest.mark.parametrize(
    ("capability", "instruction"),
    [((8, 0), "HMMA.SP.16832.F32"), ((9, 0), "HGMMA.SP.64x64x32.F32")],
)
def test_nvcc_makes_sparse_tensor_core_instructions_of_it(
    capability: tuple[int, int], instruction: str, tmp_path: Path
) -> None:
    from benchmarks.kernel_resources import compile_cuda, inspect

    compile_cuda(tmp_path / "cubin", sparse_mma.target(capability))
    found = inspect("sparse_mma", 0, (tmp_path / "cubin").read_bytes(), 0)
    assert found.tensor_instructions == (instruction, f"{instruction}.BF16")
    assert found.stack_bytes == 0


def test_nvrtc_compiles_it_without_a_toolkit() -> None:
    nvrtc = None
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        with suppress(OSError):
            nvrtc = nvrtc or ctypes.CDLL(name)
    if nvrtc is None:
        pytest.skip("libnvrtc is not on the library path")
    for capability in ((8, 0), (8, 9), (9, 0)):
        assert sparse_mma.compile(sparse_mma.target(capability), nvrtc)[:4] == b"\x7fELF"
    with pytest.raises(PlatformError, match="does not compile for sm_75"):
        sparse_mma.compile("sm_75", nvrtc)


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
