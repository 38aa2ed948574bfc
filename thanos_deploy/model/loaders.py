"""Which other loaders take a checkpoint, judged by its config.json alone.

Every demand is one that the loader's own source states, in the file that is named beside it
(vLLM 0.33.0; llama.cpp at 7bca1fd, its quantiser at 007dbbf; text-generation-inference at the
commits that are named). Demands on every model are here, those on some model types in the rows of
`thanos_deploy.model.families`. A model that meets all demands is called config-compatible. Where
the tests of this project serve shrunk models of a type with the loader itself, it is called tested,
with the version that they run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from thanos_deploy.bundle.files import Json
from thanos_deploy.model.families import Demand, family_of, row_of

# As many GPUs as a machine usually has.
_MOST_GPUS = 8


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What loaders look at, by one name for all families.

    Attributes:
        hidden: size of the residual stream.
        heads: query heads of a block.
        kv_heads: its key-value heads.
        head: size of a head.
        channels: of its feed-forward network.
        windows: whether each block sees a window of the text alone; none where no block does, or
            config.json does not say it.
    """

    hidden: int
    heads: int
    kv_heads: int
    head: int
    channels: int
    windows: tuple[bool, ...] = ()

    @classmethod
    def of(cls, config: Json) -> "Dimensions":
        """Read them from config.json.

        Raises:
            ModelError: the model type is not supported.
        """
        family = family_of(config["model_type"])
        hidden, heads = config[family.hidden], config[family.heads.count]
        channels = family.channels
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=config[family.heads.kv_count] if family.heads.kv_count else heads,
            head=config.get("head_dim") or hidden // heads,
            channels=config.get(channels.count) or (channels.multiple or 0) * hidden,
            windows=tuple(kind == "sliding_attention" for kind in config.get("layer_types") or ()),
        )

    def has_whole(self, step: int) -> bool:
        """Every so many blocks have no window, and the others do."""
        return all(own == bool((n + 1) % step) for n, own in enumerate(self.windows))


Holds = Callable[[Dimensions], bool]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a loader demands of every model.

    Attributes:
        demand: in words.
        source: the file of the loader that states it.
        holds: of the sizes of a model.
    """

    demand: str
    source: str
    holds: Holds


@dataclass(frozen=True, slots=True)
class Tested:
    """What was served, and not only read.

    Attributes:
        version: of the loader.
        model_types: of the models.
    """

    version: str
    model_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loader:
    """One that reads Hugging Face folders.

    Attributes:
        name: as the rows of the families have it.
        version: that was read; empty where it has none.
        command: that loads the folder `model`.
        constraints: what its source states about the sizes of every model.
        notes: what follows from the sizes for its options.
        tested: the version that the tests run, and the model types that they serve with it; see
            tests/vllm.
    """

    name: str
    version: str
    command: str
    constraints: tuple[Constraint, ...]
    notes: Callable[[Dimensions], str]
    tested: Tested | None = None

    @property
    def title(self) -> str:
        """Its name, with its version."""
        return f"{self.name} {self.version}".rstrip()


@dataclass(frozen=True, slots=True)
class LoaderVerdict:
    """What is known of a model and a loader.

    Attributes:
        loader: its name, with its version.
        command: that loads the model.
        compatible: no demand is broken; None if the loader's source was not read for it.
        tested: the loader with the version that served models of this type in the tests; None if
            none did, or a demand is broken.
        reasons: the demands that are broken, with their sources.
        notes: what follows for the loader's options.
    """

    loader: str
    command: str
    compatible: bool | None
    tested: str | None
    reasons: tuple[str, ...]
    notes: str


def judge(config: Json) -> Iterator[LoaderVerdict]:
    """What each loader would find in a config.json; nothing is known of a type without a row."""
    model_type = config["model_type"]
    family = row_of(model_type)
    if family is None:
        for loader in LOADERS:
            yield LoaderVerdict(loader.title, loader.command, None, None, (), "")
        return
    dimensions = Dimensions.of(config)
    readings = [one for one in family.readings if model_type in one.model_types]
    for loader in LOADERS:
        read = [reading for reading in readings if reading.loader == loader.name]
        demands = [*loader.constraints] if read else []
        demands += [_constraint(one.demand, one.source) for one in read if one.demand is not None]
        broken = tuple(
            f"{constraint.demand} ({constraint.source})"
            for constraint in demands
            if not constraint.holds(dimensions)
        )
        yield LoaderVerdict(
            loader.title,
            loader.command,
            not broken if read else None,
            _tested(loader, model_type) if read and not broken else None,
            broken,
            loader.notes(dimensions) if read and not broken else "",
        )


def of(config: Json, loader: str) -> LoaderVerdict:
    """What one loader would find; see `judge`."""
    return next(one for one in judge(config) if one.loader.split()[0] == loader)


def openvino(model_type: str) -> LoaderVerdict:
    """What OpenVINO would find: it reads the exported graph in fp32, and not the checkpoint."""
    version = "OpenVINO 2026.4"
    return LoaderVerdict(
        version,
        'openvino.Core().compile_model("onnx/model.onnx")',
        True,
        version if model_type == "llama" else None,  # tests/exporters/onnx/test_openvino.py
        (),
        "reads the exported graph",
    )


def _tested(loader: Loader, model_type: str) -> str | None:
    if loader.tested is None or model_type not in loader.tested.model_types:
        return None
    return f"{loader.name} {loader.tested.version}"


def _constraint(demand: Demand, source: str) -> Constraint:
    words, holds = DEMANDS[demand]
    return Constraint(words, source, holds)


def tensor_parallel(sizes: Dimensions) -> tuple[int, ...]:
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


def _splits(sizes: Dimensions) -> str:
    return f"`--tensor-parallel-size`: {_listed(tensor_parallel(sizes))}"


def _shards(sizes: Dimensions) -> str:
    shards = [
        gpus
        for gpus in range(1, _MOST_GPUS + 1)
        if sizes.heads % gpus == 0 and sizes.kv_heads % gpus == 0
    ]
    return f"`--num-shard`: {_listed(shards)}"


def _quantised(sizes: Dimensions) -> str:
    """Which of ggml's blocks the rows of the matrices are made of (src/llama-quant.cpp)."""
    rows = sorted({sizes.hidden, sizes.heads * sizes.head, sizes.channels})
    if odd := [row for row in rows if row % 32]:
        return (
            f"to quantise: rows of {_listed(odd)} stay in F16, because they are not multiples of 32"
        )
    if odd := [row for row in rows if row % 256]:
        return (
            f"to quantise: rows of {_listed(odd)} are not multiples of 256, so the K types "
            "fall back to blocks of 32 there"
        )
    return "to quantise: all types, with blocks of 32 and of 256"


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, numbers))


