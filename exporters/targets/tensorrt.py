"""TensorRT: an engine for the GPU of this machine."""

from collections.abc import Iterator

from exporters.options import EngineRequest
from exporters.packages import Package
from exporters.target import Target
from exporters.tensorrt import contract
from exporters.tensorrt.library import Library
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.check import Check
from thanos_deploy.errors import PlatformError, UsageError
from thanos_deploy.gpu import driver
from thanos_deploy.progress import Announce

LIBRARY = Library("tensorrt", Package("tensorrt", extra="tensorrt"), ahead_of_time=False)


def _architectures(bundle: Bundle, asked: tuple[str, ...]) -> tuple[str, ...]:
    try:
        arch = driver.require().arch
    except PlatformError as error:
        raise PlatformError(
            f"{error.message}: TensorRT builds an engine on the GPU that will run it. All stages "
            f"before the engine are finished and kept in {bundle.path}",
            fix="copy that folder, which is all that is needed, to a machine with the GPU "
            f"and run `thanos-deploy export {bundle.path.name} --target tensorrt` there; or build "
            "with --target tensorrt-rtx here",
        ) from error
    if asked not in ((), (arch,)):
        raise UsageError(
            f"--sm {','.join(asked)}: TensorRT builds for the GPU of this machine, {arch}",
            fix="leave --sm out, or use --target tensorrt-rtx",
        )
    return (arch,)


def _export(
    bundle: Bundle, request: EngineRequest, *, overwrite: bool, announce: Announce
) -> StageRecord:
    from exporters.tensorrt import stage

    return stage.export(
        bundle,
        request,
        library=LIBRARY,
        architectures=lambda: _architectures(bundle, request.architectures),
        overwrite=overwrite,
        announce=announce,
    )


def _verify(bundle: Bundle, stage: str) -> Iterator[Check]:
    from exporters.tensorrt.stage import verify

    return verify(bundle, stage, library=LIBRARY)


TARGET = Target(
    name=LIBRARY.target,
    summary="an engine for the GPU of this machine",
    writes="engines/tensorrt-ARCH",
    options=EngineRequest,
    dtypes=contract.DTYPES,
    several=True,
    packages=(LIBRARY.package,),
    gpu=True,
    export=_export,
    verify=_verify,
    size=None,
    missing=contract.MISSING,
    show=contract.show,
    proof=contract.proof,
)
