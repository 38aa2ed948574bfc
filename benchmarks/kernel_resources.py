"""What our kernels take of a GPU's registers and shared memory, compiled here without a GPU.

Usage: python -m benchmarks.kernel_resources [--architectures 80 90] [--dtype float16]

Compiles every configuration of the Triton kernels, for the largest block of tokens, and the kernels
in CUDA C++ where nvcc is there, and prints a line each; the last line is JSON. Bytes of stack are
what was spilled. The disassembler and the reader of cubins come with Triton.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels import cuda_module, decode, prefill
from runtime.kernels.sparse_mma import MMA, WGMMA

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The largest block of tokens that each is launched with.
_TOKENS = {decode: decode.MOST_TOKENS, prefill: prefill.MOST_TOKENS_AT_ONCE}

_POINTERS = {"float16": "*fp16", "bfloat16": "*bf16"}


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        kernel: its name and what it was compiled with.
        architecture: compute capability, 80 for 8.0.
        registers: of a thread.
        stack_bytes: of a thread; spilled registers are there.
        shared_bytes: of a block.
        tensor_instructions: kinds of tensor-core instructions in the machine code.
    """

    kernel: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_instructions: tuple[str, ...]


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", choices=_POINTERS, default="float16")
    arguments = parser.parse_args()
    found = []
    print("arch  registers  stack B  shared B  kernel")
    for architecture in arguments.architectures:
        for each in resources(architecture, arguments.dtype):
            found.append(each)
            print(
                f"sm_{each.architecture}  {each.registers:8d}  {each.stack_bytes:7d}  "
                f"{each.shared_bytes:8d}  {each.kernel}  {' '.join(each.tensor_instructions)}"
            )
    print(json.dumps([asdict(each) for each in found]))


def resources(architecture: int, dtype: str) -> Iterator[Resources]:
    """Compile every kernel for an architecture."""
    for module, block_m in _TOKENS.items():
        name = module.__name__.rpartition(".")[2]
        for config in module.kernel.configs:
            compiled = compile_triton(module.kernel, config, block_m, architecture, dtype)
            sizes = {"BLOCK_M": block_m, **config.kwargs, "warps": config.num_warps}
            yield inspect(
                " ".join([name, *(f"{key}={size}" for key, size in sizes.items())]),
                architecture,
                compiled.asm["cubin"],
                compiled.metadata.shared,
            )
    if shutil.which("nvcc"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "cubin"
            for kernels in (MMA, WGMMA) if architecture == 90 else (MMA,):
                largest = kernels[-1]
                compile_cuda(cubin, largest.source, cuda_module.target(divmod(architecture, 10)))
                code = cubin.read_bytes()
                yield inspect(largest.family, architecture, code, largest.shared_bytes)


def compile_triton(
    kernel: Any, config: triton.Config, block_m: int, architecture: int, dtype: str
) -> Any:
    """Compile a Triton kernel for sizes that are multiples of 16, as real models have them."""
    constants = {"HAS_BIAS": True, "BLOCK_M": block_m, **config.kwargs}
    pointer = _POINTERS[dtype]
    types = {"x": pointer, "words": "*i64", "mask": "*u8", "bias": pointer, "y": pointer}
    names = kernel.fn.arg_names
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


def inspect(kernel: str, architecture: int, cubin: bytes, dynamic_shared: int) -> Resources:
    """Read a cubin; of several kernels in it, the most that any of them takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = [
            dict(part.split(":") for part in line.split() if ":" in part)
            for line in _run("cuobjdump", "--dump-resource-usage", file.name).splitlines()
            if "REG:" in line
        ]
    words = instructions_of(cubin)
    return Resources(
        kernel=kernel,
        architecture=architecture,
        registers=max(int(each["REG"]) for each in usage),
        stack_bytes=max(int(each["STACK"]) for each in usage),
        shared_bytes=dynamic_shared + max(int(each["SHARED"]) for each in usage),
        tensor_instructions=tuple(sorted(w for w in words if w.startswith(("HMMA", "HGMMA")))),
    )


def instructions_of(cubin: bytes) -> set[str]:
    """Every word of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return {word.rstrip(",;") for word in _run("nvdisasm", file.name).split()}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [_TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    main()
