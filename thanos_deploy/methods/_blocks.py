"""Options of the methods that solve blocks of columns with a factored Hessian."""

from dataclasses import dataclass

from thanos_deploy.errors import UsageError
from thanos_deploy.option import option
from thanos_deploy.pattern import Pattern, SemiStructured
from thanos_deploy.solver.damping import Damping


@dataclass(frozen=True, slots=True)
class Blocks(Damping):
    """The size of the blocks of columns, and the damping of the Hessian.

    Attributes:
        block_columns: number of columns of a block; a multiple of the group of an n:m pattern.
    """

    block_columns: int = option(
        128, "--block-size", "Number of columns that are solved together.", least=1
    )

    def check_pattern(self, name: str, pattern: Pattern) -> None:
        """Refuse blocks that would cut through the groups of an n:m pattern.

        Args:
            name: name of the layer, for the message.
            pattern: the pattern to prune it to.

        Raises:
            UsageError: the block size is not a multiple of the pattern's group.
        """
        if isinstance(pattern, SemiStructured) and self.block_columns % pattern.group:
            raise UsageError(
                f"{name}: blocks of {self.block_columns} columns do not fit pattern {pattern}",
                fix=f"use a --block-size that is a multiple of {pattern.group}",
            )
