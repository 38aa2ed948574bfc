"""Read what TensorRT reports about an engine, while it builds the engine and afterwards.

Three sources, each in the wordings of several generations:

    (Sparsity) lines   which layers have weights that fit sparse tensor cores, and which were given
                       a sparse kernel. TensorRT 8 and 9 name the layers, later ones count them as
                       well, and some builds only count.
    timings            of the kernels ("tactics") that were tried for a layer, in the verbose log.
    layers             of the finished engine: the inspector's JSON where a GPU can load the engine,
                       else the listing at the end of the verbose log, which the builder writes
                       without one.

A layer of the engine is often several nodes of the graph: names are joined by " + " or "+", carry
suffixes (" [profile 1]", and "_myl1_9" of the compiler), and the nodes stand in its metadata as
"[ONNX Layer: NAME]".
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
    """What the last (Sparsity) lines of a log say; there is a pair for every selection of kernels.

    Attributes:
        eligible, chosen: nodes of the graph that are named; empty where the log only counts.
        eligible_count, chosen_count: layers of the engine; None if the log does not say.
    """

    eligible: frozenset[str]
    chosen: frozenset[str]
    eligible_count: int | None
    chosen_count: int | None


@dataclass(frozen=True, slots=True)
class Timing:
    """The fastest kernels that were tried for a layer, in seconds; None where none was tried."""

    dense: float | None
    sparse: float | None


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of a finished engine.

    Attributes:
        name: as the engine calls it.
        kind: such as "gemm" or "kgen".
        kernel: the name of its kernel; empty if it is chosen when the engine is loaded.
        sparse: it uses sparse tensor cores.
        nodes: the nodes of the graph that it does the work of.
    """

    name: str
    kind: str
    kernel: str
    sparse: bool
    nodes: frozenset[str]


def sparsity_lines(log: Iterable[str]) -> SparsityLines:
    """Read the (Sparsity) lines of a builder's log."""
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
    """The fastest dense and sparse kernel of every node for which several were timed."""
    best: dict[tuple[str, bool], float] = {}
    kernels: dict[str, str] = {}
    layer = ""
    for line in log:
        if match := _RUNNER.search(line):
            layer = match["layer"]
            kernels.clear()
        elif match := _NAMED_LATER.search(line):
            if match["id"]:
                kernels[match["id"]] = match["kernel"]
        elif layer and (match := _TIMED.search(line)):
            kernel = match["kernel"] or kernels.get(match["id"], "")
            key = (layer, bool(_SPARSE_KERNEL.search(kernel)))
            seconds = float(match["milliseconds"]) / 1e3
            best[key] = min(seconds, best.get(key, seconds))
    return {
        node: Timing(best.get((name, False)), best.get((name, True)))
        for name, _ in best
        for node in nodes_of(name)
    }


def listed_layers(log: Iterable[str]) -> list[EngineLayer]:
    """The layers from the listing at the end of a verbose log."""
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
    """The layers from the JSON of TensorRT's engine inspector, at detailed verbosity.

    Raises:
        InputError: it is something else.
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
            if isinstance(layer, dict)  # only names where the engine was built without detail
        ]


def nodes_of(name: str) -> frozenset[str]:
    """The nodes of the graph in the name of one layer of an engine."""
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
