"""Traced graphs that all processes of a test run share.

A trace takes several seconds of processor time, far longer than the rest of the export of a tiny
model. Many tests export models of the same structure, in the processes of pytest-xdist and in those
that `tests.commands` forks. The first process that needs a trace makes it for all.

A test of the tracing itself replaces `exporters.onnx.trace._traced` by an empty dictionary.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
from torch.onnx._internal.exporter._registration import ONNXRegistry

from exporters.onnx import trace

# Environment variable with the folder of the graphs, for the fork server; see `tests.preloaded`.
VARIABLE = "THANOS_DEPLOY_TEST_TRACES"

# Metadata key of a graph's file: how many of the graph's last inputs are weights.
_WEIGHTS = "weights"


class Traced(dict[str, ir.Model]):
    """Cache for `exporters.onnx.trace`: in memory for this process, and in a folder for all."""

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
    """Let this process and its children read traces from a folder, and add missing ones to it."""
    os.environ[VARIABLE] = str(folder)
    trace._traced = Traced(folder)
    # For every trace, PyTorch builds a registry from the sources of some 500 functions. No test
    # adds functions, so one registry is enough.
    kept = staticmethod(cache(ONNXRegistry.from_torchlib))
    ONNXRegistry.from_torchlib = kept  # type: ignore[method-assign]


def _write(graph: ir.Model, path: Path) -> None:
    """Write a graph without weights.

    A file cannot have initializers without values, so the weights become inputs.
    """
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
