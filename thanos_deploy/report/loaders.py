"""Which other loaders take a checkpoint, judged by its config.json alone.

Every constraint is one that the loader's own source states, in the file that is named beside it
(vLLM 0.33.0; llama.cpp at 7bca1fd, its quantiser at 007dbbf; text-generation-inference at the
commits that are named). No loader is run: what breaks no constraint is called config-compatible.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from thanos_deploy.bundle.files import Json
from thanos_deploy.model.families import family_of

# As many GPUs as a machine usually has.
_MOST_GPUS = 8


@dataclass(frozen=True, slots=True)
class LoaderSizes:
    """What loaders look at, by one name for all families.

    Attributes:
        model_type: see `families`.
        hidden: size of the residual stream.
        heads: query heads of a block.
        kv_heads: its key-value heads.
        head: size of a head.
        channels: of its feed-forward network.
    """

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head: int
    channels: int

    @classmethod
    def of(cls, config: Json) -> "LoaderSizes":
        """Read them from config.json.

        Raises:
            ModelError: the model type is not supported.
        """
        family = family_of(config["model_type"])
        hidden = config["n_embd"] if "n_embd" in config else config["hidden_size"]
        heads = config[family.heads.count]
        return cls(
            config["model_type"],
            hidden,
            heads,
            config[family.heads.kv_count] if family.heads.kv_count else heads,
            config.get("head_dim") or hidden // heads,
            config.get(family.channels.count) or 4 * hidden,  # GPT-2 leaves it out for that
        )


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a loader demands of a model.

    Attributes:
        model_types: those that it is about.
        demand: in words.
        source: the file of the loader that states it.
        holds: of the sizes of a model.
    """

    model_types: tuple[str, ...]
    demand: str
    source: str
    holds: Callable[[LoaderSizes], bool]


@dataclass(frozen=True, slots=True)
class Loader:
    """One that reads Hugging Face folders.

    Attributes:
        name: with its version, where it has one.
        command: that loads the folder `model`.
        model_types: those for which its source was read.
        constraints: all that its source states about sizes.
        notes: what follows from the sizes for its options.
    """

    name: str
    command: str
    model_types: tuple[str, ...]
    constraints: tuple[Constraint, ...]
    notes: Callable[[LoaderSizes], str]


@dataclass(frozen=True, slots=True)
class LoaderVerdict:
    """What is known of a model and a loader.

    Attributes:
        loader: its name.
        command: that loads the model.
        compatible: no constraint is broken; None if the loader's source was not read for it.
        reasons: the constraints that are broken, with their sources.
        notes: what follows for the loader's options.
    """

    loader: str
    command: str
    compatible: bool | None
    reasons: tuple[str, ...]
    notes: str


def judge(config: Json) -> Iterator[LoaderVerdict]:
    """What each loader would find in a config.json.

    Raises:
        ModelError: the model type is not supported.
    """
    sizes = LoaderSizes.of(config)
    for loader in LOADERS:
        judged = sizes.model_type in loader.model_types
        broken = tuple(
            f"{constraint.demand} ({constraint.source})"
            for constraint in loader.constraints
            if sizes.model_type in constraint.model_types and not constraint.holds(sizes)
        )
        yield LoaderVerdict(
            loader.name,
            loader.command,
            not broken if judged else None,
            broken,
            loader.notes(sizes) if judged and not broken else "",
        )


def tensor_parallel(sizes: LoaderSizes) -> tuple[int, ...]:
    """Over how many GPUs vLLM can split a model.

    Heads and channels are divided; key-value heads are divided, or repeated where there are fewer
    than GPUs (vllm/model_executor/models/llama.py and the others; layers/linear.py).
    """
    return tuple(
        gpus
        for gpus in range(1, _MOST_GPUS + 1)
        if sizes.heads % gpus == 0
        and sizes.channels % gpus == 0
        and 0 in (sizes.kv_heads % gpus, gpus % sizes.kv_heads)
    )


def _splits(sizes: LoaderSizes) -> str:
    return f"`--tensor-parallel-size`: {_listed(tensor_parallel(sizes))}"


def _shards(sizes: LoaderSizes) -> str:
    shards = [
        gpus
        for gpus in range(1, _MOST_GPUS + 1)
        if sizes.heads % gpus == 0 and sizes.kv_heads % gpus == 0
    ]
    return f"`--num-shard`: {_listed(shards)}"


def _quantised(sizes: LoaderSizes) -> str:
    """Which of ggml's blocks the rows of the matrices are made of (src/llama-quant.cpp)."""
    rows = sorted({sizes.hidden, sizes.heads * sizes.head, sizes.channels})
    if odd := [row for row in rows if row % 32]:
        return f"to quantise: rows of {_listed(odd)} stay in F16, being no multiples of 32"
    if odd := [row for row in rows if row % 256]:
        return (
            f"to quantise: rows of {_listed(odd)} are no multiples of 256, so that the K types "
            "fall back to blocks of 32 there"
        )
    return "to quantise: all types, with blocks of 32 and of 256"


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, numbers))


_LLAMA_LIKE = ("llama", "mistral")
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_ALL = (*_LLAMA_LIKE, "qwen2", "qwen3", *_GEMMAS, "opt", "gpt2", "gpt_neox")


def _head_follows(sizes: LoaderSizes) -> bool:
    return sizes.head * sizes.heads == sizes.hidden


LOADERS = (
    Loader(
        name="vLLM 0.33.0",
        command="vllm serve model",
        model_types=_ALL,
        constraints=(
            Constraint(
                _ALL,
                "the query heads have to be a multiple of the key-value heads",
                "vllm/model_executor/layers/attention/attention.py",
                lambda sizes: sizes.heads % sizes.kv_heads == 0,
            ),
            Constraint(
                ("qwen2",),
                "it takes the size of a head to be hidden size / heads, whatever head_dim says",
                "vllm/model_executor/models/qwen2.py",
                _head_follows,
            ),
            Constraint(
                _ALL,
                "the size of a head has to be a multiple of 8 up to 256, or at least 32",
                "vllm/v1/attention/backends/flash_attn.py and triton_attn.py",
                lambda sizes: (sizes.head % 8 == 0 and sizes.head <= 256) or sizes.head >= 32,
            ),
        ),
        notes=_splits,
    ),
    Loader(
        name="text-generation-inference",
        command="text-generation-launcher --model-id model",
        model_types=("llama", "qwen3"),
        constraints=(
            Constraint(
                ("llama",),
                "it takes the size of a head to be hidden size / heads, whatever head_dim says",
                "custom_modeling/flash_llama_modeling.py at 0036084",
                _head_follows,
            ),
            Constraint(
                ("qwen3",),
                "the hidden size has to be a multiple of the query heads",
                "custom_modeling/flash_qwen3_modeling.py at 78c236f",
                lambda sizes: sizes.hidden % sizes.heads == 0,
            ),
        ),
        notes=_shards,
    ),
    Loader(
        name="llama.cpp",
        command="python convert_hf_to_gguf.py model",
        model_types=_ALL,
        constraints=(
            Constraint(
                ("opt",), "it does not know OPT", "conversion/__init__.py", lambda sizes: False
            ),
            Constraint(
                ("gpt2",),
                "it takes the feed-forward channels to be 4 x hidden size, whatever n_inner says",
                "conversion/gpt2.py",
                lambda sizes: sizes.channels == 4 * sizes.hidden,
            ),
            Constraint(
                _LLAMA_LIKE,
                "the size of a head has to be even",
                "conversion/llama.py",
                lambda sizes: sizes.head % 2 == 0,
            ),
        ),
        notes=_quantised,
    ),
)
