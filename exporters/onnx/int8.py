"""int8 weights in an exported graph: ONNX Runtime's own weight-only quantisation.

before: MatMul(x, W) with W float32 [in, out]
after:  MatMulNBits(x, Q, S) with Q uint8[out, ceil(in / 32), 32] and S float32[out, ceil(in / 32)],
        W[i, o] = (Q[o, i // 32, i % 32] - 128) * S[o, i // 32]

The scales are symmetric, so a zero stays exactly zero and n:m patterns survive. MatMulNBits is an
operator of ONNX Runtime (com.microsoft), which TensorRT and OpenVINO do not read.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

BLOCK = 32
ZERO = 128

# accuracy_level of MatMulNBits: 4 rounds the activations to int8 too. With float32 activations the
# CPU kernel was slower than the one for float32 weights (benchmarks/LOG.md).
_INTEGER_KERNELS = 4


def quantise(path: Path, weights: set[str]) -> None:
    """Quantise the named weights of a written graph in place, still with float32 activations."""
    # It logs a line for every node, and sets up logging for the whole process where nothing has.
    logging.getLogger().addHandler(logging.NullHandler())
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    model = onnx.load(path)
    others = [node.name for node in model.graph.node if not weights.intersection(node.input)]
    quantiser = MatMulNBitsQuantizer(
        model, bits=8, block_size=BLOCK, is_symmetric=True, nodes_to_exclude=others
    )
    quantiser.process()
    data = path.with_name(f"{path.name}.data")
    data.unlink()
    # Small tensors stay in the graph: ONNX Runtime needs shapes there.
    onnx.save(quantiser.model.model, path, save_as_external_data=True, location=data.name)


def use_integer_kernels(path: Path) -> None:
    """Let the activations be rounded to int8 as well, which is what makes the graph fast."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", _INTEGER_KERNELS))
    onnx.save(model, path)


def read(
    initializers: Mapping[str, NDArray[np.generic]], weight: str, inputs: int
) -> NDArray[np.float32]:
    """float32[out, in]: what a quantised weight stands for.

    Args:
        initializers: of the graph.
        weight: its name before.
        inputs: its number of inputs; the last block may be longer.
    """
    quantised = initializers[f"{weight}_Q8"].astype(np.float32) - ZERO
    scales = initializers[f"{weight}_scales"].astype(np.float32)
    dense: NDArray[np.float32] = (quantised * scales[:, :, None]).reshape(len(quantised), -1)
    return dense[:, :inputs]
