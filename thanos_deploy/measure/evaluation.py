"""The runtime of an evaluation: PyTorch, or ONNX Runtime with the exported graph.

What a server runs is measured by `thanos_deploy.measure.served`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from runtime.engine import require_stage
from runtime.engines import onnxruntime
from runtime.graph import Graph, require_all_logits
from thanos_deploy.machine.devices import CPU
from thanos_deploy.measure.perplexity import Read, reader
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model

RUNTIMES = ("torch", "onnx")


def open_reader(bundle: Path, model: Checkpoint, runtime: str, device: torch.device = CPU) -> Read:
    """Load a model so that it reads segments.

    Args:
        bundle: has the graph, for "onnx".
        model: the checkpoint, for "torch".
        runtime: one of `RUNTIMES`.
        device: where the checkpoint runs.

    Raises:
        InputError: there is no graph.
        IntegrityError: the graph is not the one that was exported.
    """
    return graph_reader(bundle) if runtime == "onnx" else reader(load_model(model.folder, device))


def graph_reader(bundle: Path) -> Read:
    """The graph of a bundle on ONNX Runtime; see `open_reader`."""
    graph = open_graph(bundle)

    def read(ids: Tensor) -> Iterator[Tensor]:
        return map(torch.from_numpy, graph.read(ids.numpy()))

    return read


def open_graph(bundle: Path) -> Graph:
    """The graph of a bundle, compared with its hash; see `open_reader`."""
    require_stage(bundle, onnxruntime, verify=True)
    graph = onnxruntime.open_graph(bundle)
    require_all_logits(graph.logits)
    return graph
