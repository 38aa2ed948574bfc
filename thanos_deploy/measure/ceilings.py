"""The performance ceiling of a graph on this machine: a roofline for every engine that runs it.

Bytes and operations are counted in the graph; bandwidth and peak arithmetic are measured. A step
has to read every weight and the KV cache of earlier tokens, to write the KV cache of its own
tokens, and to multiply. It takes at least as long as the slower of memory traffic and arithmetic
(Williams, Waterman and Patterson, "Roofline", 2009). Everything else that an engine does is left
out, so the time is a lower bound: activations, normalisations and the softmax. Reads that processor
caches save are not counted either. Two simplifications are not in the engine's favour: a sliding
window counts as the whole sequence, and so does the part of a KV cache outside it.
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

# Rows and columns of the square matrices that are multiplied to measure the peak: large enough to
# fill the device, small enough to take less than a second.
_MATRIX = {"cpu": 2048, "cuda": 8192}

# Number of the input of GroupQueryAttention that is [batch, key-value heads, past tokens, dim].
_PAST_KEY = 3

# Calls in one CUDA graph, so that its launch is a small part of the measured time.
_CALLS = 4

# Kind of arithmetic -> dtype of the matrices, and argument of `precision.products_in`. On a GPU,
# bfloat16 as the argument means that float32 factors are rounded to TF32.
_KINDS = {
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float32),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """The measured memory bandwidth and peak arithmetic of this machine.

    Attributes:
        memory_bandwidth_bytes_per_second: bandwidth of reading as much memory as the graph has
            weights, so that caches help here as much as they help the engine.
        gemm_flops_per_second: speed of a matrix product, by kind of arithmetic ("fp32", "tf32",
            "fp16").
    """

    memory_bandwidth_bytes_per_second: float
    gemm_flops_per_second: dict[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a graph, by the quantity that it grows with.

    Attributes:
        weight_bytes: bytes of weights that every step reads.
        cache_bytes_per_token: bytes of KV cache for each token of each sequence.
        flops_per_token: operations of the layers with weights, for each token.
        flops_per_sequence: operations of the output head for each sequence, if the graph computes
            logits for the last token only; otherwise 0, and `flops_per_token` includes the head.
        flops_per_pair: operations of attention, for each pair of a new token and a token that it
            attends to: itself, or an earlier token of its sequence.
    """

    weight_bytes: int
    cache_bytes_per_token: int
    flops_per_token: int
    flops_per_pair: int
    flops_per_sequence: int = 0

    def step(self, *, batch: int, tokens: int, past: int) -> tuple[int, int]:
        """Bytes moved and floating-point operations of one step.

        Args:
            batch: number of sequences.
            tokens: new tokens of each sequence.
            past: tokens of each sequence in the KV cache.
        """
        moved = self.weight_bytes + batch * (past + tokens) * self.cache_bytes_per_token
        # Plain products compute the masked pairs too, but an engine can leave them out.
        pairs = tokens * past + tokens * (tokens + 1) // 2
        flops = tokens * self.flops_per_token + pairs * self.flops_per_pair
        return moved, batch * (flops + self.flops_per_sequence)


def computed_in(dtype: str, *, provider: str) -> str:
    """Return the kind of arithmetic that ONNX Runtime uses for matrix products.

    On a CPU it is float32, whatever the dtype of the weights. On a GPU, graphs other than fp16 are
    multiplied in TF32, ONNX Runtime's default there (`use_tf32`).

    Args:
        dtype: dtype of the graph: "fp32", "fp16" or "int8".
        provider: "cpu", or the name of a provider that runs on a GPU.

    Returns:
        a key of `Machine.gemm_flops_per_second`.
    """
    if provider == "cpu":
        return "fp32"
    return "fp16" if dtype == "fp16" else "tf32"


def ceiling(work: Work, scenario: Scenario, machine: Machine, arithmetic: str) -> Ceiling | None:
    """The ceiling of the headline time of a scenario; None for an open loop, which also waits.

    Args:
        work: work of the graph.
        scenario: the scenario. The ceiling of decode is that of its middle step, and the ceiling
            of generate is that of all its steps.
        machine: bandwidth and peak arithmetic of this machine.
        arithmetic: kind of arithmetic of the graph, a key of `machine.gemm_flops_per_second`.
    """
    match scenario:
        case Prefill():
            steps = [(scenario.prompt, 0)]
        case Decode():
            steps = [(1, scenario.past + scenario.new_tokens // 2)]
        case Generate():
            # No step reads the last new token.
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
    """Count the work of a graph that `exporters.onnx` has written; weights are not read.

    Args:
        path: the ONNX file.
        cache_bytes_per_token: bytes of KV cache for each token of a sequence, as in export.json.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    # The weight of the output head may be a transpose of the embedding.
    source = {name: name for name in weights}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            source[node.output[0]] = node.input[0]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input)
    }
    reader = {name: node for node in graph.node for name in node.input}
    read: set[str] = set()
    flops: dict[str, int] = {}  # for one token, of each layer with weights, by name of its output
    flops_per_pair = 0
    for node in graph.node:
        # These read single rows only: of an embedding, and of the tables of rotary embeddings.
        if node.op_type not in ("Gather", "GroupQueryAttention"):
            read.update(source[name] for name in node.input if name in source)
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        match node.op_type:
            case "MatMulNBits":
                flops[node.output[0]] = 2 * sizes["K"] * sizes["N"]
            case "GroupQueryAttention":
                dim = shapes[node.input[_PAST_KEY]][-1]
                flops_per_pair += 2 * 2 * sizes["num_heads"] * int(dim)
            case "MatMul" | "Gemm" if node.input[1] in source:
                flops[node.output[0]] = 2 * math.prod(weights[source[node.input[1]]].dims)
            # Attention is two products of equal work: the scores, and the weighted sum of values.
            # Only the second one's result has the shape [batch, heads, sequence, dim], which is
            # always in the file, so it counts for both. Query heads that share a value head are
            # stacked for the product; then the Reshape behind it has that shape.
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
    """Whether the graph computes logits for the last token only."""
    (logits,) = (value for value in graph.output if value.name == "logits")
    return bool(logits.type.tensor_type.shape.dim[1].dim_value == 1)


def _head(graph: onnx.GraphProto, products: Collection[str]) -> str:
    """The name of the output head's product; some models cap it before it becomes the logits."""
    maker = {name: node for node in graph.node for name in node.output}
    name = "logits"
    while name not in products:
        name = next(one for one in maker[name].input if one in maker)
    return name


def measure(weight_bytes: int, *, provider: str, threads: int) -> Machine | None:
    """Measure bandwidth and peak arithmetic; None for a GPU that PyTorch cannot use.

    Args:
        weight_bytes: bytes of memory to read for the bandwidth.
        provider: "cpu" or "cuda".
        threads: number of threads on a CPU.
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
    """Bytes per second of the fastest of several products of a matrix with a vector.

    Args:
        size: bytes of the matrix.
        device: "cpu" or "cuda".
    """
    columns = _MATRIX["cpu"]
    matrix = _random(max(1, size // (4 * columns)), columns, device=device)
    vector = _random(columns, 1, device=device)
    return 4 * matrix.numel() / _fastest(lambda: matrix @ vector, device)


def _gemm(kind: str, device: str) -> float:
    """Operations per second of the fastest of several products of random square matrices.

    They are random because a GPU draws less power and clocks higher on numbers that are all equal.
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
    """Seconds of the fastest of several calls, after a warm-up call."""
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
