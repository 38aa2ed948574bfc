"""Results of API functions for which no stage defines a record."""

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

    # The targets' records of a finished export.
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
    """The result of `doctor`: whether this machine has what each target needs.

    Attributes:
        checks: one check for each component.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed; a missing component is not a failure."""
        return passed(self.checks)

    def require(self) -> "Diagnosis":
        """Return this diagnosis if it passed.

        Raises:
            PlatformError: an installed component would fail.
        """
        for check in self.checks:
            if check.outcome == "FAIL":
                raise PlatformError(f"{check.name}: {check.detail}", fix=check.fix)
        return self
