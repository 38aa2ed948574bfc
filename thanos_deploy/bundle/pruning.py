"""What a bundle records of how its model was pruned, as other stages and reports read it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from thanos_deploy.bundle.files import Json
from thanos_deploy.pattern import Pattern, parse

if TYPE_CHECKING:
    from thanos_deploy.bundle.manifest import Bundle


@dataclass(frozen=True, slots=True)
class Pruning:
    """The options of a stage prune that matter afterwards.

    `thanos_deploy.stages.request.PruneRequest` has all of them, and writes them.

    Attributes:
        pattern: what the model was pruned to.
        method: by which method.
        cut: heads and channels were cut out.
        recover: segments on which what is left was trained.
    """

    pattern: Pattern
    method: str
    cut: bool
    recover: int

    @classmethod
    def from_manifest(cls, options: Json) -> Self:
        """From the options in the manifest.

        Raises:
            PatternError: the pattern is none.
        """
        return cls(
            parse(options["pattern"]),
            options["method"],
            options.get("cut", False),
            options.get("recover", 0),
        )

    @classmethod
    def of(cls, bundle: "Bundle") -> Self:
        """From a bundle whose stage prune is finished."""
        return cls.from_manifest(bundle.stages["prune"].options)
