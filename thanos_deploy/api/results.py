"""What the functions of the API return, where no stage has a record of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thanos_deploy.check import Check, passed
from thanos_deploy.errors import GateError, IntegrityError, PlatformError

if TYPE_CHECKING:
    from thanos_deploy.measure.gates import Outcome


@dataclass(frozen=True, slots=True)
class Comparison:
    """The quality of the dense and of the pruned model, measured alike.

    Attributes:
        dense: of the model that the bundle was made from.
        pruned: of the bundle's.
    """

    dense: Mapping[str, Any]
    pruned: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A run of a benchmark.

    Attributes:
        run: what was measured, without its raw samples.
        gates: what became of every gate, in every place where it applies.
    """

    run: Mapping[str, Any]
    gates: "tuple[Outcome, ...]"

    @property
    def passed(self) -> bool:
        """Every gate was held."""
        return all(outcome.held for outcome in self.gates)

    def require(self) -> "Benchmark":
        """The same benchmark.

        Raises:
            GateError: a gate was missed.
        """
        if not self.passed:
            raise GateError(
                "a gate was missed: " + "; ".join(map(str, self.gates)),
                fix="see above for what was measured; a run that is INVALID can be repeated with "
                "--overwrite",
            )
        return self


@dataclass(frozen=True, slots=True)
class Verification:
    """What a look at a bundle found, from its bytes on.

    Attributes:
        checks: one for every property of every stage.
        engines: the verdict on every linear layer of every engine, by the engine's stage.
    """

    checks: tuple[Check, ...]
    engines: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def passed(self) -> bool:
        """Nothing failed."""
        return passed(self.checks)

    def require(self) -> "Verification":
        """The same verification.

        Raises:
            IntegrityError: a file is missing or was changed.
            GateError: a pattern does not hold, or a demand is missed.
        """
        for check in self.checks:
            if check.outcome == "FAIL":
                kind = IntegrityError if check.name.endswith(": files") else GateError
                raise kind(f"{check.name}: {check.detail}", fix=check.fix)
        return self


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What this machine has for each target.

    Attributes:
        checks: one for every part.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Nothing that is there would fail; what is not there is no failure."""
        return passed(self.checks)

    def require(self) -> "Diagnosis":
        """The same diagnosis.

        Raises:
            PlatformError: something that is there would fail.
        """
        for check in self.checks:
            if check.outcome == "FAIL":
                raise PlatformError(f"{check.name}: {check.detail}", fix=check.fix)
        return self
