"""Options for damping a Hessian; importing this module needs no PyTorch."""

from dataclasses import dataclass
from typing import Literal, get_args

from thanos_deploy.option import Options, option

DampingMode = Literal["mean", "median", "per-channel"]
DAMPING_MODES: tuple[DampingMode, ...] = get_args(DampingMode)


@dataclass(frozen=True, slots=True)
class Damping(Options):
    """Damping added to the diagonal of a Hessian; see `solver.hessian.factor`.

    The defaults are those of the SparseGPT and Thanos papers.

    Attributes:
        damping: fraction of the scale that `damping_mode` selects.
        damping_mode: the scale: the "mean" of the diagonal, its "median" over the inputs with a
            positive diagonal entry (which a few huge channels do not move), or "per-channel", each
            entry's own value.

    Raises:
        UsageError: `damping` is not above 0, which would leave the Hessian singular where inputs
            repeat.
    """

    damping: float = option(
        0.01,
        "--damp",
        "Damping of the Hessian, as a fraction of the scale that --damp-mode names.",
        above=0.0,
    )
    damping_mode: DampingMode = option(
        "mean",
        "--damp-mode",
        "Scale of --damp: the mean or the median of the Hessian's diagonal, or per-channel for "
        "each entry's own value.",
    )


DEFAULT = Damping()


def damping_of(options: object) -> Damping:
    """The damping among a method's options; the default where the method has none."""
    return options if isinstance(options, Damping) else DEFAULT
