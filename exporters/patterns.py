"""The patterns that the linear layers of a bundle are claimed to hold, and a check that they do."""

from collections.abc import Callable, Mapping

from thanos_deploy.bundle.layout import MODEL
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.check import Check
from thanos_deploy.errors import DeployError
from thanos_deploy.model.assignment import describe
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.verdict import Verdict
from thanos_deploy.pattern import Pattern
from thanos_deploy.pruning.layers import linear_shapes
from thanos_deploy.pruning.result import PRUNE, patterns_of

Shapes = Mapping[str, tuple[int, int]]


def claimed(bundle: Bundle) -> dict[str, Pattern]:
    """Return the pattern of every linear layer that holds one, by full name of the layer."""
    off = _left_dense(bundle)
    return {name: pattern for name, pattern in patterns_of(bundle).items() if name not in off}


def check(
    bundle: Bundle,
    stage: str,
    judge: Callable[[Shapes, Mapping[str, Pattern]], Mapping[str, Verdict]],
) -> Check:
    """Check that every linear layer still holds its pattern in the files of a stage.

    Args:
        bundle: a bundle whose stage prune is finished.
        stage: name of the stage with the files; used for the name of the check.
        judge: reads the files. It takes the shapes (outputs, inputs) of all linear layers and their
            patterns, both by full name, and returns a verdict on each layer that has a pattern.
    """
    name = f"{stage}: pattern"
    if bundle.options(PRUNE).cut:
        return Check(
            name, "SKIP", "heads and channels were cut out, so there is no pattern to check"
        )
    shapes = linear_shapes(Checkpoint.open(bundle.path / MODEL))
    patterns = patterns_of(bundle)
    try:
        verdicts = judge(shapes, patterns)
    except DeployError as error:
        return Check(name, "FAIL", error.message, fix=error.fix)
    off = [layer for layer, verdict in verdicts.items() if not verdict.holds]
    held = (
        f"{len(verdicts) - len(off)} of {len(shapes)} layers hold "
        f"{describe(patterns, len(patterns))}"
    )
    if set(off) <= _left_dense(bundle):
        others = len(off) or len(verdicts) < len(shapes)
        return Check(
            name, "PASS", held + (", the others were left dense on purpose" if others else "")
        )
    return Check(name, "FAIL", f"{held}; not {', '.join(off)}", fix="export again, or prune again")


def _left_dense(bundle: Bundle) -> set[str]:
    """Layers in which some rows were left dense on purpose, so the pattern does not hold."""
    return set(bundle.result(PRUNE).layers_off_pattern or ())
