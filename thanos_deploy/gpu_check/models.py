"""Times of whole models of large layers: dense, 2:4, structured, and both."""

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

# Model -> variants of the torch engine that run it. `mma-sp` holds one copy of a weight, in 9/16 of
# its bytes; `sparse` may hold two, for the kernels that are the fastest.
MODELS = {
    "dense": ("eager",),
    "2:4": ("sparse", "mma-sp"),
    "structured": ("eager",),
    "structured, 2:4": ("sparse", "mma-sp"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model with the shapes of Llama 3 8B, and the scenarios to time.

    Attributes:
        hidden, channels, heads, kv_heads, head_size: sizes of a block.
        kept_heads, kept_channels: fractions of the heads and channels that the structured model
            keeps; together they keep 70 % of a block's parameters.
        blocks: number of blocks.
        vocabulary: number of tokens in the vocabulary.
        dtype: dtype of the weights.
        scenarios: scenarios to time.
        turns: timed turns of each scenario.
        warmup: turns of each scenario before these.
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
    """Return the name of a model's step, without a comma, which separates names of steps."""
    return f"model:{name.replace(', ', '+')}"


def rows(name: str, sizes: Sizes, task: Task, *, variants: tuple[str, ...] = ()) -> Iterator[Row]:
    """Time one model in every variant and scenario.

    Args:
        name: a key of `MODELS`.
        sizes: sizes of the model, and the scenarios.
        task: see `steps.Task`.
        variants: variants of the torch engine; empty for those in `MODELS`.
    """
    for variant in variants or MODELS[name]:
        # Each variant gets a new model, because an engine replaces the model's layers.
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
        # The peak is that of running the model, without packing and the choice of kernels before.
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
                devices.wait(torch.device(task.device))  # raises a CUDA error that persists
            else:
                yield row(*pass_of(scenario), timed, _held(task.device))
        del model, engine
        _forget_held(task.device)


def pass_of(scenario: Prefill | Decode) -> tuple[Literal["prefill", "decode"], int, int]:
    """Return phase, batch and tokens of a scenario for a `ModelRow`."""
    if isinstance(scenario, Prefill):
        return "prefill", scenario.batch, scenario.prompt
    return "decode", scenario.batch, scenario.past


def samples(engine: Engine, scenario: Prefill | Decode, sizes: Sizes) -> tuple[float, ...]:
    """Return the seconds of each timed prefill or decode step."""
    turns = [scenario.take(engine, turn) for turn in range(sizes.warmup + sizes.turns)]
    return tuple(sample for turn in turns[sizes.warmup :] for sample in turn[scenario.headline])


def make(name: str, sizes: Sizes, device: str) -> LlamaForCausalLM:
    """Make a model of random weights on a device, in inference mode.

    The values of the weights do not affect its times.
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
    """Return the full names of the linear layers of the blocks."""
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
    """Return the peak memory reserved for tensors since `_forget_held`; None on a CPU."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else None
