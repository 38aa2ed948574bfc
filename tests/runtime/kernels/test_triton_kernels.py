import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.kernels import decode, prefill, split_k
from runtime.kernels.packed import DTYPES, PackedWeight
from tests.runtime.kernels.oracle import inputs, require_close, two_four
from thanos_deploy.errors import InputError
from thanos_deploy.model.packing import unpack

KERNELS = (decode, prefill)


def require_product(
    kernel: ModuleType, tokens: int, weight: Tensor, device: torch.device, *, bias: bool
) -> None:
    """Compare a kernel's product of random tokens with that of float64."""
    rows, columns = weight.shape
    x, b = inputs(tokens, rows, columns, weight.dtype, bias=bias)
    packed = PackedWeight.of(weight.to(device))
    y = kernel.linear(x.to(device), packed, None if b is None else b.to(device))
    assert y.dtype == weight.dtype
    require_close(y, x, weight, b)


# Tokens, of which one kernel takes a block at once and the other one after the other, which is slow
# in the interpreter.
@pytest.mark.parametrize(
    ("kernel", "tokens"), [(decode, (1, 2)), (prefill, (1, 2, 3, 15, 16, 17, 32, 33))]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_float64(
    kernel: ModuleType, tokens: Sequence[int], dtype: torch.dtype, bias: bool, device: torch.device
) -> None:
    # Rows are odd, columns are a multiple of neither a word, nor a block, nor the padding.
    weight = two_four(5, 148, dtype)
    for number in tokens:
        require_product(kernel, number, weight, device, bias=bias)


@pytest.mark.slow
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 40),
    groups=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_prefill_products_of_any_shape_are_those_of_float64(
    tokens: int, rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = two_four(rows, groups * 4, dtype, seed)
    require_product(prefill, tokens, weight, device, bias=seed % 2 == 0)


@pytest.mark.slow
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 1200),  # 2048 columns are an iteration of the loop
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_decode_products_of_any_shape_are_those_of_float64(
    rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = two_four(rows, groups * 4, dtype, seed)
    require_product(decode, 1, weight, device, bias=seed % 2 == 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_weight_that_is_not_read_in_whole_blocks_touches_nothing_else(
    kernel: ModuleType, device: torch.device
) -> None:
    weight = two_four(5, 24, torch.float16)
    # The tokens after the three that are meant are NaN, and so is what follows the bias.
    x = torch.full((8, 24), float("nan"), dtype=torch.float16)
    x[:3] = inputs(3, 5, 24, torch.float16, bias=False)[0]
    bias = torch.full((64,), float("nan"), dtype=torch.float16)
    bias[:5] = torch.arange(5)
    y = kernel.linear(x.to(device)[:3], PackedWeight.of(weight.to(device)), bias.to(device)[:5])
    require_close(y, x[:3], weight, bias[:5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("tokens", [1, 16, 256, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products_on_a_gpu_are_those_of_torch(tokens: int, dtype: torch.dtype) -> None:
    weight = two_four(4096, 2048, dtype).cuda()
    x = inputs(tokens, 4096, 2048, dtype, bias=False)[0].cuda()
    expected = torch.matmul(x.float(), weight.float().T)
    packed = PackedWeight.of(weight)
    for kernel in KERNELS:
        y = kernel.linear(x, packed).float()
        # float32 here may be multiplied as tf32, which has float16's precision.
        limit = 4 * torch.finfo(dtype).eps * expected.abs().max()
        assert (y - expected).abs().max() <= limit, kernel


@pytest.mark.parametrize("blocks", [1, 2, 3, 99])
@pytest.mark.parametrize("bias", [True, False])
def test_columns_divided_among_blocks_give_the_product_of_float64(
    blocks: int, bias: bool, device: torch.device
) -> None:
    # 640 columns are 80 words, of which a block takes 32 at least.
    weight = two_four(5, 640, torch.float16)
    x, b = inputs(18, 5, 640, torch.float16, bias=bias)
    packed = PackedWeight.of(weight.to(device))
    place = None if b is None else b.to(device)
    first, again = (prefill.linear(x.to(device), packed, place, blocks=blocks) for _ in range(2))
    require_close(first, x, weight, b)
    assert first.equal(again)


@given(words=st.integers(1, 4000), tiles=st.integers(1, 4000), blocks=st.integers(1, 1000))
def test_splits_cover_every_word_once_in_whole_blocks(words: int, tiles: int, blocks: int) -> None:
    per_split = split_k.words_per_split(words, tiles, blocks)
    splits = -(-words // per_split)
    assert per_split % 32 == 0
    # No split is empty, and none but the first few tiles are divided beyond what is asked for.
    assert (splits - 1) * per_split < words <= splits * per_split
    assert splits == 1 or splits * tiles <= blocks


def test_the_large_shapes_of_llama_fill_an_h100() -> None:
    for outputs, inputs_ in [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)]:
        tiles, words = outputs // 64, inputs_ // 8
        splits = -(-words // split_k.words_per_split(words, tiles, 4 * 132))
        assert tiles * splits >= 1.5 * 132, (outputs, inputs_)


@pytest.mark.parametrize("kernel", KERNELS)
def test_x_that_begins_anywhere_in_memory_is_read_right(
    kernel: ModuleType, device: torch.device
) -> None:
    weight = two_four(5, 24, torch.float16)
    x, _ = inputs(2, 5, 24, torch.float16, bias=False)
    odd = torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()]).to(device)[1:].view(2, 24)
    require_close(kernel.linear(odd, PackedWeight.of(weight.to(device))), x, weight, None)


def test_packed_weights_are_the_documented_layout_with_padding() -> None:
    weight = two_four(3, 20, torch.bfloat16)
    packed = PackedWeight.of(weight)
    assert packed.words.shape == packed.mask.shape == (3, 16)
    values = packed.words.view(torch.bfloat16)[:, :10]
    assert unpack(values, packed.mask[:, :3], 20).equal(weight)
    assert not packed.words[:, 3:].any()
    assert not packed.mask[:, 3:].any()
    assert (packed.rows, packed.columns) == (3, 20)


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"up_proj: the 2:4 kernels do not support torch\.float32"):
        PackedWeight.of(torch.zeros(4, 4), "up_proj")
    dense = two_four(7, 32, torch.float16)
    dense[5, 8:12] = 1
    with pytest.raises(InputError, match=r"up_proj: 1 groups .* in row 5 from column 8 on"):
        PackedWeight.of(dense, "up_proj")


@pytest.mark.slow
def test_every_configuration_compiles_for_sm_80_and_sm_90_and_spills_nothing(
    tmp_path: Path,
) -> None:
    command = "benchmarks.kernel_resources --architectures 80 90"
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**os.environ, **environment, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    triton_kernels = [each for each in found if not each["kernel"].startswith("sparse_")]
    # Two architectures; the smallest and the largest block of tokens of `prefill`.
    assert len(triton_kernels) == 2 * (len(decode.CONFIGS) + 2 * len(prefill.CONFIGS))
    for each in triton_kernels:
        assert each["registers"] > 0, each
        assert each["stack_bytes"] == 0, each
        # GPUs of compute capability 8.6 and 8.9 have the least: 99 KiB of shared memory a block.
        assert each["shared_bytes"] <= 99 * 1024, each
        assert bool(each["tensor_instructions"]) == each["kernel"].startswith("prefill"), each
        loop = each["loop"]
        widths = {name.rpartition(".")[2] for name in loop["loads"]}
        if "STAGES=1" in each["kernel"]:
            # Everything but the masks comes in 16 bytes, and no thread waits for another.
            assert widths == {"128", "U16"}, each
            assert loop["barriers"] == 0, each
        else:
            assert any(name.startswith("LDGSTS") for name in loop["loads"]), each
            # Another one where tensor cores read W's tile from shared memory.
            assert loop["barriers"] <= 3, each
        if each["architecture"] == 90 and "BLOCK_M=128" not in each["kernel"]:
            # Slower to issue than to read, and the kernel would not be the one to use.
            assert each["prediction"]["issue_seconds"] < each["prediction"]["memory_seconds"], each
