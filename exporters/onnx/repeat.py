"""Build the graph of a model with many equal blocks from the trace of its first three.

Tracing a block takes PyTorch some two seconds of processor time, so a model of 30 blocks takes a
minute, and one of 80 blocks three. Where all blocks are alike in everything but their weights, the
trace of three blocks is enough. The first may also hold nodes that all blocks share, such as the
computation of sizes. The third differs from the second only in its weights, its cache and the
hidden states that enter it. Each further block is a copy of the third with its own weights, cache
and hidden states.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from torch import nn
from transformers import PreTrainedModel

from thanos_deploy.model.families import family_of, row_of
from thanos_deploy.model.structure import blocks_of

# How many blocks are traced.
TRACED = 3

# Metadata key under which the exporter records the modules that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"


class NotRepeatingError(Exception):
    """The second and the third block of a trace differ in more than weights, cache and input."""


def blocks_are_alike(model: PreTrainedModel) -> bool:
    """Whether all blocks are known to have one structure, and there are more than `TRACED`."""
    if row_of(model.config.model_type) is None:
        return False
    blocks = _blocks(model)
    kinds = {_kind(block) for block in blocks}
    layer_types = getattr(model.config, "layer_types", None) or ()
    return len(blocks) > TRACED and len(kinds) == 1 and len(set(layer_types)) <= 1


@contextmanager
def shortened(model: PreTrainedModel) -> Iterator[None]:
    """Within the `with` statement, the model has its first `TRACED` blocks only."""
    family = family_of(model.config.model_type)
    owner, _, attribute = family.blocks.rpartition(".")
    blocks, count = _blocks(model), model.config.num_hidden_layers
    setattr(model.get_submodule(owner), attribute, nn.ModuleList(list(blocks)[:TRACED]))
    model.config.num_hidden_layers = TRACED
    try:
        yield
    finally:
        setattr(model.get_submodule(owner), attribute, blocks)
        model.config.num_hidden_layers = count


def lengthen(model: ir.Model, blocks: str, count: int) -> None:
    """Add the missing blocks to the raw graph of a shortened model, without their weights.

    Args:
        model: the exporter's graph of the shortened model; changed in place.
        blocks: name of the list of blocks in the exporter's scopes.
        count: number of blocks of the whole model.

    Raises:
        NotRepeatingError: the second and the third block do not follow one pattern.
    """
    # Otherwise the cache reaches its block through an Identity node.
    common_passes.IdentityEliminationPass()(model)
    graph = model.graph
    second, third = (_nodes_of(graph, f"{blocks}.{index}") for index in (TRACED - 2, TRACED - 1))
    _require_alike(second, third, blocks)
    own = [
        value
        for value in (*graph.inputs, *graph.initializers.values())
        if _is_of_third(value, blocks)
    ]
    made = [value for value in graph.outputs if _is_of_third(value, blocks)]
    inside, results = {id(node) for node in third}, _results(third)
    readers = [
        (*use, place)
        for place, value in enumerate(results)
        for use in value.uses()
        if id(use.node) not in inside
    ]
    after = third[-1]
    for index in range(TRACED, count):
        # Maps the id of a value that the third block reads to the value that the copy reads.
        instead = dict(zip(map(id, _results(second)), results, strict=True))
        for value in own:
            added = _like(value, _renumbered(value, blocks, index))
            instead[id(value)] = added
            if value.is_initializer():
                graph.initializers[str(added.name)] = added
            else:
                graph.inputs.append(added)
        results = []
        for node in third:
            outputs = [_like(value, f"{value.name}.{index}") for value in node.outputs]
            copy = ir.Node(
                node.domain,
                node.op_type,
                [value and instead.get(id(value), value) for value in node.inputs],
                node.attributes.values(),
                overload=node.overload,
                outputs=outputs,
                version=node.version,
                name=f"{node.name}.{index}",
            )
            instead.update(zip(map(id, node.outputs), outputs, strict=True))
            graph.insert_after(after, copy)
            after = copy
            results += outputs
        for value in made:
            instead[id(value)].name = _renumbered(value, blocks, index)
            graph.outputs.append(instead[id(value)])
    for node, column, place in readers:
        node.replace_input_with(column, results[place])


def _require_alike(second: Sequence[ir.Node], third: Sequence[ir.Node], blocks: str) -> None:
    """Require that the third block reads the same values as the second, one block further on.

    Raises:
        NotRepeatingError: the blocks differ.
    """
    made = {id(value): place for place, value in enumerate(_results(second))}
    further = {id(value): place for place, value in enumerate(_results(third))}

    def follows(one: ir.Value | None, other: ir.Value | None) -> bool:
        if one is other:
            return one is None or id(one) not in made
        if one is None or other is None:
            return False
        if id(other) in further:
            return made.get(id(one)) == further[id(other)]
        # The hidden states: the second block reads those that the first has made.
        if id(other) in made:
            return id(one) not in made and one.producer() is not None
        return other.name == _renumbered(one, blocks, TRACED - 1)

    for one, other in zip(second, third, strict=False):
        if one.op_identifier() != other.op_identifier() or not all(
            map(follows, one.inputs, other.inputs)
        ):
            raise NotRepeatingError(f"{one.name} and {other.name} differ")
    if len(second) != len(third) or not third:
        raise NotRepeatingError(f"blocks have {len(second)} and {len(third)} nodes")


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    return blocks_of(model, family_of(model.config.model_type))


def _kind(block: nn.Module) -> str:
    """Return everything that a trace of a block depends on except its number, as text."""
    modules = [
        (
            name,
            type(module),
            sorted(
                (key, repr(value))
                for key, value in vars(module).items()
                if key != "layer_idx" and isinstance(value, bool | int | float | str | None)
            ),
        )
        for name, module in block.named_modules()
    ]
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
    ]
    return repr((modules, tensors))


def _nodes_of(graph: ir.Graph, block: str) -> list[ir.Node]:
    """The nodes of one block, in graph order."""
    return [
        node for node in graph if block in ast.literal_eval(node.metadata_props.get(_SCOPES, "()"))
    ]


def _results(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _is_of_third(value: ir.Value, blocks: str) -> bool:
    return value.name != _renumbered(value, blocks, TRACED - 2) and (
        value.name == _renumbered(value, blocks, TRACED - 1)
    )


def _renumbered(value: ir.Value, blocks: str, index: int) -> str:
    """The name of the same weight or cache tensor in another block; other names are unchanged."""
    return re.sub(
        rf"^({re.escape(blocks)}|past_key_values|present)\.\d+\.",
        rf"\g<1>.{index}.",
        str(value.name),
    )


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)
