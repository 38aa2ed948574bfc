"""The runtimes of an evaluation, and the one that is ONNX Runtime with the exported graph.

What a server runs is measured by `thanos_deploy.measure.served`.
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
    """The graph of a bundle on ONNX Runtime, so that it reads segments; see `open_graph`."""
    graph = open_graph(bundle)

    def read(ids: Tensor) -> Iterator[Tensor]:
        return map(torch.from_numpy, graph.read(ids.numpy()))

    return read


def open_graph(bundle: Path) -> Graph:
    """The graph of a bundle, compared with its hash.

    Raises:
        InputError: there is no graph.
        IntegrityError: the graph is not the one that was exported.
    """
    require_stage(bundle, onnxruntime, verify=True)
    graph = onnxruntime.open_graph(bundle)
    require_all_logits(graph.logits)
    return graph
