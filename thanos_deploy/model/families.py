"""The table of model families: one row for each family, with every fact about it.

What differs between two models of a family is read from the model itself: sizes from the
configuration, optional parts (biases, tied heads) from the weights, and the linear layers of a
block from the block; see `structure`. `docs/develop/add-a-family.md` shows how to add a family.

The file is longer than others because it holds the whole table, and because a row is easier to read
beside the fields that it fills.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from thanos_deploy.errors import ModelError

# Name of the output head in the models of transformers.
HEAD = "lm_head"

# Placeholder for the number of an expert in the name of a linear layer.
EXPERT = "*"

# How the rows of the queries, keys and values are laid out:
#   separate  three matrices
#   by head   one matrix with a query, a key and a value for each head in turn
#   by part   one matrix with all queries, then all keys, then all values
Layout = Literal["separate", "by head", "by part"]

# A number that an attention module stores: query heads, key-value heads, query heads for each
# key-value head, or channels of all query heads together.
Width = Literal["heads", "keys", "heads per key", "channels"]

# Demands of serving programs on the sizes of some model types; `loaders.DEMANDS` explains them.
Demand = Literal[
    "another model",
    "channels are 4 x hidden size",
    "every second block has no window",
    "every sixth block has no window",
    "head size is even",
    "head size is hidden size / heads",
    "hidden size is a multiple of heads",
]


@dataclass(frozen=True, slots=True)
class Heads:
    """Where a block's attention heads are.

    Attributes:
        producers: the linear layers whose rows compute queries, keys and values, in this order.
        layout: how these rows are laid out.
        consumer: the linear layer that reads all heads; each head is a run of its columns.
        count: entry of config.json with the number of query heads.
        kv_count: entry of config.json with the number of key-value heads; None if each query head
            has its own.
        free_size: whether the configuration states the size of a head, so that the number of heads
            can change alone. Otherwise the size is hidden size / number of heads.
        kept: maps an attribute of the attention module to the number that it stores. An attribute
            that begins with "config." is an entry of the configuration that the module reads.
        fixed: why no head can be removed; empty if heads can be removed.
    """

    producers: tuple[str, ...]
    layout: Layout
    consumer: str
    count: str = "num_attention_heads"
    kv_count: str | None = None
    free_size: bool = False
    kept: Mapping[str, Width] = field(default_factory=dict)
    fixed: str = ""

    @property
    def module(self) -> str:
        """Name of the attention module, relative to the block."""
        return self.consumer.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Channels:
    """Where a block's feed-forward channels are.

    Attributes:
        producers: the linear layers with rows for each channel.
        consumer: the linear layer with one column for each channel.
        rows: rows for each channel in a producer; 2 if one matrix holds first the gate rows of all
            channels, then their up rows.
        count: entry of config.json with the number of channels.
        multiple: the number of channels divided by the hidden size, for configurations that leave
            the entry out; None if none does.
    """

    producers: tuple[str, ...]
    consumer: str
    rows: int = 1
    count: str = "intermediate_size"
    multiple: int | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """Where a block's experts are: feed-forward networks among which a router chooses per token.

    transformers keeps the matrices of all experts of a block in two parameters, `gate_up_proj` and
    `down_proj`. This project gives every matrix a layer of its own, as most files do; see
    `experts`.

    Attributes:
        module: name of the module with these parameters, relative to the block.
        gate, up, down: names of the three linear layers of an expert.
        router: name of the module whose weight has a row for each expert, relative to the block.
        count: entry of config.json with the number of experts.
        channels: entry of config.json with the number of channels of an expert.
        fused: whether files keep the matrices in the two parameters of transformers, with biases
            beside them; see `fused`.
    """

    module: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "mlp.gate"
    count: str = "num_experts"
    channels: str = "intermediate_size"
    fused: bool = False

    def producers(self, expert: object) -> tuple[str, str]:
        """Return the layers with a row for each channel.

        Args:
            expert: number of the expert, or `EXPERT`.
        """
        return f"{self.module}.{expert}.{self.gate}", f"{self.module}.{expert}.{self.up}"

    def consumer(self, expert: object) -> str:
        """Return the layer with a column for each channel; see `producers`."""
        return f"{self.module}.{expert}.{self.down}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the source code of a serving program states about some model types.

    Attributes:
        loader: name of the program in `loaders`.
        model_types: the model types for which its source code was read.
        demand: demand on the sizes of these models, beyond the demands on every model; None if
            there is none.
        source: file of the program that states the demand.
    """

    loader: str
    model_types: tuple[str, ...]
    demand: Demand | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """All that is known of one family of models.

    Attributes:
        model_types: values of `model_type` in config.json that this row describes.
        blocks: dotted name of the list of transformer blocks, relative to the causal model.
        inputs: the linear layers of a block, grouped by the activation that they read and in the
            order in which the forward pass reaches them. Layers of one group share one calibration
            statistic. A layer that a block lacks is left out, so alternatives, such as a dense
            feed-forward network and experts, are all named. `EXPERT` stands for the number of an
            expert.
        heads: the attention heads; removing one removes rows of its producers and columns of its
            consumer.
        channels: the feed-forward channels, likewise.
        experts: where a block's experts are; None for a family without experts.
        transposed: whether the weights are stored [inputs, outputs], as GPT-2's Conv1D stores them.
        renamed: maps a part of a tensor's name in the files to the part that the model has instead.
        hidden: entry of config.json with the hidden size.
        positions: entry of config.json with the length of the longest sequence, in tokens.
        gguf: maps the name of the architecture in GGUF to the model type, where the two differ.
        readings: what is known of programs that serve models of this family.
        gives: number of outputs of a block: 1 for the hidden states alone, more for a tuple that
            begins with the hidden states.
        discovered: whether this is not a row of the table but was found by a forward pass through
            one model; see `discovery`. Its heads and channels are not known.
    """

    model_types: tuple[str, ...]
    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    heads: Heads
    channels: Channels
    experts: Experts | None = None
    transposed: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    hidden: str = "hidden_size"
    positions: str = "max_position_embeddings"
    gguf: Mapping[str, str] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    gives: int = 1
    discovered: bool = False

    @property
    def base(self) -> str:
        """Name of the base model in the causal model; some checkpoints leave out this prefix."""
        return self.blocks.partition(".")[0]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LLAMA_LIKE = ("smollm3", "ministral", "granite")

