"""The graph of a causal model: traced by PyTorch's exporter, then simplified."""

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

# The opset that ONNX Runtime, TensorRT, TensorRT-RTX and OpenVINO all take.
OPSET = 20

# Prefix of weight names in the exporter's graph: the attribute of `WithFlatCache` for the model.
_ATTRIBUTE = "model."


class WithFlatCache(nn.Module):
    """A causal model whose cache goes in and out as a flat list: key 0, value 0, key 1, ..."""

    def __init__(self, model: PreTrainedModel, *, logits: str = "all") -> None:
        """Wrap a model.

        Args:
            model: the model.
            logits: "all", or "last" for only the logits after the last token.
        """
        super().__init__()
        self.model = model
        self._keep = 1 if logits == "last" else 0  # transformers: 0 keeps all

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the logits, then keys and values of every block, past tokens included."""
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
    """Return a cache of zeros, with the heads and head sizes that each block really has.

    Args:
        model: the model, which is run once to see them.
        batch: number of rows.
        past: number of tokens in the cache.
    """
    with torch.inference_mode():
        # DynamicCache without the configuration cuts no block's cache to its sliding window.
        seen = model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache())
    return [
        torch.zeros(batch, tensor.shape[1], past, tensor.shape[3], dtype=tensor.dtype)
        for tensor in _flat(seen.past_key_values)
    ]


# The graphs that were traced last, without weights, by `_structure`. Two, because a dense and a
# pruned model can be exported in turns for two purposes.
_KEPT = 2
_traced: dict[str, ir.Model] = {}


def trace(model: PreTrainedModel, *, logits: str, plan: attention.Plan | None = None) -> ir.Model:
    """Trace a model, or reuse a recent trace of an equal structure with the model's own weights.

    A trace depends on the configuration and the shapes of the weights, never on their values. So a
    pruned model gets the same graph as the dense one, with its own weights. This matters because
    tracing takes longer than everything else in an export.

    Args:
        model: the model.
        logits: as for `WithFlatCache`.
        plan: the plan for a graph with ONNX Runtime's attention; None for a neutral graph.

    Returns:
        The exporter's raw graph, with the inputs and outputs that `exporters.onnx.graph` describes.

    Raises:
        ModelError: PyTorch's exporter cannot trace the model.
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
    """Return everything that a trace depends on, as text."""
    # The rest of a plan follows from the configuration.
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
    """Parameters and buffers by name; a tied tensor under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _initializers(graph: ir.Model, model: PreTrainedModel) -> Iterator[tuple[ir.Value, Tensor]]:
    """The initializers that are parameters or buffers of the model, each with its tensor."""
    tensors = _tensors(model)
    for name, value in graph.graph.initializers.items():
        tensor = tensors.get(name.removeprefix(_ATTRIBUTE))
        if tensor is not None:
            yield value, tensor


def _without_weights(graph: ir.Model, model: PreTrainedModel) -> ir.Model:
    """Drop the weights of a graph, and the exporter's notes on the origin of nodes, in place."""
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
    """Copy a graph without weights and give it those of a model; the tensors are shared."""
    graph = bare.clone()
    for value, tensor in _initializers(graph, model):
        value.const_value = ir.tensor(tensor.detach(), name=value.name)
    return graph


def _whole(model: PreTrainedModel, logits: str, plan: attention.Plan | None) -> ir.Model:
    """Trace the raw graph of a model; where all blocks are alike, only a few are traced."""
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
    # The exporter treats sizes 0 and 1 as constants, so every dynamic size here is at least 2.
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
        # Eager attention gives fewer nodes than the exporter's decomposition of fused attention,
        # which transposes the keys by way of their shape, scales them, and looks for NaN after the
        # softmax.
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
        # The exporter warns about its own internals; the graph is compared with the model later.
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
            # Past and present may be one buffer, so the length is not past + sequence.
            value.shape = ir.Shape([*value.shape[:2], "present", value.shape[3]])
    return program.model


@contextmanager
def _quickly() -> Iterator[None]:
    """Within the `with` statement, PyTorch traces in two thirds of the usual time.

    PyTorch's fake tensor cache is off: it looks up every operation by its sizes, which are symbolic
    here, and comparing them takes longer than computing the cached result. The garbage collector is
    off: it would scan the many small objects of a trace, and all imported modules, again and again.
    """
    from torch._dynamo import config as dynamo_config  # a slow import, needed for tracing only

    collecting = gc.isenabled()
    gc.disable()
    try:
        with dynamo_config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        if collecting:
            gc.enable()


def simplify(graph: ir.Model, model: PreTrainedModel) -> None:
    """Simplify the exporter's raw graph in place, and keep the names of the weights.

    before: weight "model.lm.layers.0.fc1.weight" [out, in] -> Transpose -> MatMul; thousands of
            constants, casts and repeated shape computations
            weight "model.lm.layers.0.fc2.weight" [out, in] -> Gemm
    after:  weight "lm.layers.0.fc1.weight" [in, out] -> MatMul
            weight "lm.layers.0.fc2.weight" [in, out] -> MatMul -> Add
            and the rewrites of `exporters.onnx.simplify`

    The exporter's own optimiser takes as long as the export itself (mostly rules that match nothing
    here), loses the names, and ends with a graph of the same size and speed.
    """
    # A tied parameter has several names, and the exporter may use another one than the model.
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
        # A tied output head reads the transposed embedding: folding would store it twice.
        if weight is None or weight.name not in weights or len(weight.uses()) != 1:
            continue
        _transpose(weight, node.attributes["perm"].as_ints())
        ir.convenience.replace_all_uses_with(node.outputs[0], weight)
        graph.graph.remove(node, safe=True)
    fold_constants(
        graph,
        # Gemma adds 1 to the weights of its norms; folded, they would no longer be weights of the
        # model.
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
            # Messages of engine builders name nodes, so a node gets the name of its layer.
            node.name = weight.name.removesuffix(".weight")


def _split_gemm(graph: ir.Graph, gemm: ir.Node) -> None:
    """Turn Gemm(x, W, b) into Add(MatMul(x, W), b), so all linear layers look alike.

    The bias b is optional. A Gemm that is no linear layer is left as it is.
    """
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
