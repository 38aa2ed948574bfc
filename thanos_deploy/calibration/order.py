"""In which order the statistics of a block's layers are collected, and how many are held at once.

Those of experts are the most: each reads other tokens, so each has a Hessian of its own. They are
collected for some experts at a time. That changes no result, because what one expert's layers read
does not depend on the layers of another one.
"""

from collections.abc import Iterator, Mapping, Sequence

from thanos_deploy.model.structure import BlockStructure, Group

# What the Hessians of experts may take that are held at once, in bytes; those of one expert may
# take more.
EXPERTS_BYTES = 1 << 30

_FLOAT = 4


def turns(
    structure: BlockStructure,
    inputs: Mapping[str, int],
    *,
    true_sequential: bool,
    room: int = EXPERTS_BYTES,
) -> list[list[Group]]:
    """The groups of layers whose statistics are held at once, turn after turn.

    Args:
        structure: the block; only layers in `inputs` count.
        inputs: name of a layer, seen from the block -> how many it has.
        true_sequential: the layers of a step are pruned before those of the next one are looked
            at. If not, all statistics are those of the dense block: then experts come first, each
            with all of its layers, because nothing else in the block reads what they make.
        room: bytes for the Hessians of experts.
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
    """What the Hessians of a turn take."""
    return sum(_FLOAT * inputs[group[0]] ** 2 for group in turn)


def _parts(
    structure: BlockStructure, groups: Sequence[Group], inputs: Mapping[str, int], room: int
) -> Iterator[list[Group]]:
    """Groups in their order, those of experts cut into parts; an expert stays whole."""
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
