"""What the functions of the API return, where no stage has a record of it."""

from dataclasses import dataclass

from thanos_deploy.check import Check, passed
from thanos_deploy.errors import PlatformError


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
