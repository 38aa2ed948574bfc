"""Mixture-of-experts modules rebuilt so that every matrix of an expert is a linear layer.

transformers keeps the matrices of all experts of a block in two parameters of three dimensions and
multiplies slices of them. So there is no layer to name, to prune or to hook for its input.
`separate` replaces each such module by one that computes the same with one linear layer per matrix.
The weights of these layers are views of the slices: writing to one changes the original parameter.
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

# Combines the outputs of gate and up, each [tokens, channels], into [tokens, channels].
Gate = Callable[[Tensor, Tensor], Tensor]


class Expert(nn.Module):
    """One expert: down(f(gate(x), up(x))), where f is the gate function.

    The modules `reads`, `channels` and `gives` compute nothing; they are places for hooks. They are
    not called during an export.

    Attributes:
        reads: is called with the input of gate and up. This happens for all experts before any gate
            or up layer runs, so that the statistics of all these layers can be collected before one
            of them changes.
        channels: is called with the input of down, for all experts before any down layer runs.
        gives: is called with what the expert adds to the hidden states, already multiplied by the
            weights of the router.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], names: Experts, gate: Gate) -> None:
        """Build an expert from its layers.

        Args:
            layers: maps the name of a layer to the layer.
            names: says which name is gate, up and down.
            gate: combines the outputs of gate and up.
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
        """Return the module that is called with the input of a layer as its only argument."""
        return self.channels if layer == self._names.down else self.reads

    def gated(self, states: Tensor) -> Tensor:
        """Compute the channels: [tokens, hidden size] -> [tokens, channels]."""
        gate, up = (self.get_submodule(name) for name in (self._names.gate, self._names.up))
        return self._gate(gate(states), up(states))

    def out(self, channels: Tensor) -> Tensor:
        """Apply the down layer: [tokens, channels] -> [tokens, hidden size]."""
        made: Tensor = self.get_submodule(self._names.down)(channels)
        return made


class SeparateExperts(nn.ModuleList):
    """The experts of one block."""

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Compute the weighted sum of the outputs of each token's experts.

        Args:
            states: [tokens, hidden size].
            chosen: int64[tokens, experts per token], the numbers of the experts that the router
                chose.
            weights: [tokens, experts per token], the router's weights of these experts.

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
    """Compute the same sum with shapes that do not depend on the router, for an exported graph.

    Every expert processes every token, with weight 0 if it was not chosen. The result is exact; the
    cost is that of running all experts.
    """
    total = torch.zeros_like(states)
    for number, expert in enumerate(experts):
        weight = (weights * (chosen == number)).sum(dim=1, keepdim=True)
        total = total + expert.out(expert.gated(states)) * weight
    return total


def separate(model: nn.Module, family: Family) -> None:
    """Replace the experts of every block by `SeparateExperts`, in place.

    A model of a family without experts and blocks without experts stay as they are.

    Args:
        model: the causal model, with or without storage.
        family: the row that describes the model.

    Raises:
        ModelError: a block's experts compute something else than `Expert`, or are stored
            differently.
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
    """Make the layers of one expert from views of its slice of each parameter."""
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
    """Return the gate of most experts: activation(gate) * up."""
    activation = held.get_submodule("act_fn")

    def gate(gates: Tensor, ups: Tensor) -> Tensor:
        gated: Tensor = activation(gates) * ups
        return gated

    return gate


def _interleaved(held: Any) -> Gate:
    """Return the class's own gate function, which takes gate and up channels interleaved."""
    rule, numbers = type(held)._apply_gate, {"alpha": held.alpha, "limit": held.limit}

    def gate(gates: Tensor, ups: Tensor) -> Tensor:
        gated: Tensor = rule(SimpleNamespace(**numbers), torch.stack((gates, ups), -1).flatten(-2))
        return gated

    return gate


def _require_known(held: nn.Module, names: Experts, place: str) -> None:
    """Refuse experts that are not of the kind that the row of the family describes.

    transformers marks the kind of its experts by attributes, which `use_experts_implementation`
    sets, and by `_apply_gate`, which it adds to classes that do not define one.

    Raises:
        ModelError: an attribute, the gate function, or the parameters differ.
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
    """Return the numbers of experts, outputs and inputs of a parameter with this shape."""
    experts, *sides = shape
    inputs, outputs = sides if names.fused else reversed(sides)
    return experts, outputs, inputs


def _doubled(down: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the sizes that `gate_up_proj` must have, given those of `down_proj`."""
    experts, hidden, channels = down
    return experts, 2 * channels, hidden


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a layer whose weight [outputs, inputs] and bias are the given tensors, not copies."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