# What the rows of the families name: in words, and whether it holds.
DEMANDS: Mapping[Demand, tuple[str, Holds]] = {
    "another model": ("it does not support models of this type", lambda _: False),
    "channels are 4 x hidden size": (
        "it assumes that the feed-forward channels are 4 x hidden size, whatever config.json says",
        lambda sizes: sizes.channels == 4 * sizes.hidden,
    ),
    "every second block has no window": (
        "it assumes that every second block attends to the whole text, whatever layer_types says",
        lambda sizes: sizes.has_whole(2),
    ),
    "every sixth block has no window": (
        "it assumes that every sixth block attends to the whole text, whatever layer_types says",
        lambda sizes: sizes.has_whole(6),
    ),
    "head size is even": (
        "the size of a head has to be even",
        lambda sizes: sizes.head % 2 == 0,
    ),
    "head size is hidden size / heads": (
        "it assumes that the size of a head is hidden size / heads, whatever head_dim says",
        lambda sizes: sizes.head * sizes.heads == sizes.hidden,
    ),
    "hidden size is a multiple of heads": (
        "the hidden size has to be a multiple of the query heads",
        lambda sizes: sizes.hidden % sizes.heads == 0,
    ),
}

LOADERS = (
    Loader(
        name="vLLM",
        version="0.33.0",
        command="vllm serve model",
        constraints=(
            Constraint(
                "the query heads have to be a multiple of the key-value heads",
                "vllm/model_executor/layers/attention/attention.py",
                lambda sizes: sizes.heads % sizes.kv_heads == 0,
            ),
            Constraint(
                "the size of a head has to be a multiple of 8 up to 256, or at least 32",
                "vllm/v1/attention/backends/flash_attn.py and triton_attn.py",
                lambda sizes: (sizes.head % 8 == 0 and sizes.head <= 256) or sizes.head >= 32,
            ),
        ),
        notes=_splits,
        tested=Tested("0.32", ("llama", "qwen3", "gemma3_text", "opt")),
    ),
    Loader(
        name="text-generation-inference",
        version="",
        command="text-generation-launcher --model-id model",
        constraints=(),
        notes=_shards,
    ),
    Loader(
        name="llama.cpp",
        version="",
        command="python convert_hf_to_gguf.py model",
        constraints=(),
        notes=_quantised,
    ),
)
