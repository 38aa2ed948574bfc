"""The graph of a causal model: traced by PyTorch's exporter, then made small."""

import gc
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from exporters.onnx import attention, repeat, rotary
from exporters.onnx import simplify as _rewrites
from thanos_deploy.errors import ModelError, boundary
from thanos_deploy.model.families import family_of

logger = logging.getLogger(__name__)

# What ONNX Runtime, TensorRT, TensorRT-RTX and OpenVINO all take.
OPSET = 20

# What the exporter puts before the names of a model's weights: the attribute of `WithFlatCache`.
_ATTRIBUTE = "model."


class WithFlatCache(nn.Module):
    """A causal model whose cache goes in and out as a flat list: key 0, value 0, key 1, ..."""

    def __init__(self, model: PreTrainedModel, *, logits: str = "all") -> None:
        """Wrap a model.

        Args:
            model: the model.
            logits: "all", or "last" for those after the last token only.
        """
        super().__init__()
        self.model = model
        self._keep = 1 if logits == "last" else 0  # transformers: 0 keeps all

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """The logits, then keys and values of every block, those of the past included."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
            logits_to_keep=self._keep,
        )
        return (output.logits, *_flat(output.past_key_values))


def _flat(cache: DynamicCache) -> list[Tensor]:
    return [tensor for keys, values, *_ in cache for tensor in (keys, values)]


def empty_cache(model: PreTrainedModel, batch: int, past: int) -> list[Tensor]:
    """A cache of zeros whose heads and dims are those that each block really has."""
    with torch.inference_mode():
        # Without the configuration no block's cache is cut to its window: every length is `past`.
        seen = model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache())
    return [
        torch.zeros(batch, tensor.shape[1], past, tensor.shape[3], dtype=tensor.dtype)
        for tensor in _flat(seen.past_key_values)
    ]


# The graphs that were traced last, by what they depend on, without weights. Two, because a dense
# and a pruned model can be exported in turns for two purposes.
_KEPT = 2
_traced: dict[str, ir.Model] = {}


def trace(model: PreTrainedModel, *, logits: str, plan: attention.Plan | None = None) -> ir.Model:
    """The exporter's raw graph, with the inputs and outputs that `exporters.onnx` describes.

    A trace sees the configuration and the shapes of the weights, and never their values. So a model
    that differs from one of the last in values only, as a pruned one does from the dense one, gets
    the same graph with its own weights; a trace takes longer than all else in an export.

    Args:
        model: the model.
        logits: as for `WithFlatCache`.
        plan: for a graph with ONNX Runtime's attention; None for a neutral one.
    """
    key = _structure(model, logits, plan)
    if key in _traced:
        bare = _traced.pop(key)
    else:
        bare = _without_weights(_whole(model, logits, plan), model)
        while len(_traced) >= _KEPT:
            del _traced[next(iter(_traced))]
    _traced[key] = bare  # the last used comes last
    return _with_weights(bare, model)


def _structure(model: PreTrainedModel, logits: str, plan: attention.Plan | None = None) -> str:
    """All that a trace depends on."""
    # What else a plan holds follows from the configuration.
    positions = plan and [len(cosines) for cosines, _ in plan.tables]
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    owners: dict[int, str] = {}
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype, owners.setdefault(id(tensor), name))
        for name, tensor in _tensors(model).items()
    ]
    return repr((type(model), logits, plan is None, positions, config, tensors))


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _initializers(graph: ir.Model, model: PreTrainedModel) -> Iterator[tuple[ir.Value, Tensor]]:
    """The initializers that are parameters or buffers of the model, and not constants of code."""
    tensors = _tensors(model)
    for name, value in graph.graph.initializers.items():
        tensor = tensors.get(name.removeprefix(_ATTRIBUTE))
        if tensor is not None:
            yield value, tensor


def _without_weights(graph: ir.Model, model: PreTrainedModel) -> ir.Model:
    """Let go of the weights, and of what the exporter notes of where nodes come from."""
    for value, _ in _initializers(graph, model):
        value.const_value = None
    for value in graph.graph.initializers.values():
        value.meta.clear()
    for node in graph.graph:
        node.meta.clear()
        for value in node.outputs:
            value.meta.clear()
    common_passes.ClearMetadataAndDocStringPass()(graph)
    return graph


def _with_weights(bare: ir.Model, model: PreTrainedModel) -> ir.Model:
    """A copy of a graph without weights that has those of a model, not copied."""
    graph = bare.clone()
    for value, tensor in _initializers(graph, model):
        value.const_value = ir.tensor(tensor.detach(), name=value.name)
    return graph


def _whole(model: PreTrainedModel, logits: str, plan: attention.Plan | None) -> ir.Model:
    """The raw graph of a model; of blocks that are all alike, only a few are traced."""
    if not repeat.blocks_are_alike(model):
        return _trace(model, logits, plan)
    with repeat.shortened(model):
        graph = _trace(model, logits, plan)
    blocks = f"{_ATTRIBUTE}{family_of(model.config.model_type).blocks}"
    try:
        repeat.lengthen(graph, blocks, model.config.num_hidden_layers)
    except repeat.NotRepeatingError as error:
        logger.info("every block is traced: %s", error)
        return _trace(model, logits, plan)
    return graph


def _trace(model: PreTrainedModel, logits: str, plan: attention.Plan | None = None) -> ir.Model:
    # 0 and 1 would be taken for constants, so every dynamic size of the example is at least 2.
    batch, past, sequence = 2, 5, 3
    seen = empty_cache(model, batch, past)
    example = (
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.ones(batch, past + sequence, dtype=torch.long),
        torch.arange(past, past + sequence).expand(batch, sequence),
        seen,
    )
    cache = [f"{layer}.{part}" for layer in range(len(seen) // 2) for part in ("key", "value")]
    scaling = rotary.without_dynamic_scaling(model)
    wrapped: nn.Module
    if plan is None:
        # Step by step, attention is fewer nodes than the exporter's own decomposition of it, which
        # turns the keys by way of their shape, scales them, and looks for NaN after the softmax.
        implemented = attention.implemented(model, "eager")
        wrapped = WithFlatCache(model, logits=logits)
    else:
        implemented = attention.implemented(model, attention.NAME)
        wrapped = attention.WithCacheInPlace(model, plan, logits=logits)
    untraceable = boundary(
        ModelError,
        f"{model.config.model_type}: PyTorch's exporter cannot trace this model, so no "
        "ONNX graph can be made",
        fix="run the pruned model with transformers: the folder `model` in the bundle is an "
        "ordinary Hugging Face checkpoint",
    )
    with untraceable, scaling, implemented, _quickly(), warnings.catch_warnings():
        # The exporter warns about its own internals; the result is compared with the model below.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            wrapped.eval(),
            example,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            verbose=False,
            dynamic_shapes={
                "input_ids": {0: "batch", 1: "sequence"},
                "attention_mask": {0: "batch", 1: "total"},
                "position_ids": {0: "batch", 1: "sequence"},
                "past": [{0: "batch", 2: "past"}] * len(seen),
            },
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{name}" for name in cache),
            ],
            output_names=["logits", *(f"present.{name}" for name in cache)],
        )
    assert program is not None
    if plan is not None:
        for value in program.model.graph.outputs[1:]:
            assert value.shape is not None
            # Not past and sequence together, where past and present are one buffer.
            value.shape = ir.Shape([*value.shape[:2], "present", value.shape[3]])
    return program.model


@contextmanager
def _quickly() -> Iterator[None]:
    """Within the `with` statement PyTorch traces in two thirds of the time.

    It looks every operation up in a cache, by sizes that are formulas here: their comparison takes
    longer than what is looked up. And the many small objects of a trace are looked through for
    garbage again and again, together with all that was imported.
    """
    from torch._dynamo import config as dynamo_config  # takes long, and not everybody traces

    collecting = gc.isenabled()
    gc.disable()
    try:
        with dynamo_config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        if collecting:
            gc.enable()


def simplify(graph: ir.Model, model: PreTrainedModel) -> None:
    """Make the exporter's raw graph small, and keep the names of the weights.

    before: weight "model.lm.layers.0.fc1.weight" [out, in] -> Transpose -> MatMul; thousands of
            constants, casts and repeated shape computations
            weight "model.lm.layers.0.fc2.weight" [out, in] -> Gemm
    after:  weight "lm.layers.0.fc1.weight" [in, out] -> MatMul
            weight "lm.layers.0.fc2.weight" [in, out] -> MatMul -> Add
            and what `simplify` describes

    The exporter's own optimiser takes as long as the export itself (mostly rules that match nothing
    here), loses the names, and ends with a graph of the same size and speed.
    """
    # The exporter calls tied parameters by one of their names, and not by that of the model.
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    own_names = {
        name: owners[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    names = set(owners.values())
    weights = graph.graph.initializers
    for value in list(weights.values()):
        assert value.name is not None
        name = value.name.removeprefix(_ATTRIBUTE)
        value.name = own_names.get(name, name)
    for node in list(graph.graph):
        if node.op_type == "Gemm":
            _split_gemm(graph.graph, node)
    for node in list(graph.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        # A tied output head is the embedding transposed: folding it would store it twice.
        if weight is None or weight.name not in weights or len(weight.uses()) != 1:
            continue
        _transpose(weight, node.attributes["perm"].as_ints())
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.graph.remove(node, safe=True)
    fold_constants(
        graph,
        # Gemma adds 1 to the weights of its norms; folded, they would be no weights of the model.
        should_fold=lambda node: (
            False
            if any(value is not None and value.name in names for value in node.inputs)
            else None
        ),
    )
    common_passes.RemoveUnusedNodesPass()(graph)
    _rewrites.apply(graph)
    for simplify in (
        common_passes.RemoveUnusedNodesPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
        # Nodes remember the source lines that they come from, with the paths of this machine.
        common_passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(graph)
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.name in names:
            # Whoever builds an engine speaks of nodes; let them be called as the model calls them.
            node.name = weight.name.removesuffix(".weight")


def _split_gemm(graph: ir.Graph, gemm: ir.Node) -> None:
    """One form for all linear layers: Gemm(x, W, b) becomes Add(MatMul(x, W), b); b is optional."""
    x, weight, *bias = gemm.inputs
    assert weight is not None
    alpha, beta, flipped = (gemm.attributes.get(key) for key in ("alpha", "beta", "transA"))
    scaled = any(factor is not None and factor.as_float() != 1 for factor in (alpha, beta))
    if scaled or (flipped is not None and flipped.as_int()) or len(weight.uses()) != 1:
        return  # no linear layer
    turned = gemm.attributes.get("transB")
    if turned is not None and turned.as_int():
        _transpose(weight, (1, 0))
    nodes = [ir.node("MatMul", [x, weight], name=gemm.name)]
    nodes += (ir.node("Add", [nodes[0].outputs[0], value]) for value in bias)
    total = nodes[-1].outputs[0]
    total.shape, total.type = gemm.outputs[0].shape, gemm.outputs[0].type
    graph.insert_before(gemm, nodes)
    ir.convenience.replace_all_uses_with(gemm.outputs[0], total)
    graph.remove(gemm, safe=True)


def _transpose(weight: ir.Value, axes: Sequence[int]) -> None:
    assert weight.const_value is not None
    folded = ir.Tensor(weight.const_value.numpy().transpose(axes), name=weight.name)
    weight.const_value = folded
    weight.shape = folded.shape
