"""The order in which the statistics of a block's layers are collected, to bound their memory.

Most of that memory is for experts: each expert reads different tokens, so each has its own Hessian.
Statistics are therefore collected for a few experts at a time. That changes no result, because the
inputs of one expert's layers do not depend on the layers of another.
"""

from collections.abc import Iterator, Mapping, Sequence

from thanos_deploy.model.structure import BlockStructure, Group

# Bytes that the experts' Hessians may take at one time; a single expert's may exceed it.
EXPERTS_BYTES = 1 << 30

_FLOAT = 4


def turns(
    structure: BlockStructure,
    inputs: Mapping[str, int],
    *,
    true_sequential: bool,
    room: int = EXPERTS_BYTES,
) -> list[list[Group]]:
    """Divide the groups of layers into turns; the statistics of one turn are held at a time.

    Args:
        structure: the block; layers that are not in `inputs` are left out.
        inputs: maps the name of a layer, relative to the block, to its number of input features.
        true_sequential: whether the layers of one step are pruned before the statistics of the
            next step are collected. If not, all statistics are those of the dense block. Experts
            come first then, each with all of its layers, because no other layer of the block reads
            their output.
        room: bytes for the Hessians of experts.

    Returns:
        the turns, in order: the groups of each.
    """
    steps = [
        [names for group in step if (names := tuple(name for name in group if name in inputs))]
        for step in structure.steps
    ]
    if true_sequential:
        found = [part for step in steps for part in _parts(structure, step, inputs, room)]
    else:
        routed = [group for step in steps for group in step if group[0] in structure.routed]
        others = [group for step in steps for group in step if group[0] not in structure.routed]
        parts = list(_parts(structure, routed, inputs, room))
        found = [*parts[:-1], others + parts[-1]] if parts else [others]
    return [turn for turn in found if turn]


def hessian_bytes(turn: Sequence[Group], inputs: Mapping[str, int]) -> int:
    """Bytes of the Hessians of a turn, one for each group of layers."""
    return sum(_FLOAT * inputs[group[0]] ** 2 for group in turn)


def _parts(
    structure: BlockStructure, groups: Sequence[Group], inputs: Mapping[str, int], room: int
) -> Iterator[list[Group]]:
    """Divide groups into parts whose Hessians fit into `room`; an expert is never divided."""
    experts: dict[str, list[Group]] = {}
    for group in groups:
        routed = group[0] in structure.routed
        experts.setdefault(group[0].rpartition(".")[0] if routed else "", []).append(group)
    parts: list[list[Group]] = [[]]
    for own in experts.values():
        if parts[-1] and hessian_bytes([*parts[-1], *own], inputs) > room:
            parts.append([])
        parts[-1].extend(own)
    for part in parts:
        yield [group for group in groups if group in part]
