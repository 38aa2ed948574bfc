"""Experts as modules, each of whose linear layers is one, as files keep them.

transformers keeps the matrices of all experts of a block in two parameters of three dimensions and
multiplies slices of them, so that there is no layer to name, to prune or to ask what it read.
`separate` puts a module in the place of each such module that computes the same with one linear
layer for every matrix. Their weights are views of the slices: writing to one changes the parameter.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from thanos_deploy.errors import ModelError
from thanos_deploy.model.families import Experts, Family
from thanos_deploy.model.structure import blocks_of

GATE_UP, DOWN = "gate_up_proj", "down_proj"
BIAS = "_bias"

# [tokens, channels] of the gate and of what it gates -> [tokens, channels].
Gate = Callable[[Tensor, Tensor], Tensor]


class Expert(nn.Module):
    """One expert: down(gated(gate(x), up(x))).

    `reads`, `channels` and `gives` compute nothing. The first two are called with what gate and up
    read, and with what down reads, of all experts before any layer of the step multiplies: so all
    statistics of a step can be had before one of its layers changes. The third is called with what
    the expert adds to the hidden states, weights of the router included.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], names: Experts, gate: Gate) -> None:
        """Take layers.

        Args:
            layers: of it, by their names.
            names: which is which.
            gate: what joins the two that make channels.
        """
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._names = names
        self._gate = gate
        self.reads = nn.Identity()
        self.channels = nn.Identity()
        self.gives = nn.Identity()

    def entrance(self, layer: str) -> nn.Module:
        """What is called with the input of a layer, as its one argument."""
        return self.channels if layer == self._names.down else self.reads

    def gated(self, states: Tensor) -> Tensor:
        """[tokens, hidden size] -> [tokens, channels]."""
        gate, up = (self.get_submodule(name) for name in (self._names.gate, self._names.up))
        return self._gate(gate(states), up(states))

    def out(self, channels: Tensor) -> Tensor:
        """[tokens, channels] -> [tokens, hidden size]."""
        made: Tensor = self.get_submodule(self._names.down)(channels)
        return made


