"""Run lm-evaluation-harness on a checkpoint or on an exported graph, zero-shot.

Tasks, prompts, batching and metrics are the library's. From a model of transformers it needs only
two methods: `__call__` on token ids, and `generate`. So an adapter with these two methods makes an
exported graph usable.
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

# Seed for the random choices of a task; the library's own default.
_SEED = 1234


class GraphModel:
    """An adapter that gives an exported graph the methods of a model of transformers.

    Attributes:
        config: configuration of the exported model.
        device: device of the token ids and of the logits.
    """

    device = torch.device("cpu")

    def __init__(self, graph: Graph, config: PretrainedConfig) -> None:
        self.config = config
        self._graph = graph
        self._engine = OnnxRuntimeEngine(graph)

    def __call__(self, input_ids: Tensor) -> CausalLMOutput:
        """Compute the logits after every token of int64[batch, tokens]."""
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
        """Continue int64[batch, tokens] greedily.

        Args:
            input_ids: int64[batch, tokens], the prompts.
            attention_mask: [batch, tokens], 0 for padding.
            max_length: the most tokens of a sequence, prompt included.
            stopping_criteria: generation ends early when they hold for every sequence.
            do_sample: whether the task asks for sampling, which is refused.

        Raises:
            UsageError: the task asks for sampling.
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
    """Import lm-evaluation-harness.

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
    """Run tasks and return the scores.

    Args:
        bundle: bundle with the exported graph, for the runtime "onnx".
        model: checkpoint with the weights, for the runtime "torch", and with the tokenizer.
        request: the tasks.
        runtime: one of `evaluation.RUNTIMES`.

    Raises:
        PlatformError: the library is not installed, or the data of a task are on a hub that cannot
            be reached.
        UsageError: there is no such task, or it asks for sampling, which "onnx" cannot do.
        InputError: the files of a task cannot be read, or do not fit its data or the model.
        ResourceError: the GPU ran out of memory.
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
    # The library raises AssertionError if an answer does not fit into the model's context window.
    except (jinja2.TemplateError, AssertionError) as error:
        raise InputError(
            f"--tasks {','.join(request.tasks)}: a task does not fit its data or the model "
            f"({error})",
            fix="correct the task's file, or leave the task out",
        ) from error
    return TaskQuality(tuple(_scores(found)))


def require(request: TaskRequest) -> None:
    """Refuse names of tasks that do not exist.

    Raises:
        PlatformError: the library is not installed.
        UsageError: there is no such task.
        InputError: the folder of task files does not exist.
    """
    _index(request)


@cache
def _index(request: TaskRequest) -> Any:
    """The index of the folder's tasks, and of the library's own if some of these are asked for."""
    library()
    from lm_eval.tasks import TaskManager

    if request.folder is not None:
        if not Path(request.folder).is_dir():
            raise InputError(f"{request.folder}: no such folder", fix="give a folder of YAML files")
        own = TaskManager(include_path=request.folder, include_defaults=False)
        if set(request.tasks) <= set(own.all_tasks):  # the library's own are thousands
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
    # The file of a task may name any class and any loader, which can raise any exception.
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
    # Batch size 1 needs no padding, and on a CPU a batch takes as long as its rows one by one.
    return HFLM(
        pretrained=pretrained,
        tokenizer=load_tokenizer(model.folder),
        max_length=longest,
        batch_size=1,
        # None leaves it to the tokenizer whether a text begins with special tokens.
        add_bos_token=None,
        trust_remote_code=False,
    )


def _scores(found: files.Json) -> Iterator[Score]:
    """The scores in the library's results.

    For each task these map "metric,filter" to a value, and "metric_stderr,filter" to its error.
    """
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
