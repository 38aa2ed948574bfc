"""What no engine can beat: bytes and operations counted in the graph, at this machine's own speed.

A step has to read every weight and the kv cache of what came before, to write the kv cache of its
own tokens, and to multiply. It takes at least as long as the slower of the two: the roofline of
Williams, Waterman and Patterson (2009). Everything else that an engine does is left out, so the
ceiling is one: activations, normalisations, the softmax, and what caches of the processor save.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from runtime.latency import Decode, Generate, OpenLoop, Prefill, Scenario

_REPEATS = 8

# Rows and columns of the square matrices that are multiplied for the peak.
_MATRIX = 2048

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine can do at best, measured.

    Attributes:
        memory_bandwidth_bytes_per_second: reading as much memory as the graph has weights, so that
            caches help as much as they help the engine.
        gemm_flops_per_second: by name of the dtype, of a matrix product.
    """

    memory_bandwidth_bytes_per_second: float
    gemm_flops_per_second: dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """What a graph has to do, by where it grows.

    Attributes:
        weight_bytes: read in every step.
        cache_bytes_per_token: of the kv cache of one sequence.
        flops_per_token: of all layers with weights.
        flops_per_pair: of attention, for every pair of a token and one that it may look at.
        flops_per_sequence: of an output head that reads the last token only.
    """

    weight_bytes: int
    cache_bytes_per_token: int
    flops_per_token: int
    flops_per_pair: int
    flops_per_sequence: int = 0

    def step(self, *, batch: int, tokens: int, past: int) -> tuple[int, int]:
        """Bytes and floating point operations of one step.

        Args:
            batch: sequences.
            tokens: new ones of each sequence.
            past: those before.
        """
        moved = self.weight_bytes + batch * (past + tokens) * self.cache_bytes_per_token
        flops = batch * tokens * (self.flops_per_token + (past + tokens) * self.flops_per_pair)
        return moved, flops + batch * self.flops_per_sequence


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The least that a scenario can take.

    Attributes:
        bytes: moved to and from memory.
        flops: floating point operations.
        seconds: at this machine's best.
        bound: "memory" or "compute", whichever most of the time goes to.
    """

    bytes: int
    flops: int
    seconds: float
    bound: str


def ceiling(work: Work, scenario: Scenario, machine: Machine, dtype: str) -> Ceiling | None:
    """The ceiling of what a scenario times; None where waiting is part of it.

    Args:
        work: of the graph.
        scenario: decode is taken in the middle of its steps; generate as a whole.
        machine: what this machine can do.
        dtype: that the graph computes in, a key of the machine's peaks.
    """
    match scenario:
        case Prefill():
            steps = [(scenario.prompt, 0)]
        case Decode():
            steps = [(1, scenario.past + scenario.new_tokens // 2)]
        case Generate():
            # The last token is not read any more.
            last = scenario.prompt + scenario.new_tokens - 1
            steps = [(scenario.prompt, 0), *((1, past) for past in range(scenario.prompt, last))]
        case OpenLoop():
            return None
    moved, flops = 0, 0
    seconds = {"memory": 0.0, "compute": 0.0}
    for tokens, past in steps:
        step_bytes, step_flops = work.step(batch=scenario.batch, tokens=tokens, past=past)
        moved, flops = moved + step_bytes, flops + step_flops
        times = {
            "memory": step_bytes / machine.memory_bandwidth_bytes_per_second,
            "compute": step_flops / machine.gemm_flops_per_second[dtype],
        }
        bound = max(times, key=times.__getitem__)
        seconds[bound] += times[bound]
    return Ceiling(moved, flops, sum(seconds.values()), max(seconds, key=seconds.__getitem__))


def count(path: Path, *, cache_bytes_per_token: int) -> Work:
    """Count what a graph of `exporters.onnx` has to do; its weights are not read.

    Args:
        path: the model.
        cache_bytes_per_token: as export.json has it.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    # The output head may be a transpose of the embedding.
    source = {name: name for name in weights}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            source[node.output[0]] = node.input[0]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    reader = {name: node for node in graph.node for name in node.input}
    read: set[str] = set()
    flops_per_token = flops_per_pair = head = 0
    for node in graph.node:
        if node.op_type != "Gather":  # which reads single rows
            read.update(source[name] for name in node.input if name in source)
        match node.op_type:
            case "MatMulNBits":
                sizes = {attribute.name: attribute.i for attribute in node.attribute}
                flops_per_token += 2 * sizes["K"] * sizes["N"]
            case "MatMul" | "Gemm" if node.input[1] in source:
                head = 2 * math.prod(weights[source[node.input[1]]].dims)  # the last one is it
                flops_per_token += head
            # Attention is two products of equal work, scores and mix; the shape of what is mixed,
            # [batch, heads, sequence, dim], is always in the file. Queries that share a value are
            # stacked for the product, and that is their shape when they are apart again.
            case "MatMul":
                after = reader[node.output[0]]
                mixed = after.output[0] if after.op_type == "Reshape" else node.output[0]
                match shapes.get(mixed):
                    case [_, int(heads), _, int(dim)]:
                        flops_per_pair += 2 * 2 * heads * dim
    sequence = graph.output[0].type.tensor_type.shape.dim[1]
    once = head if sequence.dim_value == 1 else 0
    return Work(
        weight_bytes=sum(_bytes(weights[name]) for name in read),
        cache_bytes_per_token=cache_bytes_per_token,
        flops_per_token=flops_per_token - once,
        flops_per_pair=flops_per_pair,
        flops_per_sequence=once,
    )


def measure(weight_bytes: int, *, provider: str, threads: int) -> Machine | None:
    """What this machine can do at best; None for a GPU that PyTorch cannot use.

    Args:
        weight_bytes: how much memory to read.
        provider: "cpu" or "cuda".
        threads: how many of them work, on a CPU.
    """
    if provider == "cuda" and not torch.cuda.is_available():
        return None
    # On a CPU every graph computes in float32.
    dtypes = ["fp32"] if provider == "cpu" else list(_DTYPES)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Machine(
            _bandwidth(weight_bytes, provider),
            {name: _gemm(_DTYPES[name], provider) for name in dtypes},
        )
    finally:
        torch.set_num_threads(before)


def _bandwidth(size: int, device: str) -> float:
    """Bytes per second: the best of several products of a matrix of that size with a vector."""
    columns = _MATRIX
    matrix = torch.ones(max(1, size // (4 * columns)), columns, device=device)
    vector = torch.ones(columns, device=device)
    return 4 * matrix.numel() / _fastest(lambda: matrix @ vector)


def _gemm(dtype: torch.dtype, device: str) -> float:
    """Floating point operations per second of the best of several products of square matrices."""
    matrix = torch.ones(_MATRIX, _MATRIX, dtype=dtype, device=device)
    return 2 * _MATRIX**3 / _fastest(lambda: matrix @ matrix)


def _fastest(call: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""

    def seconds() -> float:
        started = time.perf_counter()
        # The last element is there only when all are.
        call().flatten()[-1].item()
        return time.perf_counter() - started

    seconds()
    return min(seconds() for _ in range(_REPEATS))


def _bytes(tensor: onnx.TensorProto) -> int:
    dtype: np.dtype[np.generic] = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return dtype.itemsize * math.prod(map(int, tensor.dims))
