"""y = x W^T + b with W 2:4 on sparse tensor cores, by two kernels in CUDA C++.

`sparse_mma.cu` runs from compute capability 8.0 on and is tuned for few tokens; `sparse_wgmma.cu`
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

# The host pads the inputs of x to this multiple, so that its rows are aligned to 16 bytes.
_INPUTS_MULTIPLE = 8

# With split-K, a block should have at least this many steps of columns: fewer do not fill its
# pipeline, and every split writes partial sums that have to be read again.
_STEPS_AT_LEAST = 4

# Split-K is used for at most this many tiles of y; more tiles fill any GPU by themselves.
_SHARED_TILES_AT_MOST = 1024

# Up to this many tokens `sparse_mma.cu` is used even on Hopper: reading W is then the bottleneck.
_TOKENS_OF_MMA = 16

# Cost model of an H100, in clock cycles, for the choice among the kernels for wgmma: bytes that
# shared memory reads or writes in a cycle, bytes of partial sums that a multiprocessor reads or
# writes in a cycle, and the cycles to start a block and to wait for the other splits of a tile.
_SHARED_BYTES_A_CYCLE = 115
_PARTIAL_BYTES_A_CYCLE = 32
_CYCLES_TO_START = 2500
_CYCLES_TO_SHARE = 1500


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel for a certain number of tokens in a block, with the constants of its source.

    Attributes:
        family: name of the source file without suffix, and prefix of the kernel's name.
        tokens: tokens of a block.
        threads: threads of a block.
        other_bytes: bytes of shared memory beside the stages.
        blocks_wanted: blocks on a multiprocessor that keep enough copies in flight.
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
        """Bytes of shared memory for one step of columns: values, metadata and x."""
        metadata = BLOCK_ROWS * BLOCK_COLUMNS // 32 * 4
        return (BLOCK_ROWS // 2 + self.tokens) * BLOCK_COLUMNS * 2 + metadata

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a block."""
        return _STAGES * self.stage_bytes + self.other_bytes

    def name(self, dtype: torch.dtype) -> str:
        """Return the name of the kernel function for a dtype."""
        return f"{self.family}_{self.tokens}_{str(dtype).removeprefix('torch.')}"


_STAGES = 4

# With more tokens, split-K writes and reads more partial sums, so fewer blocks are wanted.
MMA = tuple(
    Kernel("sparse_mma", tokens, 128, 0, blocks)
    for tokens, blocks in ((8, 2), (16, 2), (32, 1), (64, 1))
)
# Each stage has two barriers of 8 bytes beside its data.
WGMMA = tuple(Kernel("sparse_wgmma", tokens, 288, _STAGES * 2 * 8, 1) for tokens in (64, 128, 256))


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch configuration of a product.

    Attributes:
        kernel: the kernel to launch.
        row_blocks, token_blocks: number of tiles of y along rows of W and along tokens.
        splits: number of blocks that share a tile (split-K).
    """

    kernel: Kernel
    row_blocks: int
    token_blocks: int
    splits: int

    @property
    def tiles(self) -> int:
        """Number of tiles of y."""
        return self.row_blocks * self.token_blocks


@cache
def plan(
    rows: int, columns: int, tokens: int, capability: tuple[int, int], multiprocessors: int
) -> Plan:
    """Choose a kernel by the number of tokens, and the number of splits that occupies the GPU.

    Every product calls this. The result depends only on the arguments, so it is cached.

    Args:
        rows, columns: size of the padded weight.
        tokens: number of rows of x.
        capability: compute capability of the GPU.
        multiprocessors: number of multiprocessors of the GPU.
    """
    row_blocks, steps = rows // BLOCK_ROWS, columns // BLOCK_COLUMNS

    def of(kernel: Kernel, splits: int) -> Plan:
        return Plan(kernel, row_blocks, -(-tokens // kernel.tokens), splits)

    def most_splits(kernel: Kernel) -> int:
        """The most splits whose blocks all run at the same time."""
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
    """Estimate the clock cycles of a product by wgmma.

    Shared memory is the bottleneck: a step writes its stage and reads it, x once for every 64 rows
    of W.

    Args:
        plan: the launch configuration.
        steps: number of steps of columns, over all splits.
        multiprocessors: number of multiprocessors of the GPU.
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

    Products with one weight must not run on two streams at the same time, because they share the
    counters in `arrivals`.

    Attributes:
        values: [padded rows, padded columns / 2].
        metadata: int16[padded rows, padded columns / 16], in the order of `to_cutlass`.
        arrivals: int32[tiles], counts the blocks of each tile that are done; zeros whenever no
            product runs.
        rows, columns: size of the matrix without padding.
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
            weight: [rows, columns] with a dtype of `packed.DTYPES`, 2:4 along the columns.
            name: name of the weight, for the message of an error.

        Raises:
            InputError: the dtype is not one of `packed.DTYPES`.
            ModelError: the weight is not 2:4.
        """
        require_dtype(weight, name)
        rows, columns = weight.shape
        padding = (0, -columns % BLOCK_COLUMNS, 0, -rows % BLOCK_ROWS)
        values, metadata = to_cutlass(torch.nn.functional.pad(weight.detach(), padding), name)
        arrivals = torch.zeros(_SHARED_TILES_AT_MOST, dtype=torch.int32, device=weight.device)
        return cls(values, metadata, arrivals, rows, columns)


def linear(x: Tensor, weight: SparseMmaWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, summed in float32; the result is deterministic.

    A CUDA graph can capture a call after the first call for the same number of tokens.

    Args:
        x: [tokens, inputs] in the weight's dtype, on a GPU.
        weight: [outputs, inputs].
        bias: [outputs] in the weight's dtype.

    Returns:
        [tokens, outputs] in the weight's dtype.

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
    """Return x with contiguous rows that are aligned to 16 bytes; padded or copied only if need be.

    The kernels read rows in pieces of 16 bytes.
    """
    if missing := -x.shape[1] % _INPUTS_MULTIPLE:
        x = torch.nn.functional.pad(x, (0, missing))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _partial(x: Tensor, chosen: Plan) -> Tensor | None:
    """Allocate the workspace for the partial sums of split-K; None without splits."""
    if chosen.splits == 1:
        return None
    sums = chosen.kernel.tokens * BLOCK_ROWS
    return x.new_empty(chosen.tiles, chosen.splits, sums, dtype=torch.float32)
