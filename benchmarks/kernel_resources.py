"""Read the resources that our GPU kernels use from their machine code, without a GPU.

Usage: python -m benchmarks.kernel_resources [--architectures 80 90] [--dtype float16]

Compiles every configuration of the Triton kernels, for the smallest and the largest block of
tokens, and the kernels in CUDA C++ if nvcc is installed. Prints one line for each; the last line is
JSON. Bytes of stack are spilled registers. In the longest loop it counts instructions, barriers and
loads. For the Triton kernels it predicts the time of an H100 for a weight of 14336 x 4096: once
bound by memory alone, and once by issuing the loop's instructions alone. The larger of the two is a
lower bound. The disassembler and the reader of cubins come with Triton.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels import cuda_module, decode, prefill
from runtime.kernels.sparse_mma import MMA, WGMMA
from thanos_deploy.forecast import datasheets

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The smallest and the largest block of tokens with which each kernel is launched.
TOKENS = {
    decode: (1,),
    prefill: (prefill.LEAST_TOKENS_AT_ONCE, prefill.MOST_TOKENS_AT_ONCE),
}

# Predictions are for gate_proj and up_proj of Llama 3 8B, on an H100 with 132 multiprocessors that
# issue four instructions of 32 lanes per cycle, at the clock behind the datasheet's FP32 figure.
_OUTPUTS, _INPUTS = 14336, 4096
_LANES_PER_SECOND = 132 * 128 * 1.755e9
_BANDWIDTH = datasheets.find("H100").bandwidth

# Bytes of a packed group of four columns at 2:4, in 16 bits.
_BYTES_PER_GROUP = 4.5

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16"}


@dataclass(frozen=True, slots=True)
class Loop:
    """The longest loop of a kernel.

    Attributes:
        instructions: number of instructions in an iteration.
        barriers: number of barriers in an iteration; all threads of the block wait there.
        loads: maps a kind of load from memory to its number: LDG loads to registers, LDGSTS
            (cp.async) to shared memory; .128 means 16 bytes.
        per_group: instructions of a thread per group of four columns of one row of the weight, for
            all tokens of the block; None if the sizes of the block are not known.
    """

    instructions: int
    barriers: int
    loads: dict[str, int]
    per_group: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """Lower bounds on the time of one product, from two resources that every kernel needs.

    Attributes:
        memory_seconds: time to read the packed weight, at the bandwidth of the datasheet.
        issue_seconds: time to issue the loop's instructions.
    """

    memory_seconds: float
    issue_seconds: float


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources that a compiled kernel uses.

    Attributes:
        kernel: name of the kernel and the sizes that it was compiled for.
        architecture: compute capability, 80 for 8.0.
        registers: registers per thread.
        stack_bytes: stack per thread, which holds spilled registers.
        shared_bytes: shared memory per block.
        tensor_instructions: kinds of tensor-core instructions in the machine code.
        loop: the longest loop.
        prediction: prediction for an H100; None if the work of the loop is not known.
    """

    kernel: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_instructions: tuple[str, ...]
    loop: Loop
    prediction: Prediction | None


