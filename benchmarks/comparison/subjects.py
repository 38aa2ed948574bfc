"""Make the files that each runtime reads; files that exist are not made again.

The graph that is timed computes only the last logits, as text generation needs and as llama.cpp
does. Perplexity needs the logits after every token, so it is computed with a second graph. That one
has the same operators, and a check makes sure that its file of weights is the same.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from benchmarks.comparison.models import Dtype, Weights
from benchmarks.comparison.record import Bits, Row, Runtime, Times, Way
from exporters import gguf
from exporters.onnx import stage as graphs
from exporters.options import ExportRequest, Graph, Logits
from exporters.target import write_stage
from exporters.targets.gguf import GgufDtype, GgufRequest, GgufResult
from thanos_deploy.bundle import files
from thanos_deploy.bundle.layout import GRAPH, GRAPH_DATA, ONNX
from thanos_deploy.bundle.manifest import Bundle, claim
from thanos_deploy.bundle.record import Nothing
from thanos_deploy.errors import GateError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.progress import Announce
from thanos_deploy.pruning.codes import Codes

Result = TypeVar("Result")

# Maps a dtype of graphs to the GGUF type of equal bits: GGUF's name and our exporter's name.
GGUF: dict[Dtype, tuple[Bits, GgufDtype]] = {
    "fp32": ("f32", "fp32"),
    "int8": ("q8_0", "q8_0"),
    "int4": ("q4_0", "q4_0"),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """One model in one runtime, to be measured.

    Attributes:
        model, bits, way, runtime: see `record.Row`.
        timed: what to open for the times, in the spelling of `benchmarks.runtimes`.
        judged: what to open for the perplexity, in the same spelling.
        read: files that the runtime reads; their total size is reported.
    """

    model: str
    bits: Bits
    way: Way
    runtime: Runtime
    timed: str
    judged: str
    read: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Total size of the files that the runtime reads."""
        return sum(path.stat().st_size for path in self.read)

    def row(self, perplexity: float, prefill: Times, decode: Times) -> Row:
        """Return the row of this subject with its figures."""
        return Row(
            model=self.model,
            bits=self.bits,
            way=self.way,
            runtime=self.runtime,
            bytes=self.bytes,
            perplexity=perplexity,
            prefill=prefill,
            decode=decode,
        )


def ours(weights: Weights, out: Path, announce: Announce) -> Subject:
    """Export weights for ONNX Runtime, with its own attention where that fits."""
    timed, judged = _graphs(weights, "ort", out, announce)
    places = str(timed), str(judged)
    return Subject(
        weights.model, weights.dtype, weights.way, "ONNX Runtime", *places, _files(timed / ONNX)
    )


def openvino(weights: Weights, out: Path, announce: Announce) -> Subject:
    """Export weights for OpenVINO, as the neutral graph that every runtime accepts."""
    timed, judged = _graphs(weights, "neutral", out, announce)
    places = f"openvino:{timed / ONNX / GRAPH}", f"openvino:{judged / ONNX / GRAPH}"
    return Subject(
        weights.model, weights.dtype, weights.way, "OpenVINO", *places, _files(timed / ONNX)
    )


def llama_cpp(weights: Weights, out: Path, announce: Announce) -> Subject:
    """Export weights as GGUF for llama.cpp; the export rounds weights that have no codes."""
    bits, dtype = GGUF[weights.dtype]
    model = Checkpoint.open(weights.folder)

    def write(folder: Path) -> GgufResult:
        return gguf.export(
            model,
            folder,
            dtype=dtype,
            codes=None if weights.codes is None else Codes.open(weights.codes),
            on_progress=announce(f"Write {weights.slug} as GGUF"),
        )

    made = _stage(weights, out, "gguf", write, GgufResult, GgufRequest(dtype))
    path = made / gguf.FILE
    return Subject(weights.model, bits, weights.way, "llama.cpp", str(path), str(path), (path,))


def genai_builder(weights: Weights, out: Path, announce: Announce) -> Subject:
    """Export a checkpoint with ORT-GenAI's own builder, which rounds the weights itself."""
    model = Checkpoint.open(weights.folder)

    def write(folder: Path) -> Nothing:
        progress = announce(f"Build {weights.slug} for ORT-GenAI")
        progress(0, 1)
        with TemporaryDirectory(dir=out) as cache:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
                    *("-i", str(model.folder), "-o", str(folder), "-c", cache),
                    *("-p", weights.dtype, "-e", "cpu"),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise GateError(
                f"{model.folder}: ORT-GenAI's builder fails: {done.stderr.strip()[-300:]}",
                fix="see which models the builder supports, or leave ORT-GenAI out with --no-genai",
            )
        progress(1, 1)
        return Nothing()

    folder = _stage(weights, out, "genai", write, Nothing, Nothing())
    places = str(folder), str(folder)
    return Subject(weights.model, weights.dtype, "rounded", "ORT-GenAI", *places, _files(folder))


def _stage(
    weights: Weights,
    out: Path,
    name: str,
    write: Callable[[Path], Result],
    result: type[Result],
    options: object,
) -> Path:
    """Return the folder of the only stage of a bundle; write the stage unless that is done."""
    place = out / "files" / f"{weights.slug}-{name}"
    with claim(place, weights.source) as bundle:
        write_stage(
            bundle,
            name,
            write,
            result=result,
            inputs={"model": weights.source.sha256},
            bytes_needed=lambda: 2 * Checkpoint.open(weights.folder).bytes_in("fp32"),
            options=options,
            overwrite=True,
        )
    return place / name


def _graphs(weights: Weights, graph: Graph, out: Path, announce: Announce) -> tuple[Path, Path]:
    """Return the bundle of the graph to time, and of the graph for the perplexity.

    Raises:
        GateError: the two graphs have different weights.
    """
    timed, judged = (_graph(weights, graph, logits, out, announce) for logits in _LOGITS)
    if timed.graph_sha256[_DATA] != judged.graph_sha256[_DATA]:
        raise GateError(
            f"{timed.path} and {judged.path}: their weights differ, though only what is computed "
            "of the logits should",
            fix="report the model",
        )
    return timed.path, judged.path


_LOGITS: tuple[Logits, Logits] = ("last", "all")
_DATA = f"{ONNX}/{GRAPH_DATA}"


def _graph(weights: Weights, graph: Graph, logits: Logits, out: Path, announce: Announce) -> Bundle:
    place = out / "files" / f"{weights.slug}-{graph}-{logits}"
    with claim(place, weights.source) as bundle:
        graphs.export(
            bundle,
            Checkpoint.open(weights.folder),
            ExportRequest(weights.dtype, logits=logits, graph=graph),
            patterns={},
            origin={"model_sha256": weights.source.sha256},
            inputs={"model": weights.source.sha256},
            codes=weights.codes,
            title=f"{weights.slug}, {graph}, {logits} logits",
            overwrite=True,
            announce=announce,
        )
    return bundle


def _files(folder: Path) -> tuple[Path, ...]:
    """Return the files of the graph and of its weights."""
    return tuple(sorted(path for path in folder.iterdir() if path.name.startswith(GRAPH)))


def hashes(subject: Subject) -> Iterator[str]:
    """Return the hashes of all files that the runtime reads for the perplexity."""
    kind, _, rest = subject.judged.partition(":")
    path = Path(rest).parent if kind == "openvino" else Path(subject.judged)
    found = [path] if path.is_file() else sorted(path.rglob("*.onnx*"))
    return map(files.sha256, found)