_LLAMA = Family(
    model_types=(
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        *_LLAMA_LIKE,
    ),
    blocks="model.layers",
    inputs=(
        _QKV,
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    heads=Heads(
        producers=_QKV,
        layout="separate",
        consumer="self_attn.o_proj",
        kv_count="num_key_value_heads",
        free_size=True,
        kept={"num_key_value_groups": "heads per key"},
    ),
    channels=Channels(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    gguf={"gemma3": "gemma3_text"},
    readings=(
        Reading("vLLM", ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")),
        Reading(
            "vLLM",
            ("qwen2",),
            "head size is hidden size / heads",
            "vllm/model_executor/models/qwen2.py",
        ),
        Reading(
            "text-generation-inference",
            ("llama",),
            "head size is hidden size / heads",
            "custom_modeling/flash_llama_modeling.py at 0036084",
        ),
        Reading(
            "text-generation-inference",
            ("qwen3",),
            "hidden size is a multiple of heads",
            "custom_modeling/flash_qwen3_modeling.py at 78c236f",
        ),
        Reading("llama.cpp", ("qwen2", "qwen3", "gemma")),
        Reading(
            "llama.cpp", ("gemma2",), "every second block has no window", "src/llama-model.cpp"
        ),
        Reading(
            "llama.cpp", ("gemma3_text",), "every sixth block has no window", "src/llama-model.cpp"
        ),
        Reading("llama.cpp", ("llama", "mistral"), "head size is even", "conversion/llama.py"),
    ),
)

_OLMO = replace(
    _LLAMA,
    model_types=("olmo2", "olmo3"),
    heads=replace(
        _LLAMA.heads,
        fixed="the norm of its queries spans all heads, so every head depends on the others",
    ),
    gguf={},
    readings=(),
)

_GLM = replace(
    _LLAMA,
    model_types=("glm4",),
    inputs=(*_LLAMA.inputs[:2], ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    channels=Channels(("mlp.gate_up_proj",), "mlp.down_proj", rows=2),
    gguf={},
    readings=(),
)

_PHI = replace(
    _GLM,
    model_types=("phi3",),
    inputs=(("self_attn.qkv_proj",), *_GLM.inputs[1:]),
    heads=Heads(
        producers=("self_attn.qkv_proj",),
        layout="by part",
        consumer="self_attn.o_proj",
        kv_count="num_key_value_heads",
        free_size=True,
        kept={
            "num_key_value_groups": "heads per key",
            "num_key_value_heads": "keys",
            "config.num_attention_heads": "heads",
        },
    ),
)

_QWEN_EXPERTS = Experts("mlp.experts", channels="moe_intermediate_size")

_QWEN_MOE = replace(
    _LLAMA,
    model_types=("qwen3_moe",),
    # Some blocks have a dense feed-forward network.
    inputs=(
        *_LLAMA.inputs,
        _QWEN_EXPERTS.producers(EXPERT),
        (_QWEN_EXPERTS.consumer(EXPERT),),
    ),
    experts=_QWEN_EXPERTS,
    gguf={},
    readings=(),
)


def _of_experts(model_type: str, experts: Experts, **others: Any) -> Family:
    """Return a row like that of llama, with experts in the place of the feed-forward network."""
    producers, consumer = experts.producers(EXPERT), experts.consumer(EXPERT)
    return replace(
        _LLAMA,
        model_types=(model_type,),
        inputs=(*_LLAMA.inputs[:2], producers, (consumer,)),
        channels=Channels(producers, consumer),
        experts=experts,
        gguf={},
        readings=(),
        **others,
    )


_MIXTRAL = _of_experts(
    "mixtral",
    Experts("mlp.experts", gate="w1", up="w3", down="w2", count="num_local_experts"),
    renamed={".block_sparse_moe.": ".mlp."},
)

_GPT_OSS = _of_experts(
    "gpt_oss",
    Experts("mlp.experts", router="mlp.router", count="num_local_experts", fused=True),
)

FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    _OLMO,
    _GLM,
    _PHI,
    _QWEN_MOE,
    _MIXTRAL,
    _GPT_OSS,
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        inputs=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        heads=Heads(_QKV, "separate", "self_attn.out_proj", kept={"num_heads": "heads"}),
        channels=Channels(("fc1",), "fc2", count="ffn_dim"),
        readings=(
            Reading("vLLM", ("opt",)),
            Reading("llama.cpp", ("opt",), "another model", "conversion/__init__.py"),
        ),
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        inputs=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        heads=Heads(
            producers=("attn.c_attn",),
            layout="by part",
            consumer="attn.c_proj",
            count="n_head",
            kept={"num_heads": "heads", "split_size": "channels"},
        ),
        channels=Channels(("mlp.c_fc",), "mlp.c_proj", count="n_inner", multiple=4),
        transposed=True,
        hidden="n_embd",
        positions="n_positions",
        readings=(
            Reading("vLLM", ("gpt2",)),
            Reading("llama.cpp", ("gpt2",), "channels are 4 x hidden size", "conversion/gpt2.py"),
        ),
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
        renamed={"embed_out.": f"{HEAD}."},
        gguf={"gptneox": "gpt_neox"},
        readings=(Reading("vLLM", ("gpt_neox",)), Reading("llama.cpp", ("gpt_neox",))),
    ),
)


def row_of(model_type: str) -> Family | None:
    """Return the row that describes a model type; None if there is none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(model_type: str) -> Family:
    """Return the row that describes a model type.

    Raises:
        ModelError: no row names the model type.
    """
    if (family := row_of(model_type)) is not None:
        return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ModelError(
        f"model type {model_type!r} is not supported; supported are {known}",
        fix="use a model of a supported type, or add a row to thanos_deploy/model/families.py",
    )


def family_of_gguf(architecture: str) -> Family:
    """Return the row that describes the architecture named in a GGUF file.

    Raises:
        ModelError: no row describes it.
    """
    for family in FAMILIES:
        if architecture in family.gguf:
            return family
    return family_of(architecture)
