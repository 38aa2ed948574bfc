"""The runtimes of an evaluation, and how to read segments with ONNX Runtime.

`thanos_deploy.measure.served` measures models on a running server.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from runtime.engine import require_stage
from runtime.engines import onnxruntime
from runtime.graph import Graph, require_all_logits
from thanos_deploy.measure.perplexity import Read

RUNTIMES = ("torch", "onnx")


def graph_reader(bundle: Path) -> Read:
    """Return a function that reads segments with a bundle's graph; see `open_graph`."""
    graph = open_graph(bundle)

    def read(ids: Tensor) -> Iterator[Tensor]:
        return map(torch.from_numpy, graph.read(ids.numpy()))

    return read


def open_graph(bundle: Path) -> Graph:
    """Open the graph of a bundle with ONNX Runtime, after checking its hash.

    Raises:
        InputError: there is no graph, or it computes logits for the last token only.
        IntegrityError: the graph is not the one that was exported.
    """
    require_stage(bundle, onnxruntime, verify=True)
    graph = onnxruntime.open_graph(bundle)
    require_all_logits(graph.logits)
    return graph
