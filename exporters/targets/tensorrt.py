"""TensorRT: an engine for the GPU of this machine."""

from exporters.packages import Package
from exporters.tensorrt import contract
from exporters.tensorrt.library import Library
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import PlatformError, UsageError
from thanos_deploy.gpu import driver

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


TARGET = contract.target(
    LIBRARY,
    summary="an engine for the GPU of this machine",
    gpu=True,
    architectures=_architectures,
)
