"""Judge by config.json alone which other programs, called loaders, can load a checkpoint.

Every demand is stated by the loader's own source code, in the file that is named beside the demand
(vLLM 0.33.0; llama.cpp at 7bca1fd, its quantiser at 007dbbf; text-generation-inference at the
commits that are named). Demands on every model are here; demands on some model types are in the
rows of `thanos_deploy.model.families`. A model that meets all demands is called config-compatible.
It is also called tested if the tests of this project serve shrunk models of its type with the
loader itself; the version that the tests run is named.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from thanos_deploy.bundle.files import Json
from thanos_deploy.model.families import Demand, family_of, row_of

# Most GPUs considered for tensor parallelism: as many as a machine usually has.
_MOST_GPUS = 8


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of a model that loaders check, with the same names for all families.

    Attributes:
        hidden: hidden size.
        heads: query heads of a block.
        kv_heads: key-value heads of a block.
        head: size of a head.
        channels: feed-forward channels of a block.
        windows: for each block, whether it uses sliding window attention; empty if config.json has
            no layer_types.
    """

    hidden: int
    heads: int
    kv_heads: int
    head: int
    channels: int
    windows: tuple[bool, ...] = ()

    @classmethod
    def of(cls, config: Json) -> "Dimensions":
        """Read the sizes from config.json.

        Raises:
            ModelError: the model type is not supported.
            KeyError: an entry with a size is missing.
        """
        family = family_of(config["model_type"])
        hidden, heads = config[family.hidden], config[family.heads.count]
        channels, kv_count = family.channels, family.heads.kv_count
        return cls(
            hidden=hidden,
            heads=heads,
            # The first LLaMA models have no such entry, because every query head has its own.
            kv_heads=(config.get(kv_count) if kv_count else None) or heads,
            head=config.get("head_dim") or hidden // heads,
            channels=config.get(channels.count) or (channels.multiple or 0) * hidden,
            windows=tuple(kind == "sliding_attention" for kind in config.get("layer_types") or ()),
        )

    def has_whole(self, step: int) -> bool:
        """Return whether every `step`-th block has no window and all other blocks have one."""
        return all(own == bool((n + 1) % step) for n, own in enumerate(self.windows))


Holds = Callable[[Dimensions], bool]


@dataclass(frozen=True, slots=True)
class Constraint:
    """A demand of a loader on a model.

    Attributes:
        demand: the demand in words.
        source: the file of the loader that states it.
        holds: returns whether a model with the given sizes meets it.
    """

    demand: str
    source: str
    holds: Holds


@dataclass(frozen=True, slots=True)
class Tested:
    """The model types that the tests of this project serve with a loader.

    Attributes:
        version: version of the loader in the tests.
        model_types: types of the models that the tests serve.
    """

    version: str
    model_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loader:
    """A program that loads Hugging Face folders.

    Attributes:
        name: name of the program, as in the rows of the families.
        version: version of the source code that was read; empty if no version is named.
        command: command that loads the folder `model`.
        constraints: demands on the sizes of every model.
        notes: returns what the sizes of a model mean for the program's options.
        tested: what the tests serve with the program, see tests/vllm; None for nothing.
    """

    name: str
    version: str
    command: str
    constraints: tuple[Constraint, ...]
    notes: Callable[[Dimensions], str]
    tested: Tested | None = None

    @property
    def title(self) -> str:
        """Name and version of the program."""
        return f"{self.name} {self.version}".rstrip()


@dataclass(frozen=True, slots=True)
class LoaderVerdict:
    """Whether a loader can load a model.

    Attributes:
        loader: name and version of the loader.
        command: command that loads the model.
        compatible: whether the model meets all demands; None if the loader's source code was not
            read for models of this type.
        tested: name and version of the loader that served models of this type in the tests; None if
            it served none, or the model does not meet a demand.
        reasons: the demands that the model does not meet, with their sources.
        notes: what the sizes of the model mean for the loader's options.
    """

    loader: str
    command: str
    compatible: bool | None
    tested: str | None
    reasons: tuple[str, ...]
    notes: str


def judge(config: Json) -> Iterator[LoaderVerdict]:
    """Judge a config.json for each loader.

    For a model type without a row in `families`, `compatible` and `tested` are None.

    Args:
        config: content of config.json.
    """
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
    """Judge a config.json for one loader; see `judge`."""
    return next(one for one in judge(config) if one.loader.split()[0] == loader)


def openvino(model_type: str) -> LoaderVerdict:
    """Return the verdict on OpenVINO, which reads the exported fp32 graph, not the checkpoint."""
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
    """Return the numbers of GPUs over which vLLM can split a model, up to 8.

    Heads and channels are divided among the GPUs. Key-value heads are divided too, or replicated if
    there are fewer of them than GPUs (vllm/model_executor/models/llama.py and the others;
    layers/linear.py).
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
    """Say which block sizes of ggml divide the rows of the matrices (src/llama-quant.cpp)."""
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


# Demands that the rows of the families name: the demand in words, and a function that checks it.
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
