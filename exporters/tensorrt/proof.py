"""Find which layers of an engine run on sparse tensor cores, and why the others do not.

A layer runs sparse if three conditions hold, each with its own evidence:

1. Its weights hold 2:4 in the very file that the engine was built from. Evidence: the file itself.
2. TensorRT considers it eligible. Evidence: the builder's log.
3. TensorRT chose a sparse kernel. Evidence: the kernel names of the finished engine, or the log.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.tensorrt.log import EngineLayer, SparsityLines, Timing
from thanos_deploy.bundle.engine_record import Choice, LayerProof

GROUP, KEPT = 4, 2

# Sparse tensor cores multiply at least 16 inputs at a time, for outputs in steps of 8 (PTX ISA,
# mma.sp). TensorRT has no sparse kernels for other multiples.
INPUT_MULTIPLE, OUTPUT_MULTIPLE = 16, 8

# According to TensorRT's maintainers, sparse kernels start to win at about this size
# (NVIDIA/TensorRT issue 3849). Below it a dense kernel is likely, but a sparse one is possible.
SMALL = 256


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a linear layer in the graph.

    Attributes:
        name: name of the layer in the model, and of its node in the graph.
        outputs, inputs: number of output and input features.
        dtype: numpy's name of the dtype that it is stored in.
        groups: number of aligned groups of four inputs, over all outputs.
        dense_groups: number of these groups with more than two nonzeros.
    """

    name: str
    outputs: int
    inputs: int
    dtype: str
    groups: int
    dense_groups: int

    @property
    def holds(self) -> bool:
        """Whether every aligned group of four inputs has at least two zeros."""
        return self.inputs % GROUP == 0 and self.dense_groups == 0


def weight(name: str, values: NDArray[np.generic]) -> Weight:
    """Count the 2:4 groups of a weight.

    Args:
        name: name of its layer.
        values: [outputs, inputs].
    """
    outputs, inputs = values.shape
    whole = inputs - inputs % GROUP
    kept = (values[:, :whole] != 0).reshape(outputs, -1, GROUP).sum(axis=2)
    return Weight(
        name=name,
        outputs=outputs,
        inputs=inputs,
        dtype=str(values.dtype),
        groups=kept.size,
        dense_groups=int((kept > KEPT).sum()),
    )


def prove(
    weights: Sequence[Weight],
    lines: SparsityLines,
    timings: Mapping[str, Timing],
    layers: Sequence[EngineLayer],
    *,
    sparse_allowed: bool,
    kernels_known: bool,
) -> list[LayerProof]:
    """Decide for every linear layer whether a sparse kernel runs it.

    Args:
        weights: the weights of the layers in the graph.
        lines, timings, layers: TensorRT's reports; see `log`.
        sparse_allowed: whether the builder was allowed to use sparse kernels.
        kernels_known: whether kernels were chosen at build time, not when the engine is loaded.
    """
    hosts: dict[str, EngineLayer] = {}
    # The engine may hold a layer once for each profile; a sparse kernel in one is enough.
    for layer in sorted(layers, key=lambda layer: not layer.sparse):
        for node in layer.nodes:
            hosts.setdefault(node, layer)
    # Several weights can be one layer of the engine, and the log counts those.
    candidates = {
        hosts[entry.name].name if entry.name in hosts else entry.name
        for entry in weights
        if entry.holds and not _unfit(entry)
    }
    proofs = []
    for entry in weights:
        host = hosts.get(entry.name)
        verdict, reason = _judge(
            entry,
            lines,
            timings.get(entry.name),
            host,
            candidates=len(candidates),
            sparse_allowed=sparse_allowed,
            kernels_known=kernels_known,
        )
        proofs.append(
            LayerProof(
                name=entry.name,
                shape=(entry.outputs, entry.inputs),
                pattern_holds=entry.holds,
                verdict=verdict,
                reason=reason,
                engine_layer=f"{host.name} ({host.kind})" if host else "",
            )
        )
    return proofs


def _judge(
    entry: Weight,
    lines: SparsityLines,
    timing: Timing | None,
    host: EngineLayer | None,
    *,
    candidates: int,
    sparse_allowed: bool,
    kernels_known: bool,
) -> tuple[Choice, str]:
    if entry.inputs % GROUP:
        return "not eligible", f"{entry.inputs} inputs do not divide into groups of {GROUP}"
    if entry.dense_groups:
        return "not eligible", (
            f"{entry.dense_groups} of {entry.groups} groups of {GROUP} inputs keep more than {KEPT}"
        )
    if host is not None and host.sparse:
        return "picked", f"kernel {host.kernel}"
    if entry.name in lines.chosen:
        return "picked", "named in the builder's log"
    if unfit := _unfit(entry):
        return "not eligible", unfit
    if not sparse_allowed:
        return "not reported", "the engine was built without allowing sparse weights"
    if not kernels_known:
        return "not reported", "kernels are chosen when the engine is loaded on its GPU"
    only_counted = 0 if lines.eligible else lines.eligible_count or 0
    if entry.name in lines.eligible or only_counted >= candidates:
        return "eligible", _slower(entry, timing)
    if only_counted:
        return "not reported", (
            f"TensorRT's log counts {only_counted} eligible layers without names, and {candidates} "
            "hold the pattern"
        )
    return "not reported", "TensorRT's log does not mention it, neither as eligible nor as sparse"


def _unfit(entry: Weight) -> str:
    """Why no sparse kernel takes a weight, whatever its values are; empty if one can."""
    if entry.dtype == "float32":
        return "fp32: sparse kernels are for fp16, bf16, int8 and fp8"
    if entry.inputs % INPUT_MULTIPLE or entry.outputs % OUTPUT_MULTIPLE:
        return (
            f"{entry.outputs} x {entry.inputs}: sparse kernels want multiples of "
            f"{OUTPUT_MULTIPLE} x {INPUT_MULTIPLE}"
        )
    return ""


def _slower(entry: Weight, timing: Timing | None) -> str:
    if timing is None or timing.dense is None or timing.sparse is None:
        reason = "TensorRT tried sparse kernels and kept a dense one"
        if min(entry.inputs, entry.outputs) < SMALL:
            reason += f", as is usual below {SMALL} inputs or outputs"
        return reason
    more = (timing.sparse - timing.dense) * 1e6
    return (
        f"the fastest dense kernel took {timing.dense * 1e6:.1f} us, the fastest sparse one "
        f"{more:.1f} us more"
        if more >= 0
        else f"a sparse kernel was {-more:.1f} us faster on its own, and a dense one was kept"
    )
