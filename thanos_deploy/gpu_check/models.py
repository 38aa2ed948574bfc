"""Whole models of large layers, made on the device: dense, 2:4, structured, and both."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.engine import Engine
from runtime.engines import torch as torch_runtime
from runtime.static.room import Room
from thanos_deploy.errors import DeployError
from thanos_deploy.gpu.rows import CheckRow, ModelRow, Row
from thanos_deploy.gpu_check.steps import Task
from thanos_deploy.machine import devices
from thanos_deploy.measure.latency import Decode, Prefill
from thanos_deploy.model.checkpoint import DTYPES
from thanos_deploy.solver.mask import smallest_in_groups

# What is made, and which variants of the torch engine run it. `mma-sp` holds one copy of a weight,
# 9/16 of its bytes; `sparse` may hold two, for the kernels that are the fastest.
MODELS = {
    "dense": ("eager",),
    "2:4": ("sparse", "mma-sp"),
    "structured": ("eager",),
    "structured, 2:4": ("sparse", "mma-sp"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model of the shapes of Llama 3 8B, and what is timed.

    Attributes:
        hidden, channels, heads, kv_heads, head_size: of a block.
        kept_heads, kept_channels: the parts that are left of the structured model; together that
            is 70 % of a block.
        blocks: how many.
        vocabulary: how many tokens there are.
        dtype: of the weights.
        scenarios: what is timed.
        turns: of each scenario, after as many as `warmup`.
    """

    hidden: int = 4096
    channels: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    kept_heads: float = 0.5
    kept_channels: float = 0.75
    blocks: int = 32
    vocabulary: int = 128256
    dtype: str = "bf16"
    scenarios: tuple[Prefill | Decode, ...] = (
        Decode(1, 512, 32),
        Decode(16, 512, 32),
        Prefill(1, 2048),
        Prefill(8, 512),
    )
    turns: int = 5
    warmup: int = 2


def step(name: str) -> str:
    """The step of a model; a comma would part two steps on the command line."""
    return f"model:{name.replace(', ', '+')}"


def rows(name: str, sizes: Sizes, task: Task, *, variants: tuple[str, ...] = ()) -> Iterator[Row]:
    """One model, timed.

    Args:
        name: a key of `MODELS`.
        sizes: of the model.
        task: see `Step`.
        variants: of the torch engine; none for that of `MODELS`.
    """
    for variant in variants or MODELS[name]:
        # Made anew for each: an engine exchanges the model's layers.
        model = make(name, sizes, task.device)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        row = partial(ModelRow, name, f"torch:{variant}", sizes.dtype, sizes.blocks, parameters)
        room = Room(
            max(scenario.batch for scenario in sizes.scenarios),
            max(scenario.tokens for scenario in sizes.scenarios),
        )
        try:
            engine = torch_runtime.engine_of(model, linears(model), variant=variant, room=room)
        except DeployError as refusal:
            for scenario in sizes.scenarios:
                yield row(*pass_of(scenario), None, None, refusal.message)
            continue
        # What serving takes counts, and not what packing and the choice of kernels took before.
        _forget_held(task.device)
        for scenario in sizes.scenarios:
            try:
                timed = samples(engine, scenario, sizes)
            except (DeployError, RuntimeError) as failure:
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
                yield row(*pass_of(scenario), None, None, reason)
                yield CheckRow(
                    step(name),
                    f"{variant}, {scenario.name}",
                    "FAIL",
                    reason,
                    "read the log, and report this with the name of the GPU and the "
                    "versions of the packages",
                )
                devices.wait(torch.device(task.device))  # an error that stays is raised again
            else:
                yield row(*pass_of(scenario), timed, _held(task.device))
        del model, engine
        _forget_held(task.device)


def pass_of(scenario: Prefill | Decode) -> tuple[Literal["prefill", "decode"], int, int]:
    """Phase, batch and tokens, as `ModelRow` has them."""
    if isinstance(scenario, Prefill):
        return "prefill", scenario.batch, scenario.prompt
    return "decode", scenario.batch, scenario.past


def samples(engine: Engine, scenario: Prefill | Decode, sizes: Sizes) -> tuple[float, ...]:
    """Seconds of each prefill or step."""
    turns = [scenario.take(engine, turn) for turn in range(sizes.warmup + sizes.turns)]
    return tuple(sample for turn in turns[sizes.warmup :] for sample in turn[scenario.headline])


def make(name: str, sizes: Sizes, device: str) -> LlamaForCausalLM:
    """A random model in inference mode, on a device.

    What it says is nonsense; how long it takes does not depend on that.
    """
    structured = name.startswith("structured")
    heads = sizes.kept_heads if structured else 1
    channels = sizes.kept_channels if structured else 1
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=int(channels * sizes.channels),
        num_attention_heads=int(heads * sizes.heads),
        num_key_value_heads=int(heads * sizes.kv_heads),
        head_dim=sizes.head_size,
        num_hidden_layers=sizes.blocks,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=max(scenario.tokens for scenario in sizes.scenarios),
        dtype=DTYPES[sizes.dtype],
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[sizes.dtype])
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    model.eval()
    model.requires_grad_(False)
    if name.endswith("2:4"):
        for linear in linears(model):
            _to_two_four(model.get_parameter(f"{linear}.weight"))
    return model


def linears(model: LlamaForCausalLM) -> list[str]:
    """The full names of the linear layers of the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    ]


def _to_two_four(weight: Tensor) -> None:
    weight[smallest_in_groups(weight.abs(), 2, 4)] = 0


def _forget_held(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _held(device: str) -> int | None:
    """The most memory that was taken for tensors at once, since it was forgotten."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else None
