"""What the functions of the API return, where no stage has a record of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from thanos_deploy.check import Check, passed
from thanos_deploy.errors import PlatformError

if TYPE_CHECKING:
    from exporters.targets.compressed_tensors import CompressedResult
    from exporters.targets.genai import GenaiResult
    from exporters.targets.gguf import GgufResult
    from exporters.targets.packed import PackedResult
    from exporters.targets.triton import TritonResult
    from exporters.targets.vllm import VllmResult
    from thanos_deploy.bundle.engine_record import EngineResult
    from thanos_deploy.bundle.graph_record import GraphResult

    # What the targets say of a finished export.
    ExportResult: TypeAlias = (
        CompressedResult
        | EngineResult
        | GenaiResult
        | GgufResult
        | GraphResult
        | PackedResult
        | TritonResult
        | VllmResult
    )


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What this machine has for each target.

    Attributes:
        checks: one for every part that was checked.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing that is installed would fail; a missing part is not a failure."""
        return passed(self.checks)

    def require(self) -> "Diagnosis":
        """Return this diagnosis if it passed.

        Raises:
            PlatformError: something that is installed would fail.
        """
        for check in self.checks:
            if check.outcome == "FAIL":
                raise PlatformError(f"{check.name}: {check.detail}", fix=check.fix)
        return self
