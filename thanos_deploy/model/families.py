"""What is known of each model family: a family is one row, and every fact about it is in the row.

What differs between two models of a family is read from the model itself: sizes from the
configuration, optional parts (biases, tied heads) from the weights, and which linear layers a block
has from the block; see `structure`. `docs/develop/add-a-family.md` adds a family.

The file is longer than others, because the table is, and because a row is read beside the fields
that it fills.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from thanos_deploy.errors import ModelError

# What models call their output head.
HEAD = "lm_head"

# Stands for the number of an expert in the name of a linear layer.
EXPERT = "*"

# How the rows of the queries, keys and values are laid out: three matrices; one matrix with a
# query, a key and a value for each head in turn; one with all queries, then all keys, all values.
Layout = Literal["separate", "by head", "by part"]

# What an attention module keeps of its widths: the number of query heads; of key-value heads; query
# heads for each of these; channels of all query heads.
Width = Literal["heads", "keys", "heads per key", "channels"]

# What programs that serve models demand of the sizes of some; `loaders` has the words.
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
        producers: the linear layers whose rows make queries, keys and values, in this order.
        layout: how these rows are laid out.
        consumer: the linear layer that reads all heads, each a run of its columns.
        count: entry of config.json with the number of query heads.
        kv_count: entry with the number of key-value heads; None if each query head has its own.
        free_size: the configuration states the size of a head, so the number of heads can change
            alone; otherwise it is hidden size / number of heads.
        kept: attribute of the attention module -> the width that the module keeps there. With
            "config." in front, an entry of the configuration that the module looks at.
        fixed: why no head can go; empty if heads can.
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
        """The attention module, seen from the block."""
        return self.consumer.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Channels:
    """Where a block's feed-forward channels are.

    Attributes:
        producers: the linear layers with rows for each channel.
        consumer: the linear layer with one column for each.
        rows: of each channel in a producer: 2 where one matrix has first the gates of all channels,
            then what they gate.
        count: entry of config.json with the number of channels.
        multiple: the number as a multiple of the hidden size where the configuration leaves it
            out; None if it never does.
    """

    producers: tuple[str, ...]
    consumer: str
    rows: int = 1
    count: str = "intermediate_size"
    multiple: int | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """Feed-forward networks among which a router chooses for each token.

    The library keeps the matrices of all experts of a block in two parameters, `gate_up_proj` and
    `down_proj`. This project keeps every matrix by itself, as most files do; see `experts`.

    Attributes:
        module: the module with these parameters, seen from the block.
        gate, up, down: what the three linear layers of an expert are called.
        router: the module whose weight has a row for each expert, seen from the block.
        count: entry of config.json with the number of experts.
        channels: entry with the channels of an expert.
        fused: files keep the matrices as the library does, and biases beside them; see `fused`.
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
        """The layers of an expert, by its number or `EXPERT`, with a row for each channel."""
        return f"{self.module}.{expert}.{self.gate}", f"{self.module}.{expert}.{self.up}"

    def consumer(self, expert: object) -> str:
        """The layer with a column for each channel."""
        return f"{self.module}.{expert}.{self.down}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the source of a program that serves models states about some model types.

    Attributes:
        loader: the name of the program in `loaders`.
        model_types: those for which its source was read.
        demand: what it demands of their sizes, beyond what it demands of every model; None for
            nothing.
        source: the file of the program that states the demand.
    """

    loader: str
    model_types: tuple[str, ...]
    demand: Demand | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """All that is known of one kind of model.

    Attributes:
        model_types: values of `model_type` in config.json that this row describes.
        blocks: dotted name of the list of transformer blocks, seen from the causal model.
        inputs: the linear layers of a block, grouped by the activation that they read and in the
            order in which the forward pass reaches them. Layers of one group share one calibration
            statistic. A layer that a block lacks is left out, so alternatives, such as a dense
            feed-forward network and experts, are all named. `EXPERT` stands for the number of an
            expert.
        heads: the attention heads: rows of their producers go with columns of their consumer.
        channels: the same for the feed-forward network.
        experts: where a block's experts are; None for a family without.
        transposed: the weights are stored [inputs, outputs], as GPT-2's Conv1D has them.
        renamed: part of a name in the files -> what the model has in its place.
        hidden: entry of config.json with the size of the residual stream.
        positions: entry of config.json with the longest sequence, in tokens.
        gguf: what GGUF calls the architecture -> the model type, where they differ.
        readings: what is known of programs that serve models of this family.
        gives: how many things a block gives: 1 for the hidden states alone, more for a tuple that
            begins with them.
        discovered: it is no row: it was found by a forward pass through one model; see
            `discovery`. Heads and channels are not known then.
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
        """Name of the base model, seen from the causal model; some checkpoints leave it out."""
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
    """A row like llama's whose blocks have experts alone."""
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
    """The row that describes a model type; None if there is none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def family_of(model_type: str) -> Family:
    """The row that describes a model type.

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
    """The row that describes what a GGUF file calls its architecture.

    Raises:
        ModelError: no row does.
    """
    for family in FAMILIES:
        if architecture in family.gguf:
            return family
    return family_of(architecture)
