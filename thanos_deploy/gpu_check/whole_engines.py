"""Whole models of large layers as TensorRT engines."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from exporters import preflight
from exporters.targets import tensorrt
from runtime.engine import Engine
from thanos_deploy.gpu import driver
from thanos_deploy.gpu.rows import ModelRow, Row
from thanos_deploy.gpu_check import models
from thanos_deploy.gpu_check.models import MODELS, Sizes
from thanos_deploy.gpu_check.steps import Task
from thanos_deploy.measure.latency import Prefill
from thanos_deploy.model.checkpoint import Checkpoint

# Few blocks: the time of a pass is proportional to their number, and the export grows with it.
SIZES = replace(Sizes(), blocks=4, vocabulary=32000, dtype="fp16")


def rows(sizes: Sizes, task: Task) -> Iterator[Row]:
    """Export, build and time each model of `MODELS`.

    Raises:
        PlatformError: TensorRT is missing; this is found before anything is exported.
    """
    preflight.require(tensorrt.TARGET)
    for name in MODELS:
        model = models.make(name, sizes, task.device)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        path = task.folder / name.replace(", ", "-")
        model.save_pretrained(path)
        del model
        torch.cuda.empty_cache()
        engine = _build(path, sizes)
        for scenario in sizes.scenarios:
            yield ModelRow(
                name,
                tensorrt.TARGET.name,
                sizes.dtype,
                sizes.blocks,
                parameters,
                *models.pass_of(scenario),
                models.samples(engine, scenario, sizes),
                None,
            )


def _build(path: Path, sizes: Sizes) -> Engine:
    """Export a model, build its TensorRT engine, and load it."""
    import exporters.onnx.graph
    import exporters.tensorrt.engine
    from runtime.engines import tensorrt as tensorrt_runtime

    graph, engine = path / "onnx", path / "engine"
    for folder in (graph, engine):
        folder.mkdir()
    # Only the last logits, as in the torch engines whose times these are compared with.
    exporters.onnx.graph.export(
        Checkpoint.open(path), graph, pattern=None, dtype="fp16", logits="last"
    )
    exporters.tensorrt.engine.export(
        graph,
        engine,
        library=tensorrt.LIBRARY,
        architectures=(driver.require().arch,),
        batch=sorted({scenario.batch for scenario in sizes.scenarios}),
        prompt=sorted(
            {scenario.prompt for scenario in sizes.scenarios if isinstance(scenario, Prefill)}
        ),
    )
    return tensorrt_runtime.open_folder(engine)
