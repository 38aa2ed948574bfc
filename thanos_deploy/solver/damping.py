"""How a Hessian is damped: a value that needs no PyTorch."""

from dataclasses import dataclass
from typing import Literal, get_args

from thanos_deploy.option import Options, option

DampingMode = Literal["mean", "median", "per-channel"]
DAMPING_MODES: tuple[DampingMode, ...] = get_args(DampingMode)


@dataclass(frozen=True, slots=True)
class Damping(Options):
    """What is added to the diagonal of a Hessian; see `solver.hessian.factor`.

    The default is that of the papers of SparseGPT and Thanos.

    Attributes:
        damping: a fraction of the diagonal's scale.
        damping_mode: the scale: the "mean" of the diagonal, its "median" over the inputs that are
            alive (which a few huge channels do not move), or "per-channel", each entry's own.

    Raises:
        UsageError: it damps nothing, which leaves the Hessian singular where inputs repeat.
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
