"""Find the linear layers of each block in the model itself.

The row of a family names every linear layer that a block of the family may have. Blocks of one
model may differ: one has a dense feed-forward network, the next has experts. A block with a linear
layer that the row does not name is refused, so that no layer silently stays dense.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from thanos_deploy.errors import ModelError
from thanos_deploy.model.families import EXPERT, Family

# Names, relative to the block, of linear layers that read the same input.
Group = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockStructure:
    """The linear layers of one block.

    Attributes:
        prefix: prefix of the full names of its layers, such as "model.layers.3.".
        steps: groups of layers in the order in which the forward pass reaches them. A step is one
            group, or one group for each expert; the groups of a step do not depend on each other.
        routed: layers of experts, which see only the tokens that the router sends to them.
    """

    prefix: str
    steps: tuple[tuple[Group, ...], ...]
    routed: frozenset[str] = frozenset()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of all steps."""
        return tuple(group for step in self.steps for group in step)

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all layers, relative to the block."""
        return tuple(name for group in self.groups for name in group)

    @property
    def full_names(self) -> tuple[str, ...]:
        """Names of all layers, relative to the model."""
        return tuple(self.prefix + name for name in self.linears)


def blocks_of(model: nn.Module, family: Family) -> nn.ModuleList:
    """Return the transformer blocks of a causal model.

    Raises:
        ModelError: the blocks are not where the row of the family says.
    """
    try:
        found = model.get_submodule(family.blocks)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__}: its blocks are not in {family.blocks}, as the row of "
            f"{family.model_types[0]} in thanos_deploy/model/families.py says",
            fix="correct `blocks` in that row",
        )
    return found


def structures_of(model: nn.Module, family: Family) -> tuple[BlockStructure, ...]:
    """Return the linear layers of every block.

    Args:
        model: the causal model, after `experts.separate`; its weights are not read.
        family: the row that describes the model.

    Raises:
        ModelError: a block has a linear layer that the row does not name, a parameter with several
            matrices, or none of the layers that the row names.
    """
    return tuple(
        _block(block, f"{family.blocks}.{index}.", family)
        for index, block in enumerate(blocks_of(model, family))
    )


def _block(block: nn.Module, prefix: str, family: Family) -> BlockStructure:
    found = [
        name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    steps = tuple(step for names in family.inputs if (step := tuple(_groups(names, found))))
    known = BlockStructure(prefix, steps)
    where = f"the row of {family.model_types[0]} in thanos_deploy/model/families.py"
    if unknown := [name for name in found if name not in known.linears]:
        raise ModelError(
            f"{prefix.rstrip('.')}: the block has linear layers that {where} does not "
            f"name: {', '.join(unknown)}",
            fix="use a model whose blocks the row describes, or add them to its `inputs`",
        )
    if stacked := [
        f"{name} {list(one.shape)}"
        for name, one in block.named_parameters()
        if one.ndim > 2 and not isinstance(block.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    ]:
        raise ModelError(
            f"{prefix.rstrip('.')}: the block has parameters with several matrices, which "
            f"{where} does not describe: {', '.join(stacked)}",
            fix="use a model without experts, or describe them in `experts` of that row",
        )
    if not steps:
        raise ModelError(
            f"{prefix.rstrip('.')}: the block has none of the linear layers that {where} names",
            fix="correct `inputs` in that row",
        )
    routed = {
        name for names in family.inputs if EXPERT in names[0] for name in _matches(names, found)
    }
    return BlockStructure(prefix, steps, frozenset(routed))


def _groups(names: Iterable[str], found: Iterable[str]) -> Iterator[Group]:
    """Yield the layers of a row's group that a block has; one group per expert for `EXPERT`."""
    names = tuple(names)
    if EXPERT not in names[0]:
        if group := tuple(name for name in names if name in found):
            yield group
        return
    numbers = dict.fromkeys(
        match[1] for one in found for name in names if (match := _expert(name).fullmatch(one))
    )
    for number in numbers:
        yield tuple(one for name in names if (one := name.replace(EXPERT, number)) in found)


def _matches(names: Iterable[str], found: Iterable[str]) -> Iterator[str]:
    return (name for group in _groups(names, found) for name in group)


def _expert(name: str) -> re.Pattern[str]:
    before, after = name.split(EXPERT)
    return re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