def main() -> None:
    """Compile the kernels and print their resources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", choices=_POINTERS, default="float16")
    arguments = parser.parse_args()
    found = []
    print("arch  registers  stack B  shared B  loop  barriers  per group  memory us  issue us")
    for architecture in arguments.architectures:
        for each in resources(architecture, arguments.dtype):
            found.append(each)
            print(line(each))
    print(json.dumps([asdict(each) for each in found]))


def line(found: Resources) -> str:
    """Return the line to print for a kernel."""
    loop, predicted = found.loop, found.prediction
    times = (
        "        -          -         -"
        if predicted is None
        else f"{loop.per_group:9.1f}  {predicted.memory_seconds * 1e6:9.1f}  "
        f"{predicted.issue_seconds * 1e6:8.1f}"
    )
    words = [f"{count} {name}" for name, count in loop.loads.items()]
    return (
        f"sm_{found.architecture}  {found.registers:8d}  {found.stack_bytes:7d}  "
        f"{found.shared_bytes:8d}  {loop.instructions:4d}  {loop.barriers:8d}  {times}  "
        f"{found.kernel}  {', '.join([*words, *found.tensor_instructions])}"
    )


def resources(architecture: int, dtype: str) -> Iterator[Resources]:
    """Compile every kernel for an architecture."""
    for module, blocks in TOKENS.items():
        name = module.__name__.rpartition(".")[2]
        for block_m in blocks:
            for config in module.CONFIGS:
                compiled = compile_triton(module.kernel, config, block_m, architecture, dtype)
                sizes = {"BLOCK_M": block_m, **config.kwargs, "warps": config.num_warps}
                yield inspect(
                    " ".join([name, *(f"{key}={size}" for key, size in sizes.items())]),
                    architecture,
                    compiled.asm["cubin"],
                    compiled.metadata.shared,
                    groups_per_thread(config),
                )
    if shutil.which("nvcc"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "cubin"
            for kernels in (MMA, WGMMA) if architecture == 90 else (MMA,):
                largest = kernels[-1]
                compile_cuda(cubin, largest.source, cuda_module.target(divmod(architecture, 10)))
                code = cubin.read_bytes()
                yield inspect(largest.family, architecture, code, largest.shared_bytes)


def groups_per_thread(config: triton.Config) -> float:
    """Return the groups of four columns of a row that a thread processes in one iteration."""
    sizes = config.kwargs
    words = sizes["BLOCK_U"] if "BLOCK_U" in sizes else 2 * sizes["BLOCK_P"]
    groups: float = 2 * words * sizes.get("BLOCK_N", decode.ROWS) / (32 * config.num_warps)
    return groups


def compile_triton(
    kernel: Any, config: triton.Config, block_m: int, architecture: int, dtype: str
) -> Any:
    """Compile a Triton kernel for sizes that are multiples of 16, as those of real models are."""
    names = kernel.fn.arg_names
    constants = {"HAS_BIAS": True, **config.kwargs}
    if "BLOCK_M" in names:
        constants["BLOCK_M"] = block_m
    pointer = _POINTERS[dtype]
    types = {
        "x": "*i64" if "groups" in names else pointer,
        "words": "*i64",
        "mask": "*u8",
        "bias": pointer,
        "y": pointer,
    }
    source = ASTSource(
        kernel.fn,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in constants and name != "tokens"
        },
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )


def compile_cuda(cubin: Path, source: str, architecture: str) -> None:
    """Compile a source file in CUDA C++ with nvcc, for an architecture such as sm_80."""
    options = ["-cubin", f"-arch={architecture}", "-std=c++17", "-Werror", "all-warnings"]
    subprocess.run(
        ["nvcc", *options, "-o", str(cubin), str(cuda_module.FOLDER / source)], check=True
    )


def inspect(
    kernel: str, architecture: int, cubin: bytes, dynamic_shared: int, groups: float | None = None
) -> Resources:
    """Read the resources from a cubin; if it has several kernels, the maximum over them.

    Args:
        kernel, architecture: see `Resources`.
        cubin: machine code.
        dynamic_shared: bytes of shared memory that the launch adds.
        groups: see `groups_per_thread`; None if it is not known.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = [
            dict(part.split(":") for part in line.split() if ":" in part)
            for line in _run("cuobjdump", "--dump-resource-usage", file.name).splitlines()
            if "REG:" in line
        ]
    code = disassemble(cubin)
    words = {word.rstrip(",;") for word in code.split()}
    loop = longest_loop(code, groups)
    prediction = None
    if loop.per_group is not None:
        all_groups = _OUTPUTS * _INPUTS / 4
        prediction = Prediction(
            all_groups * _BYTES_PER_GROUP / _BANDWIDTH,
            all_groups * loop.per_group / _LANES_PER_SECOND,
        )
    return Resources(
        kernel=kernel,
        architecture=architecture,
        registers=max(int(each["REG"]) for each in usage),
        stack_bytes=max(int(each["STACK"]) for each in usage),
        shared_bytes=dynamic_shared + max(int(each["SHARED"]) for each in usage),
        tensor_instructions=tuple(sorted(w for w in words if w.startswith(("HMMA", "HGMMA")))),
        loop=loop,
        prediction=prediction,
    )


def disassemble(cubin: bytes) -> str:
    """Disassemble all kernels in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run("nvdisasm", "-c", file.name)


def longest_loop(code: str, groups: float | None) -> Loop:
    """Find the longest loop in disassembled code: from a label to a branch back to it."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    longest: Sequence[str] = ()
    for text in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", text):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)(.*);", text):
            operations.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2])
            if found[1].startswith("BRA") and target and target[0] in labels:
                loop = operations[labels[target[0]] :]
                # The branch to itself after the end of a kernel has length 1.
                longest = max(longest, loop, key=len)
    loads = Counter(each for each in longest if each.startswith("LDG") and each != "LDGDEPBAR")
    return Loop(
        len(longest),
        sum(each.startswith("BAR") for each in longest),
        dict(sorted(loads.items())),
        None if groups is None else len(longest) / groups,
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [_TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    main()