class SeparateExperts(nn.ModuleList):
    """The experts of one block."""

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        Args:
            states: [tokens, hidden size].
            chosen: int64[tokens, experts of a token], their numbers.
            weights: [tokens, experts of a token].

        Returns:
            [tokens, hidden size].
        """
        experts = [expert for expert in self if isinstance(expert, Expert)]
        if torch.compiler.is_exporting():
            return _without_choice(experts, states, chosen, weights)
        places = [torch.where(chosen == number) for number in range(len(experts))]
        read = [expert.reads(states[at[0]]) for expert, at in zip(experts, places, strict=True)]
        gated = [expert.gated(one) for expert, one in zip(experts, read, strict=True)]
        gated = [expert.channels(one) for expert, one in zip(experts, gated, strict=True)]
        total = torch.zeros_like(states)
        for expert, (tokens, place), channels in zip(experts, places, gated, strict=True):
            made = expert.gives(expert.out(channels) * weights[tokens, place, None])
            total.index_add_(0, tokens, made.to(total.dtype))
        return total


def _without_choice(
    experts: list[Expert], states: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """The same for a graph, whose shapes cannot depend on what the router chooses.

    Every expert computes every token, and counts with weight 0 where it was not chosen: exact, and
    as much work as all experts are.
    """
    total = torch.zeros_like(states)
    for number, expert in enumerate(experts):
        weight = (weights * (chosen == number)).sum(dim=1, keepdim=True)
        total = total + expert.out(expert.gated(states)) * weight
    return total


def separate(model: nn.Module, family: Family) -> None:
    """Give every block of a model whose family has experts a module for each, in place.

    Args:
        model: the causal model, with or without storage; its blocks without experts stay as they
            are.
        family: the row that describes it.

    Raises:
        ModelError: a block's experts compute something else than `Expert`, or are kept otherwise.
    """
    if family.experts is None:
        return
    parent, _, name = family.experts.module.rpartition(".")
    for index, block in enumerate(blocks_of(model, family)):
        held = dict(block.named_modules()).get(family.experts.module)
        if held is None or isinstance(held, SeparateExperts):
            continue
        place = f"{family.blocks}.{index}.{family.experts.module}"
        setattr(block.get_submodule(parent), name, _separated(held, family.experts, place))


def _separated(held: nn.Module, names: Experts, place: str) -> SeparateExperts:
    _require_known(held, names, place)
    gate = _interleaved(held) if names.fused else _activated(held)
    parameters = {name: one.detach() for name, one in held.named_parameters()}
    count = len(parameters[DOWN])
    return SeparateExperts(
        Expert(_layers({name: one[number] for name, one in parameters.items()}, names), names, gate)
        for number in range(count)
    )


def _layers(own: Mapping[str, Tensor], names: Experts) -> dict[str, nn.Linear]:
    """The layers of one expert, of views of its part of each parameter."""
    if not names.fused:
        gate, up = own[GATE_UP].chunk(2)
        return {names.gate: _linear(gate), names.up: _linear(up), names.down: _linear(own[DOWN])}
    return {
        name: _linear(matrix.T[rows], bias[rows])
        for name, matrix, bias, rows in (
            (names.gate, own[GATE_UP], own[GATE_UP + BIAS], slice(0, None, 2)),
            (names.up, own[GATE_UP], own[GATE_UP + BIAS], slice(1, None, 2)),
            (names.down, own[DOWN], own[DOWN + BIAS], slice(None)),
        )
    }


def _activated(held: nn.Module) -> Gate:
    """The gate of most experts: activation(gate) * up."""
    activation = held.get_submodule("act_fn")

    def gate(gates: Tensor, ups: Tensor) -> Tensor:
        gated: Tensor = activation(gates) * ups
        return gated

    return gate


def _interleaved(held: Any) -> Gate:
    """A gate that the library has for the module alone, of gates and what they gate in turns."""
    rule, numbers = type(held)._apply_gate, {"alpha": held.alpha, "limit": held.limit}

    def gate(gates: Tensor, ups: Tensor) -> Tensor:
        gated: Tensor = rule(SimpleNamespace(**numbers), torch.stack((gates, ups), -1).flatten(-2))
        return gated

    return gate


def _require_known(held: nn.Module, names: Experts, place: str) -> None:
    """Refuse experts of another kind than the row of the family says.

    The library says of what kind its experts are by attributes, which `use_experts_implementation`
    sets, and by `_apply_gate`, which it adds to classes that have none of their own.

    Raises:
        ModelError: they are.
    """
    shapes = {name: tuple(one.shape) for name, one in held.named_parameters()}
    kinds = {
        "has_gate": True,
        "has_bias": names.fused,
        "has_post_expert_norm": False,
        "is_transposed": names.fused,
        "is_concatenated": not names.fused,
    }
    odd = [
        f"{kind} is {seen}"
        for kind, wanted in kinds.items()
        if (seen := getattr(held, kind, wanted)) is not wanted
    ]
    gate = getattr(type(held), "_apply_gate", None)
    own = gate is not None and gate.__module__ == type(held).__module__
    if own is not names.fused:
        odd.append(f"its class has {'a' if own else 'no'} gate function of its own")
    matrices = {GATE_UP, DOWN}
    if set(shapes) != matrices | ({one + BIAS for one in matrices} if names.fused else set()):
        odd.append(f"its parameters are {shapes}")
    elif not len(shapes[GATE_UP]) == len(shapes[DOWN]) == 3 or _sizes(
        shapes[GATE_UP], names
    ) != _doubled(_sizes(shapes[DOWN], names)):
        odd.append(f"its parameters have the shapes {shapes}")
    if not names.fused and not isinstance(getattr(held, "act_fn", None), nn.Module):
        odd.append("it has no activation `act_fn`")
    if odd:
        raise ModelError(
            f"{place}: {type(held).__name__} stores or computes its experts in a way that "
            f"is not supported: {'; '.join(odd)}",
            fix="use a model of a supported type",
        )


def _sizes(shape: tuple[int, ...], names: Experts) -> tuple[int, int, int]:
    """Experts, outputs and inputs of a parameter."""
    experts, *sides = shape
    inputs, outputs = sides if names.fused else reversed(sides)
    return experts, outputs, inputs


def _doubled(down: tuple[int, int, int]) -> tuple[int, int, int]:
    """The sizes of `gate_up_proj` that go with those of `down_proj`."""
    experts, hidden, channels = down
    return experts, 2 * channels, hidden


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer whose weight is a view, [outputs, inputs], and so is its bias."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
