"""Graphs that were traced, shared by all processes of a run of the tests.

A trace takes several seconds of a processor, far longer than all else in the export of a tiny
model, and many tests export models of one structure: in the processes of pytest-xdist, and in those
that are forked by `tests.commands`. Whichever comes first traces it for all.

A test that is about tracing itself empties `exporters.onnx.trace._traced` for its own time.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
from torch.onnx._internal.exporter._registration import ONNXRegistry

from exporters.onnx import trace

# The folder of the graphs, for processes that are forked from a server; see `tests.commands`.
VARIABLE = "THANOS_DEPLOY_TEST_TRACES"

# What of a graph's inputs are weights, which a file of a graph without weights could not say.
_WEIGHTS = "weights"


class Traced(dict[str, ir.Model]):
    """What `exporters.onnx.trace` keeps: in memory what this process used, the rest in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key) and (path := self._path(str(key))).exists():
            super().__setitem__(str(key), _read(path))
        return super().__contains__(key)

    def __setitem__(self, key: str, graph: ir.Model) -> None:
        super().__setitem__(key, graph)
        if not (path := self._path(key)).exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            _write(graph, unfinished)
            unfinished.rename(path)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"


def share(folder: Path) -> None:
    """Take traces from a folder, and leave those there that it lacks, in this process and below."""
    os.environ[VARIABLE] = str(folder)
    trace._traced = Traced(folder)
    # PyTorch reads the sources of some 500 functions for every trace; nothing here adds to them.
    kept = staticmethod(cache(ONNXRegistry.from_torchlib))
    ONNXRegistry.from_torchlib = kept  # type: ignore[method-assign]


def _write(graph: ir.Model, path: Path) -> None:
    """A file has no initializers without values, so weights are inputs in it."""
    copy = graph.clone()
    weights = [value for value in copy.graph.initializers.values() if value.const_value is None]
    for value in weights:
        del copy.graph.initializers[str(value.name)]
        copy.graph.inputs.append(value)
    copy.metadata_props[_WEIGHTS] = str(len(weights))
    path.write_bytes(ir.to_proto(copy).SerializeToString())


def _read(path: Path) -> ir.Model:
    graph = ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
    assert isinstance(graph, ir.Model)
    count = int(graph.metadata_props.pop(_WEIGHTS))
    for value in [graph.graph.inputs.pop() for _ in range(count)][::-1]:
        graph.graph.initializers[str(value.name)] = value
    return graph
