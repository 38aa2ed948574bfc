"""lm-evaluation-harness on a checkpoint or on an exported graph, zero-shot.

Tasks, prompts, batching and metrics are the library's. All that it asks of a model of transformers
is to be called with ids and to generate, so an exported graph only needs these two verbs.
"""

import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.generate import generate_batch
from runtime.graph import Graph
from thanos_deploy.bundle import files
from thanos_deploy.errors import InputError, PlatformError, UsageError
from thanos_deploy.machine import devices
from thanos_deploy.measure.evaluation import open_graph
from thanos_deploy.measure.options import TaskRequest
from thanos_deploy.measure.quality import Score, TaskQuality
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer

# Of what a task draws at random; the library's own default.
_SEED = 1234


class GraphModel:
    """An exported graph with the two verbs that the library asks a model of transformers for.

    Attributes:
        config: of the model that was exported.
        device: where ids come from and logits go to.
    """

    device = torch.device("cpu")

    def __init__(self, graph: Graph, config: PretrainedConfig) -> None:
        self.config = config
        self._graph = graph
        self._engine = OnnxRuntimeEngine(graph)

    def __call__(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits after every token of int64[batch, tokens]."""
        rows = [np.concatenate(list(self._graph.read(row))) for row in input_ids.numpy()]
        return CausalLMOutput(logits=torch.from_numpy(np.stack(rows)))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_length: int,
        stopping_criteria: Any,
        do_sample: bool | None = None,
        **_: object,
    ) -> Tensor:
        """Continue int64[batch, tokens] greedily, to `max_length` tokens or till the criteria hold.

        Raises:
            UsageError: the task wants samples.
        """
        if do_sample:
            raise UsageError(
                "--runtime onnx: the task samples its answers, and this runtime answers "
                "greedily only",
                fix="use --runtime torch",
            )
        prompts = [
            row[seen].tolist() for row, seen in zip(input_ids, attention_mask > 0, strict=True)
        ]
        for tokens in generate_batch(
            self._engine, prompts, new_tokens=max_length - input_ids.shape[1]
        ):
            input_ids = torch.cat([input_ids, torch.tensor(tokens)[:, None]], dim=1)
            if bool(torch.as_tensor(stopping_criteria(input_ids, None)).all()):
                break
        return input_ids


def library() -> ModuleType:
    """The module of lm-evaluation-harness.

    Raises:
        PlatformError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise PlatformError(
            "lm-evaluation-harness is not installed", fix="pip install 'thanos-deploy[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval  # type: ignore[no-any-return]  # it has no types


def score(bundle: Path, model: Checkpoint, request: TaskRequest, runtime: str) -> TaskQuality:
    """Run tasks.

    Args:
        bundle: has the graph, for "onnx".
        model: the checkpoint, for "torch", and the tokenizer.
        request: which tasks.
        runtime: one of `evaluation.RUNTIMES`.

    Raises:
        PlatformError: the library is not installed, or a task's data are on a hub that cannot be
            reached.
        UsageError: there is no such task.
        InputError: a task's files cannot be read, or do not fit its data or the model.
    """
    tasks = _load(request)
    from lm_eval.evaluator import evaluate

    try:
        with devices.memory_for(f"--tasks {','.join(request.tasks)}"):
            found = evaluate(
                _language_model(bundle, model, request, runtime),
                tasks,
                limit=request.limit,
                log_samples=False,
            )
    # The second is the library's way to say that an answer does not fit into the model's window.
    except (jinja2.TemplateError, AssertionError) as error:
        raise InputError(
            f"--tasks {','.join(request.tasks)}: a task does not fit its data or the model "
            f"({error})",
            fix="correct the task's file, or leave the task out",
        ) from error
    return TaskQuality(tuple(_scores(found)))


def require(request: TaskRequest) -> None:
    """Refuse names that are no tasks.

    Raises:
        PlatformError: the library is not installed.
        UsageError: there is no such task.
        InputError: the folder is not there.
    """
    _index(request)


@cache
def _index(request: TaskRequest) -> Any:
    """The library's index of tasks: those of the folder, and its own where they are asked for."""
    library()
    from lm_eval.tasks import TaskManager

    if request.folder is not None:
        if not Path(request.folder).is_dir():
            raise InputError(f"{request.folder}: no such folder", fix="give a folder of YAML files")
        own = TaskManager(include_path=request.folder, include_defaults=False)
        if set(request.tasks) <= set(own.all_tasks):  # its own are thousands of files
            return own
    index = TaskManager(include_path=request.folder)
    if unknown := sorted(set(request.tasks) - set(index.all_tasks)):
        raise UsageError(
            f"--tasks {','.join(unknown)}: no such task"
            + (f" in {request.folder} or" if request.folder else "")
            + " in lm-evaluation-harness",
            fix="`lm-eval ls tasks` lists the names; --task-folder adds task files of your own",
        )
    return index


def _load(request: TaskRequest) -> Any:
    try:
        loaded = _index(request).load(list(request.tasks))
    except ConnectionError as error:
        raise PlatformError(
            f"--tasks {','.join(request.tasks)}: the data are on a hub that cannot be "
            "reached, and they are not in the local cache of the hub "
            f"({str(error).splitlines()[0]})",
            fix="run the command once on a machine that reaches the hub and copy that "
            "machine's $HF_HOME here, or give tasks with local data (--task-folder)",
        ) from error
    # A task's file may name any class and any loader, so there is no telling what fails.
    except Exception as error:
        raise InputError(
            f"--tasks {','.join(request.tasks)}: cannot be loaded "
            f"({type(error).__name__}: {error})",
            fix="correct the task's file or its data files",
        ) from error
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _language_model(bundle: Path, model: Checkpoint, request: TaskRequest, runtime: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    longest = model.max_positions
    pretrained: Any
    if runtime == "onnx":
        graph = open_graph(bundle)
        pretrained, longest = GraphModel(graph, model.config), graph.max_sequence
    else:
        pretrained = load_model(model.folder, devices.choose(request.device))
    # One at a time: nothing is padded, and on a CPU a batch takes as long as its rows.
    return HFLM(
        pretrained=pretrained,
        tokenizer=load_tokenizer(model.folder),
        max_length=longest,
        batch_size=1,
        # Texts are framed as the tokenizer frames them.
        add_bos_token=None,
        trust_remote_code=False,
    )


def _scores(found: files.Json) -> Iterator[Score]:
    """The library's results: by task, "metric,filter" -> value and "metric_stderr,filter"."""
    for task, entries in found["results"].items():
        for key, value in entries.items():
            metric, _, selection = key.partition(",")
            if not selection or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            stderr = entries.get(f"{metric}_stderr,{selection}")
            yield Score(
                task=task,
                metric=metric if selection == "none" else f"{metric} ({selection})",
                value=float(value),
                stderr=stderr if isinstance(stderr, float) and math.isfinite(stderr) else None,
                samples=found["n-samples"][task]["effective"],
            )
