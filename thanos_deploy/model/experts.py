"""Experts as modules, each of whose linear layers is one, as files keep them.

transformers keeps the matrices of all experts of a block in two parameters of three dimensions and
multiplies slices of them, so that there is no layer to name, to prune or to ask what it read.
`separate` puts a module in the place of each such module that computes the same with one linear
layer for every matrix. Their weights are views of the slices: writing to one changes the parameter.
"""

import torch
from torch import Tensor, nn

from thanos_deploy.errors import ModelError
from thanos_deploy.model.families import Experts, Family
from thanos_deploy.model.structure import blocks_of

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


class Expert(nn.Module):
    """One expert: down(activation(gate(x)) * up(x)).

    `reads` and `channels` compute nothing. They are called with what gate and up read, and with
    what down reads, of all experts before any layer of the step multiplies: so all statistics of a
    step can be had before one of its layers changes.
    """

    def __init__(
        self, names: Experts, gate_up: Tensor, down: Tensor, activation: nn.Module
    ) -> None:
        """Make layers of views.

        Args:
            names: of the layers.
            gate_up: [2 x channels, hidden size].
            down: [hidden size, channels].
            activation: of the gate.
        """
        super().__init__()
        gate, up = gate_up.chunk(2)
        for name, weight in ((names.gate, gate), (names.up, up), (names.down, down)):
            self.add_module(name, _linear(weight))
        self._names = names
        self.activation = activation
        self.reads = nn.Identity()
        self.channels = nn.Identity()

    def entrance(self, layer: str) -> nn.Module:
        """What is called with the input of a layer, as its one argument."""
        return self.channels if layer == self._names.down else self.reads

    def gated(self, states: Tensor) -> Tensor:
        """[tokens, hidden size] -> [tokens, channels]."""
        gate, up = (self.get_submodule(name) for name in (self._names.gate, self._names.up))
        gated: Tensor = self.activation(gate(states)) * up(states)
        return gated

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
            made = expert.out(channels) * weights[tokens, place, None]
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
    _require_known(held, place)
    gate_up, down = held.get_parameter(_GATE_UP), held.get_parameter(_DOWN)
    activation = held.get_submodule("act_fn")
    return SeparateExperts(
        Expert(names, rows, columns, activation)
        for rows, columns in zip(gate_up.detach(), down.detach(), strict=True)
    )


def _require_known(held: nn.Module, place: str) -> None:
    """Refuse experts of another kind.

    The library says of what kind its experts are by attributes, which `use_experts_implementation`
    sets, and by `_apply_gate`, which it adds to classes that have none of their own.

    Raises:
        ModelError: they are.
    """
    shapes = {name: tuple(one.shape) for name, one in held.named_parameters()}
    kinds = {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": False,
        "is_concatenated": True,
    }
    odd = [
        f"{kind} is {seen}"
        for kind, wanted in kinds.items()
        if (seen := getattr(held, kind, wanted)) is not wanted
    ]
    gate = getattr(type(held), "_apply_gate", None)
    if gate is not None and gate.__module__ == type(held).__module__:
        odd.append("its gate is of its own")
    if set(shapes) != {_GATE_UP, _DOWN}:
        odd.append(f"its parameters are {shapes}")
    elif not (
        len(shapes[_GATE_UP]) == len(shapes[_DOWN]) == 3
        and shapes[_GATE_UP] == (shapes[_DOWN][0], 2 * shapes[_DOWN][2], shapes[_DOWN][1])
    ):
        odd.append(f"its parameters have the shapes {shapes}")
    if not isinstance(getattr(held, "act_fn", None), nn.Module):
        odd.append("it has no activation `act_fn`")
    if odd:
        raise ModelError(
            f"{place}: {type(held).__name__} keeps or computes its experts in a way that is not "
            f"known: {'; '.join(odd)}",
            fix="use a model of a supported type",
        )


def _linear(weight: Tensor) -> nn.Linear:
    """A layer whose weight is a view, [outputs, inputs]."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
