"""The limit of every engine: bytes and operations counted in the graph, at this machine's speed.

A step has to read every weight and the kv cache of what came before, to write the kv cache of its
own tokens, and to multiply. It takes at least as long as the slower of the two: the roofline of
Williams, Waterman and Patterson (2009). Everything else that an engine does is left out, so the
ceiling is one: activations, normalisations, the softmax, and what caches of the processor save.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from runtime.kernels import timing
from thanos_deploy.machine.precision import products_in
from thanos_deploy.measure.latency import Decode, Generate, OpenLoop, Prefill, Scenario
from thanos_deploy.measure.run import Ceiling

_REPEATS = 8

# Rows and columns of the square matrices that are multiplied for the peak: enough to fill the
# machine, and no longer than a second on it.
_MATRIX = {"cpu": 2048, "cuda": 8192}

# Calls in one CUDA graph, so that starting it is a small part of what is timed.
_CALLS = 4

# Kind of arithmetic -> dtype of the matrices, and that of `precision.products_in`, which on a GPU
# rounds float32 factors to TF32 where it is bfloat16.
_KINDS = {
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float32),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """The bandwidth and the matrix speed of this machine, measured.

    Attributes:
        memory_bandwidth_bytes_per_second: reading as much memory as the graph has weights, so that
            caches help as much as they help the engine.
        gemm_flops_per_second: by kind of arithmetic ("fp32", "tf32", "fp16"), of a matrix product.
    """

    memory_bandwidth_bytes_per_second: float
    gemm_flops_per_second: dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """What a graph has to do, by where it grows.

    Attributes:
        weight_bytes: read in every step.
        cache_bytes_per_token: of the kv cache of one sequence.
        flops_per_token: of all layers with weights that see every token.
        flops_per_sequence: of the output head, where the graph has it for the last token only.
        flops_per_pair: of attention, for every pair of a token and one that it may look at.
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
        flops += batch * self.flops_per_sequence
        return moved, flops


def computed_in(dtype: str, *, provider: str) -> str:
    """In which kind of arithmetic ONNX Runtime multiplies.

    A CPU computes in float32, whatever the weights are held in. On a GPU what is not fp16 is
    multiplied in TF32, ONNX Runtime's default there (`use_tf32`).

    Args:
        dtype: of the graph: "fp32", "fp16" or "int8".
        provider: "cpu", or one that runs on a GPU.
    """
    if provider == "cpu":
        return "fp32"
    return "fp16" if dtype == "fp16" else "tf32"


def ceiling(work: Work, scenario: Scenario, machine: Machine, arithmetic: str) -> Ceiling | None:
    """The ceiling of what a scenario times; None where waiting is part of it.

    Args:
        work: of the graph.
        scenario: decode is taken in the middle of its steps; generate as a whole.
        machine: what this machine can do.
        arithmetic: that the graph computes in, a key of the machine's peaks.
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
            "compute": step_flops / machine.gemm_flops_per_second[arithmetic],
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
    flops: dict[str, int] = {}  # of the layers with weights, by their output
    flops_per_pair = 0
    for node in graph.node:
        if node.op_type != "Gather":  # which reads single rows
            read.update(source[name] for name in node.input if name in source)
        match node.op_type:
            case "MatMulNBits":
                sizes = {attribute.name: attribute.i for attribute in node.attribute}
                flops[node.output[0]] = 2 * sizes["K"] * sizes["N"]
            case "MatMul" | "Gemm" if node.input[1] in source:
                flops[node.output[0]] = 2 * math.prod(weights[source[node.input[1]]].dims)
            # Attention is two products of equal work, scores and mix; the shape of what is mixed,
            # [batch, heads, sequence, dim], is always in the file. Queries that share a value are
            # stacked for the product, and that is their shape when they are apart again.
            case "MatMul":
                after = reader[node.output[0]]
                mixed = after.output[0] if after.op_type == "Reshape" else node.output[0]
                match shapes.get(mixed):
                    case [_, int(heads), _, int(dim)]:
                        flops_per_pair += 2 * 2 * heads * dim
    flops_per_sequence = flops.pop(_head(graph, flops)) if _is_of_last(graph) else 0
    return Work(
        weight_bytes=sum(_bytes(weights[name]) for name in read),
        cache_bytes_per_token=cache_bytes_per_token,
        flops_per_token=sum(flops.values()),
        flops_per_pair=flops_per_pair,
        flops_per_sequence=flops_per_sequence,
    )


def _is_of_last(graph: onnx.GraphProto) -> bool:
    """Whether there are logits after the last token only."""
    (logits,) = (value for value in graph.output if value.name == "logits")
    return bool(logits.type.tensor_type.shape.dim[1].dim_value == 1)


def _head(graph: onnx.GraphProto, products: Collection[str]) -> str:
    """The output of the product that the logits are made of, which some models then cap."""
    maker = {name: node for node in graph.node for name in node.output}
    name = "logits"
    while name not in products:
        name = next(one for one in maker[name].input if one in maker)
    return name


def measure(weight_bytes: int, *, provider: str, threads: int) -> Machine | None:
    """What this machine can do at best; None for a GPU that PyTorch cannot use.

    Args:
        weight_bytes: how much memory to read.
        provider: "cpu" or "cuda".
        threads: how many of them work, on a CPU.
    """
    if provider == "cuda" and not torch.cuda.is_available():
        return None
    kinds = ["fp32"] if provider == "cpu" else list(_KINDS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return Machine(
            _bandwidth(weight_bytes, provider), {kind: _gemm(kind, provider) for kind in kinds}
        )
    finally:
        torch.set_num_threads(before)
        if provider == "cuda":
            torch.cuda.empty_cache()


def _bandwidth(size: int, device: str) -> float:
    """Bytes per second: the best of several products of a matrix of that size with a vector."""
    columns = _MATRIX["cpu"]
    matrix = _random(max(1, size // (4 * columns)), columns, device=device)
    vector = _random(columns, 1, device=device)
    return 4 * matrix.numel() / _fastest(lambda: matrix @ vector, device)


def _gemm(kind: str, device: str) -> float:
    """Operations per second of the best of several products of random square matrices.

    Random, because a GPU draws less power and clocks higher on numbers that are all the same.
    """
    dtype, rounded_to = _KINDS[kind]
    size = _MATRIX[device]
    left, right = (_random(size, size, device=device).to(dtype) for _ in range(2))
    with products_in(rounded_to):
        return 2 * size**3 / _fastest(lambda: left @ right, device)


def _random(rows: int, columns: int, *, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, device=device, generator=generator)


def _fastest(call: Callable[[], Tensor], device: str) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    call()
    if device == "cuda":
        return min(timing.replayed([call] * _CALLS, samples=_REPEATS, warmup=1))

    def seconds() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return min(seconds() for _ in range(_REPEATS))


def _bytes(tensor: onnx.TensorProto) -> int:
    dtype: np.dtype[np.generic] = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return dtype.itemsize * math.prod(map(int, tensor.dims))
