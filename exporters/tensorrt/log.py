"""Parse TensorRT's reports about an engine: the builder's log and the inspector's JSON.

There are three sources, each in the wordings of several generations of TensorRT:

    (Sparsity) lines   the layers whose weights fit sparse tensor cores, and the layers that were
                       given a sparse kernel. TensorRT 8 and 9 name the layers, later versions also
                       count them, and some builds only count.
    timings            times of the kernels ("tactics") that were tried for a layer, in the verbose
                       log.
    layers             the layers of the finished engine: the inspector's JSON where a GPU can load
                       the engine; otherwise the listing at the end of the verbose log, which the
                       builder writes without a GPU too.

A layer of the engine often does the work of several nodes of the graph. Its name then joins their
names by " + " or "+", with suffixes (" [profile 1]", or "_myl1_9" of the compiler), and its
metadata list the nodes as "[ONNX Layer: NAME]".
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import InputError, boundary

# The names of kernels that use sparse tensor cores: sm80_xmma_sparse_gemm..., ...spgemm..., spmma.
_SPARSE_KERNEL = re.compile(r"spars|spgemm|spmma|sptensor", re.IGNORECASE)

_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math:"
    r"|Found (?P<count>\d{1,9}) layer\(s\) eligible to use sparse tactics:?)(?P<names>.*)"
)
_CHOSEN = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers:"
    r"|Chose (?P<count>\d{1,9}) layer\(s\) using sparse tactics:?)(?P<names>.*)"
)
_RUNNER = re.compile(r"-{3,} Timing Runner: (?P<layer>.*) \(\w+(?:\[\w+\])?\)")
_NAMED_LATER = re.compile(r"Set Tactic Name: (?P<kernel>\S+)(?: Tactic: (?P<id>\S+))?")
_TIMED = re.compile(
    r"Tactic(?: Name: (?P<kernel>\S+) Tactic)?: (?P<id>\S+) "
    r"[Tt]ime:? (?P<milliseconds>\d+(?:\.\d+)?)"
)
_LISTED = re.compile(r"^(?:\[\w\] )?Name: (?P<name>.*?), LayerType: (?P<kind>\w+), ")
_KERNEL = re.compile(r"TacticName: (?P<kernel>[^,]*), ")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_SUFFIX = re.compile(r"(?:_myl\d+_\d+| \[profile \d+\])+$")


@dataclass(frozen=True, slots=True)
class SparsityLines:
    """Content of the last pair of (Sparsity) lines of a log.

    The builder writes a pair for every selection of kernels.

    Attributes:
        eligible, chosen: nodes of the graph that the lines name; empty if they only count.
        eligible_count, chosen_count: numbers of layers of the engine; None without such a line.
    """

    eligible: frozenset[str]
    chosen: frozenset[str]
    eligible_count: int | None
    chosen_count: int | None


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of the fastest dense and sparse kernel of a layer, in seconds; None if not tried."""

    dense: float | None
    sparse: float | None


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of a finished engine.

    Attributes:
        name: name of the layer in the engine.
        kind: type of the layer, such as "gemm" or "kgen".
        kernel: name of its kernel; empty if it is chosen when the engine is loaded.
        sparse: whether its kernel uses sparse tensor cores.
        nodes: nodes of the graph whose work the layer does.
    """

    name: str
    kind: str
    kernel: str
    sparse: bool
    nodes: frozenset[str]


def sparsity_lines(log: Iterable[str]) -> SparsityLines:
    """Parse the (Sparsity) lines of a builder's log."""
    eligible: frozenset[str] = frozenset()
    chosen: frozenset[str] = frozenset()
    eligible_count = chosen_count = None
    for line in log:
        if match := _ELIGIBLE.search(line):
            eligible, eligible_count = _named(match)
            chosen, chosen_count = frozenset(), None
        elif match := _CHOSEN.search(line):
            chosen, chosen_count = _named(match)
    return SparsityLines(eligible, chosen, eligible_count, chosen_count)


def timings(log: Iterable[str]) -> dict[str, Timing]:
    """Parse the times of kernels: the fastest dense and sparse kernel of every node with any."""
    best: dict[tuple[str, bool], float] = {}  # by node, and whether the kernel is sparse
    kernels: dict[str, str] = {}
    nodes: frozenset[str] = frozenset()
    for line in log:
        if match := _RUNNER.search(line):
            nodes = nodes_of(match["layer"])
            kernels.clear()
        elif match := _NAMED_LATER.search(line):
            if match["id"]:
                kernels[match["id"]] = match["kernel"]
        elif nodes and (match := _TIMED.search(line)):
            kernel = match["kernel"] or kernels.get(match["id"], "")
            seconds = float(match["milliseconds"]) / 1e3
            for node in nodes:
                key = (node, bool(_SPARSE_KERNEL.search(kernel)))
                best[key] = min(seconds, best.get(key, seconds))
    return {node: Timing(best.get((node, False)), best.get((node, True))) for node, _ in best}


def listed_layers(log: Iterable[str]) -> list[EngineLayer]:
    """Parse the listing of the engine's layers at the end of a verbose log."""
    layers = []
    for line in log:
        if match := _LISTED.search(line):
            kernel = _KERNEL.search(line)
            layers.append(
                _layer(
                    match["name"],
                    match["kind"],
                    kernel["kernel"] if kernel else "",
                    metadata=line.rpartition("Metadata:")[2],
                )
            )
    return layers


def inspected_layers(text: str) -> list[EngineLayer]:
    """Parse the engine's layers from the JSON of TensorRT's engine inspector.

    Raises:
        InputError: the text is not such JSON.
    """
    with boundary(
        InputError,
        "what TensorRT's engine inspector wrote cannot be read",
        fix="build the engine again, with --overwrite",
    ):
        return [
            _layer(
                layer["Name"],
                layer.get("LayerType", ""),
                layer.get("TacticName", ""),
                metadata=layer.get("Metadata", ""),
            )
            for layer in loads(text)["Layers"]
            if isinstance(layer, dict)  # a layer is a bare name unless verbosity is DETAILED
        ]


def nodes_of(name: str) -> frozenset[str]:
    """Split the name of an engine's layer into the names of the graph's nodes."""
    return frozenset(
        _SUFFIX.sub("", part.strip()) for part in re.split(r"\s\+\s|\+", name) if part.strip()
    )


def _layer(name: str, kind: str, kernel: str, *, metadata: str) -> EngineLayer:
    return EngineLayer(
        name=name,
        kind=kind,
        kernel="" if "STUB" in kernel else kernel,
        # The inspector's HasSparseWeights is no proof: it was seen beside a kernel that does not
        # use sparse tensor cores (NVIDIA/TensorRT issue 4020).
        sparse=bool(_SPARSE_KERNEL.search(kernel)),
        nodes=frozenset(_NODE.findall(metadata)) or nodes_of(name),
    )


def _named(match: re.Match[str]) -> tuple[frozenset[str], int]:
    layers = [name for name in match["names"].split(", ") if name.strip()]
    count = match["count"]
    nodes = frozenset(node for layer in layers for node in nodes_of(layer))
    return nodes, len(layers) if count is None else int(count)
