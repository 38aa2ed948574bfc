"""y = x W^T + b with W 2:4 on sparse tensor cores, by two kernels in CUDA C++.

`sparse_mma.cu` runs from compute capability 8.0 on, and is made for few tokens; `sparse_wgmma.cu`
is for many tokens on Hopper. Both read the same packed weight.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from runtime.kernels import cuda_module
from runtime.kernels.packed import require_dtype
from thanos_deploy.model.packing import to_cutlass

# As in sparse_tile.cuh.
BLOCK_ROWS = 128
BLOCK_COLUMNS = 64
_ROWS_OF_WGMMA = 64

# The host pads the rows of x to this, so that they are aligned to 16 bytes.
_INPUTS_MULTIPLE = 8

# A block that shares its tile with others should have at least so many steps of columns: fewer
# do not fill its pipeline, and each of the blocks leaves sums that have to be read again.
_STEPS_AT_LEAST = 4

# The tiles that several blocks may share; where they are more, they fill any GPU by themselves.
_SHARED_TILES_AT_MOST = 1024

# More tokens than these go to wgmma where there is one: with fewer, reading W is all that counts.
_TOKENS_OF_MMA = 16

# In clock cycles of an H100, for the choice among the kernels for wgmma: what shared memory takes
# in and gives out, what a multiprocessor writes and reads of sums that are shared, and what it
# costs to start a block and to wait for the others.
_SHARED_BYTES_A_CYCLE = 115
_PARTIAL_BYTES_A_CYCLE = 32
_CYCLES_TO_START = 2500
_CYCLES_TO_SHARE = 1500


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel for a block of tokens, as its source has it.

    Attributes:
        family: name of the source file, without suffix, and beginning of the kernel's name.
        tokens: of a block.
        threads: of a block.
        other_bytes: of shared memory, beside the stages.
        blocks_wanted: on a multiprocessor, for enough copies to be on their way.
    """

    family: str
    tokens: int
    threads: int
    other_bytes: int
    blocks_wanted: int

    @property
    def source(self) -> str:
        """Name of the source file."""
        return f"{self.family}.cu"

    @property
    def stage_bytes(self) -> int:
        """Of a step of columns: values, metadata and x."""
        metadata = BLOCK_ROWS * BLOCK_COLUMNS // 32 * 4
        return (BLOCK_ROWS // 2 + self.tokens) * BLOCK_COLUMNS * 2 + metadata

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return _STAGES * self.stage_bytes + self.other_bytes

    def name(self, dtype: torch.dtype) -> str:
        """Of the function."""
        return f"{self.family}_{self.tokens}_{str(dtype).removeprefix('torch.')}"


_STAGES = 4

# The more tokens, the more sums of float32 are left and read again by blocks that share a tile.
MMA = tuple(
    Kernel("sparse_mma", tokens, 128, 0, blocks)
    for tokens, blocks in ((8, 2), (16, 2), (32, 1), (64, 1))
)
# Beside the stages there are two barriers of 8 bytes for each.
WGMMA = tuple(Kernel("sparse_wgmma", tokens, 288, _STAGES * 2 * 8, 1) for tokens in (64, 128, 256))


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is launched.

    Attributes:
        kernel: by which kernel.
        row_blocks, token_blocks: tiles of y.
        splits: blocks that share a tile.
    """

    kernel: Kernel
    row_blocks: int
    token_blocks: int
    splits: int

    @property
    def tiles(self) -> int:
        """Of y."""
        return self.row_blocks * self.token_blocks


@cache
def plan(
    rows: int, columns: int, tokens: int, capability: tuple[int, int], multiprocessors: int
) -> Plan:
    """Choose a kernel by the number of tokens, and occupy the GPU.

    Every product asks, and the answer is that of the sizes alone, so it is worked out once.

    Args:
        rows, columns: of the padded weight.
        tokens: of x.
        capability: compute capability of the GPU.
        multiprocessors: of the GPU.
    """
    row_blocks, steps = rows // BLOCK_ROWS, columns // BLOCK_COLUMNS

    def of(kernel: Kernel, splits: int) -> Plan:
        return Plan(kernel, row_blocks, -(-tokens // kernel.tokens), splits)

    def most_splits(kernel: Kernel) -> int:
        """As many as run at a time."""
        tiles = of(kernel, 1).tiles
        if tiles > _SHARED_TILES_AT_MOST:
            return 1
        return max(
            1, min(kernel.blocks_wanted * multiprocessors // tiles, steps // _STEPS_AT_LEAST)
        )

    if tokens <= _TOKENS_OF_MMA or capability != (9, 0):
        kernel = next((each for each in MMA if tokens <= each.tokens), MMA[-1])
        return of(kernel, most_splits(kernel))
    return min(
        (of(kernel, splits) for kernel in WGMMA for splits in range(1, most_splits(kernel) + 1)),
        key=lambda plan: _cycles(plan, steps, multiprocessors),
    )


def _cycles(plan: Plan, steps: int, multiprocessors: int) -> float:
    """About what a product by wgmma takes.

    Shared memory is what it waits for: a step writes its stage, and reads x for every 64 rows of W.

    Args:
        plan: the product.
        steps: of columns, of all splits.
        multiprocessors: of the GPU.
    """
    kernel = plan.kernel
    inputs_again = (BLOCK_ROWS // _ROWS_OF_WGMMA - 1) * kernel.tokens * BLOCK_COLUMNS * 2
    step = (2 * kernel.stage_bytes + inputs_again) / _SHARED_BYTES_A_CYCLE
    turns = -(-plan.tiles * plan.splits // multiprocessors)
    cycles = turns * (_CYCLES_TO_START + -(-steps // plan.splits) * step)
    if plan.splits > 1:
        passed_on = (1 + plan.splits) * kernel.tokens * BLOCK_ROWS * 4
        cycles += _CYCLES_TO_SHARE + passed_on / _PARTIAL_BYTES_A_CYCLE
    return cycles


@dataclass(frozen=True, slots=True, eq=False)
class SparseMmaWeight:
    """A 2:4 matrix, padded with zeros to whole blocks of the kernels.

    Products with one weight must not run on two streams at a time, because the blocks that share a
    tile count themselves in it.

    Attributes:
        values: [padded rows, padded columns / 2].
        metadata: int16[padded rows, padded columns / 16], in the order of `to_cutlass`.
        arrivals: int32, zeros whenever no product runs.
        rows, columns: of the matrix itself.
    """

    values: Tensor
    metadata: Tensor
    arrivals: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: Tensor, name: str = "weight") -> "SparseMmaWeight":
        """Pack a matrix, on the device where it is.

        Args:
            weight: one of `packed.DTYPES` [rows, columns], 2:4 along the columns.
            name: for the message.

        Raises:
            InputError: another dtype.
            ModelError: the weight is not 2:4.
        """
        require_dtype(weight, name)
        rows, columns = weight.shape
        padding = (0, -columns % BLOCK_COLUMNS, 0, -rows % BLOCK_ROWS)
        values, metadata = to_cutlass(torch.nn.functional.pad(weight.detach(), padding), name)
        arrivals = torch.zeros(_SHARED_TILES_AT_MOST, dtype=torch.int32, device=weight.device)
        return cls(values, metadata, arrivals, rows, columns)


def linear(x: Tensor, weight: SparseMmaWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, summed in float32, and the same each time.

    After the first call for a number of tokens a CUDA graph can capture it.

    Args:
        x: the weight's dtype [tokens, inputs], on a GPU.
        weight: [outputs, inputs].
        bias: the weight's dtype [outputs].

    Returns:
        the weight's dtype [tokens, outputs].

    Raises:
        PlatformError: the kernel cannot be compiled or loaded here.
    """
    tokens, inputs = x.shape
    assert (inputs, x.dtype) == (weight.columns, weight.values.dtype)
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    y = x.new_empty(tokens, weight.rows)
    if not tokens:
        return y
    x = readable(x)
    rows, columns = weight.values.shape[0], 2 * weight.values.shape[1]
    with torch.cuda.device(x.device):
        properties = torch.cuda.get_device_properties(x.device)
        capability = (properties.major, properties.minor)
        chosen = plan(rows, columns, tokens, capability, properties.multi_processor_count)
        kernel = chosen.kernel
        launch = cuda_module.kernel(
            x.device.index, kernel.source, kernel.name(x.dtype), kernel.threads, kernel.shared_bytes
        )
        partial = _partial(x, chosen)
        if kernel in WGMMA:
            values = cuda_module.tensor_map(weight.values, BLOCK_ROWS, BLOCK_COLUMNS // 2)
            boxes = cuda_module.tensor_map(x, kernel.tokens, BLOCK_COLUMNS)
            launch(
                (chosen.tiles, 1, chosen.splits),
                [values, boxes, weight.metadata, bias, y, partial, weight.arrivals],
                [rows, columns, tokens, weight.rows],
            )
        else:
            launch(
                (chosen.token_blocks, chosen.row_blocks, chosen.splits),
                [weight.values, weight.metadata, x, bias, y, partial, weight.arrivals],
                [rows, columns, tokens, x.shape[1], weight.rows],
            )
    return y


def readable(x: Tensor) -> Tensor:
    """An x whose rows the kernels can read in pieces of 16 bytes; itself, as models have it."""
    if missing := -x.shape[1] % _INPUTS_MULTIPLE:
        x = torch.nn.functional.pad(x, (0, missing))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _partial(x: Tensor, chosen: Plan) -> Tensor | None:
    """Room for the sums of the blocks that share a tile."""
    if chosen.splits == 1:
        return None
    sums = chosen.kernel.tokens * BLOCK_ROWS
    return x.new_empty(chosen.tiles, chosen.splits, sums, dtype=torch.float32)
