"""Run by vLLM's own Python: its parallel layers with our method, one rank at a time.

No model and no process group is needed, so a rank is what two functions of vLLM say. Every layer is
compared with the dense product in float64. What is printed is JSON: differences, and refusals.
"""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.config import LoadConfig, LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear
from vllm.platforms.cpu import CpuPlatform

from runtime.vllm_plugin import config as plugin
from runtime.vllm_plugin import register
from runtime.vllm_plugin.config import TwoFourConfig
from runtime.vllm_plugin.linear import TwoFourLinearMethod
from thanos_deploy.model import quantization
from thanos_deploy.model.packing import pack
from thanos_deploy.pattern import SemiStructured

RANKS = 2
COLUMNS = 32
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def method(*layers: str) -> TwoFourConfig:
    """The method for some packed layers of a block `b`."""
    config = TwoFourConfig(frozenset(f"b.{layer}" for layer in layers))
    config.packed_modules_mapping = FUSED
    return config


ALL = method("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "fc")

# name -> (makes the layer on a rank, rows of its parts, the ids of the parts for vLLM)
LAYERS: dict[str, tuple[Callable[[], Any], list[int], list[Any]]] = {
    "qkv": (
        lambda: linear.QKVParallelLinear(
            COLUMNS, 8, 4, 2, bias=True, quant_config=ALL, prefix="b.qkv_proj"
        ),
        [32, 16, 16],
        ["q", "k", "v"],
    ),
    "qkv of one key head": (
        lambda: linear.QKVParallelLinear(
            COLUMNS, 8, 4, 1, bias=True, quant_config=ALL, prefix="b.qkv_proj"
        ),
        [32, 8, 8],
        ["q", "k", "v"],
    ),
    "merged": (
        lambda: linear.MergedColumnParallelLinear(
            COLUMNS, [24, 24], bias=True, quant_config=ALL, prefix="b.gate_up_proj"
        ),
        [24, 24],
        [0, 1],
    ),
    "column": (
        lambda: linear.ColumnParallelLinear(COLUMNS, 24, quant_config=ALL, prefix="b.fc"),
        [24],
        [None],
    ),
    "row": (
        lambda: linear.RowParallelLinear(COLUMNS, 24, quant_config=ALL, prefix="b.o_proj"),
        [24],
        [None],
    ),
}


def on(rank: int, ranks: int, call: Callable[[], Any]) -> Any:
    """What a call returns where vLLM believes to be one of some ranks."""
    with (
        mock.patch.multiple(
            linear,
            get_tensor_model_parallel_rank=lambda: rank,
            get_tensor_model_parallel_world_size=lambda: ranks,
        ),
        mock.patch.multiple(
            "vllm.model_executor.parameter",
            get_tensor_model_parallel_rank=lambda: rank,
            get_tensor_model_parallel_world_size=lambda: ranks,
        ),
    ):
        return call()


def two_four(rows: int) -> torch.Tensor:
    """A random 2:4 matrix."""
    weight = torch.randn(rows * COLUMNS // 4, 4)
    weight.scatter_(1, torch.rand(weight.shape).argsort(dim=1)[:, 2:], 0)
    return weight.reshape(rows, COLUMNS)


def difference(name: str, rank: int, ranks: int) -> float:
    """The largest entry of a layer's product on a rank, less what it has to be."""
    make, rows, ids = LAYERS[name]
    torch.manual_seed(0)
    weights = [two_four(each) for each in rows]
    biases = [torch.randn(each) for each in rows]
    layer = on(rank, ranks, make)
    assert isinstance(layer.quant_method, TwoFourLinearMethod)
    for weight, bias, part in zip(weights, biases, ids, strict=True):
        values, mask = pack(weight, SemiStructured(2, 4))
        where = () if part is None else (part,)
        for parameter, loaded in (
            (layer.weight.values, values),
            (layer.weight.mask, mask),
            (layer.bias, bias),
        ):
            parameter.weight_loader(parameter, loaded, *where)
    layer.quant_method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight")
    x = torch.randn(3, COLUMNS)
    if name == "row":
        columns = slice(rank * COLUMNS // ranks, (rank + 1) * COLUMNS // ranks)
        y = layer.quant_method.apply(layer, x[:, columns], layer.bias)
        expected = x[:, columns].double() @ weights[0][:, columns].double().T + biases[0]
    else:
        y = layer.quant_method.apply(layer, x, layer.bias)
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            # One key head is there on every rank.
            whole = name == "qkv of one key head" and len(weight) == 8
            size = len(weight) if whole else len(weight) // ranks
            own = slice(0 if whole else rank * size, (0 if whole else rank * size) + size)
            parts.append(x.double() @ weight[own].double().T + bias[own])
        expected = torch.cat(parts, dim=1)
    assert y.shape == expected.shape
    return float((y - expected).abs().max())


def refusal(call: Callable[[], Any]) -> str:
    """What a call is refused with."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def projection(config: TwoFourConfig, columns: int = COLUMNS) -> Any:
    """A row-parallel layer."""
    return linear.RowParallelLinear(columns, 8, quant_config=config, prefix="b.o_proj")


def fused(config: TwoFourConfig) -> Any:
    """Queries, keys and values as one layer."""
    return linear.QKVParallelLinear(COLUMNS, 8, 4, 2, quant_config=config, prefix="b.qkv_proj")


def with_lora() -> Any:
    """A packed layer where vLLM has adapters."""
    asked = SimpleNamespace(lora_config="adapters")
    with mock.patch.object(plugin, "get_current_vllm_config", return_value=asked):
        return on(0, 1, lambda: projection(ALL))


def with_adapters(method_name: str) -> None:
    """What vLLM asks of adapters and a model before it starts anything."""
    model = SimpleNamespace(
        quantization=method_name, model="folder", dtype=torch.float32, architectures=[]
    )
    LoRAConfig().verify_with_model_config(model)


def on_a_gpu_of(capability: int) -> Any:
    """What vLLM makes of the method on such a GPU."""
    its = SimpleNamespace(to_int=lambda: capability)
    with (
        mock.patch.object(CpuPlatform, "get_device_capability", return_value=its),
        mock.patch(
            "vllm.model_executor.model_loader.weight_utils.get_quant_config", return_value=ALL
        ),
    ):
        model: Any = SimpleNamespace(quantization=quantization.METHOD)
        return VllmConfig._get_quantization_config(model, LoadConfig())


def main() -> None:
    """Print what was found."""
    register()
    with set_current_vllm_config(VllmConfig()):
        found = {
            "differences": {
                f"{name}, rank {rank} of {ranks}": difference(name, rank, ranks)
                for name in LAYERS
                for ranks in (1, RANKS)
                for rank in range(ranks)
            },
            "mixed": refusal(lambda: on(0, 1, lambda: fused(method("q_proj")))),
            "cut": refusal(lambda: on(0, RANKS, lambda: projection(ALL, columns=24))),
            "lora": refusal(with_lora),
            "adapters": refusal(lambda: with_adapters(quantization.METHOD)),
            "adapters of others": refusal(lambda: with_adapters("awq")),
            "capability": refusal(lambda: on_a_gpu_of(75)),
            "dense": type(on(0, 1, lambda: projection(method("fc"))).quant_method).__name__,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
