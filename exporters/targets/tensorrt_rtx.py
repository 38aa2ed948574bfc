"""TensorRT-RTX: an engine that is built ahead of time, on any machine."""

from collections.abc import Iterator

from exporters.options import EngineRequest
from exporters.packages import Package
from exporters.target import Target
from exporters.tensorrt import contract
from exporters.tensorrt.library import Library
from thanos_deploy.bundle.manifest import Bundle, StageRecord
from thanos_deploy.check import Check
from thanos_deploy.progress import Announce

LIBRARY = Library("tensorrt-rtx", Package("tensorrt_rtx", extra="rtx"), ahead_of_time=True)

# What the library builds for; it has no H100 (sm90) and no B200 (sm100).
ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")


def _export(
    bundle: Bundle, request: EngineRequest, *, overwrite: bool, announce: Announce
) -> StageRecord:
    from exporters.tensorrt import stage

    return stage.export(
        bundle,
        request,
        library=LIBRARY,
        architectures=lambda: request.architectures or ARCHITECTURES,
        overwrite=overwrite,
        announce=announce,
    )


def _verify(bundle: Bundle, stage: str) -> Iterator[Check]:
    from exporters.tensorrt.stage import verify

    return verify(bundle, stage, library=LIBRARY)


TARGET = Target(
    name=LIBRARY.target,
    summary="an engine for the GPUs of --sm, built on any machine",
    writes="engines/tensorrt-rtx-ARCH",
    options=EngineRequest,
    dtypes=contract.DTYPES,
    several=True,
    packages=(LIBRARY.package,),
    gpu=False,
    export=_export,
    verify=_verify,
    size=None,
    missing=contract.MISSING,
    show=contract.show,
    proof=contract.proof,
)
