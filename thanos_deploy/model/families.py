"""Where each model family keeps its transformer blocks and their linear layers.

A family is one row of data. What differs between two models of a family is read from the model
itself: sizes from the configuration, optional parts (biases, tied heads) from the weights.
"""

from dataclasses import dataclass
from typing import Literal

from thanos_deploy.errors import ModelError

# What models call their output head.
HEAD = "lm_head"

# How the rows of the queries, keys and values are laid out: three matrices; one matrix with a
# query, a key and a value for each head in turn; one with all queries, then all keys, all values.
Layout = Literal["separate", "by head", "by part"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Where a block's attention heads are.

    Attributes:
        producers: the linear layers whose rows make queries, keys and values, in this order.
        layout: how these rows are laid out.
        consumer: the linear layer that reads all heads, each a run of its columns.
        count: entry of config.json with the number of query heads.
        kv_count: entry with the number of key-value heads; None if each query head has its own.
        free_size: the configuration states the size of a head, so the number of heads can change
            alone; otherwise it is hidden size / number of heads.
    """

    producers: tuple[str, ...]
    layout: Layout
    consumer: str
    count: str = "num_attention_heads"
    kv_count: str | None = None
    free_size: bool = False

    @property
    def module(self) -> str:
        """The attention module, seen from the block."""
        return self.consumer.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Channels:
    """Where a block's feed-forward channels are.

    Attributes:
        producers: the linear layers with one row for each channel.
        consumer: the linear layer with one column for each.
        count: entry of config.json with the number of channels.
    """

    producers: tuple[str, ...]
    consumer: str
    count: str = "intermediate_size"


@dataclass(frozen=True, slots=True)
class Family:
    """The names that pruning needs to walk one kind of model, and what can be cut out of it.

    Attributes:
        model_types: values of `model_type` in config.json that this row describes.
        blocks: dotted name of the list of transformer blocks, seen from the causal model.
        inputs: the linear layers of one block, grouped by the activation that they read and in
            the order in which the forward pass reaches them. Layers of one group share one
            calibration statistic.
        heads: the attention heads: rows of their producers go with columns of their consumer.
        channels: the same for the feed-forward network.
        transposed: the weights are stored [inputs, outputs], as GPT-2's Conv1D has them.
        stored_head: what files call the output head, where that is not what the model calls it.
    """

    model_types: tuple[str, ...]
    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    heads: Heads
    channels: Channels
    transposed: bool = False
    stored_head: str = HEAD

    @property
    def base(self) -> str:
        """Name of the base model, seen from the causal model; some checkpoints leave it out."""
        return self.blocks.partition(".")[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all linear layers of one block, seen from the block."""
        return tuple(name for group in self.inputs for name in group)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

FAMILIES = (
    Family(
        model_types=(
            *("llama", "mistral", "qwen2", "qwen3"),
            *("gemma", "gemma2", "gemma3_text"),
        ),
        blocks="model.layers",
        inputs=(
            _QKV,
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
        heads=Heads(
            _QKV, "separate", "self_attn.o_proj", kv_count="num_key_value_heads", free_size=True
        ),
        channels=Channels(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        inputs=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        heads=Heads(_QKV, "separate", "self_attn.out_proj"),
        channels=Channels(("fc1",), "fc2", count="ffn_dim"),
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        heads=Heads(("attn.c_attn",), "by part", "attn.c_proj", count="n_head"),
        channels=Channels(("mlp.c_fc",), "mlp.c_proj", count="n_inner"),
        transposed=True,
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        inputs=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        heads=Heads(("attention.query_key_value",), "by head", "attention.dense"),
        channels=Channels(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        stored_head="embed_out",
    ),
)


def family_of(model_type: str) -> Family:
    """The row that describes a model type.

    Raises:
        ModelError: no row names the model type.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ModelError(
        f"model type {model_type!r} is not supported; supported are {known}",
        fix="use a model of a supported type, or add a row to thanos_deploy/model/families.py",
    )
