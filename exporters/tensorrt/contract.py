"""The part of the contract that all targets share that build engines."""

from collections.abc import Callable, Iterator

from exporters.options import EngineRequest
from exporters.target import Missing, Table, Target
from exporters.tensorrt.library import Library
from thanos_deploy.bundle.engine_record import EngineResult, LayerProof, read_build
from thanos_deploy.bundle.layout import engine_folder
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported
from thanos_deploy.check import Check
from thanos_deploy.progress import Announce

# Returns the GPUs to build for, such as ("sm90",), from the bundle and the GPUs that a user asked
# for.
Architectures = Callable[[Bundle, tuple[str, ...]], tuple[str, ...]]


def target(
    library: Library, *, summary: str, gpu: bool, architectures: Architectures
) -> Target[EngineRequest, EngineResult]:
    """Return the contract of a target that builds engines with a library.

    Args:
        library: the library.
        summary: see `Target`.
        gpu: see `Target`.
        architectures: chooses the GPUs to build for; called when the graph is exported and the
            engine is about to be built.
    """

    def export(
        bundle: Bundle, request: EngineRequest, *, overwrite: bool, announce: Announce
    ) -> Exported[EngineResult]:
        from exporters.tensorrt import stage

        return stage.export(
            bundle,
            request,
            library=library,
            architectures=lambda: architectures(bundle, request.architectures),
            overwrite=overwrite,
            announce=announce,
        )

    def verify(bundle: Bundle, stage: str) -> Iterator[Check]:
        from exporters.tensorrt import stage as stages

        return stages.verify(bundle, stage, library=library)

    return Target(
        name=library.target,
        summary=summary,
        writes=f"engines/{library.target}-ARCH",
        options=EngineRequest,
        result=EngineResult,
        dtypes=("fp16", "fp32", "int8-qdq"),
        several=True,
        packages=(library.package,),
        gpu=gpu,
        export=export,
        verify=verify,
        size=None,
        missing=Missing("which layers run on sparse kernels", why="no engine was built"),
        show=show,
        proof=proof,
    )


def proof(bundle: Bundle, stage: str) -> tuple[LayerProof, ...]:
    """Return the verdicts on all linear layers that were recorded when the engine was built.

    Raises:
        InputError: the record of the build is not readable.
    """
    return read_build(bundle.path / engine_folder(stage)).layers


def show(built: EngineResult) -> Table:
    """Return a table of how an engine was built and how many of its layers run sparse."""
    summary = built.summary
    rows = {
        "engine": f"{built.target} {built.library} for {', '.join(built.arch)}",
        "types": built.dtype,
        "form of linear layers": built.sparse_form,
        "sparse kernels allowed": "yes" if built.sparse_weights else "no",
        "layers with 2:4": f"{summary.pattern_holds} of {summary.layers}",
        "eligible for sparse kernels": str(summary.eligible),
        "sparse kernels picked": str(summary.picked),
        "size": f"{built.engine_bytes / 1e6:.1f} MB",
        "built in": f"{built.seconds:.0f} s",
        "peak memory of the builder": f"{built.peak_memory_bytes / 1e9:.2f} GB",
    }
    if built.trial_seconds:
        rows["trials"] = ", ".join(
            f"{form} {seconds * 1e3:.2f} ms" for form, seconds in built.trial_seconds.items()
        )
    return Table("", (), tuple(rows.items()))
