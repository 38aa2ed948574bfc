"""What the linear layers of a bundle are claimed to hold, and whether they do."""

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
    """By full name, the pattern of every linear layer that holds one."""
    off = _left_dense(bundle)
    return {name: pattern for name, pattern in patterns_of(bundle).items() if name not in off}


def check(
    bundle: Bundle,
    stage: str,
    judge: Callable[[Shapes, Mapping[str, Pattern]], Mapping[str, Verdict]],
) -> Check:
    """Whether every linear layer still holds its pattern in the files of a stage.

    Args:
        bundle: with the stage prune finished.
        stage: whose files are judged, for the name of the check.
        judge: reads them: given outputs and inputs of every linear layer and the patterns, both by
            full name, returns a verdict on each layer with a pattern.
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
    """Layers with rows that were left dense on purpose, so that no pattern holds."""
    return set(bundle.result(PRUNE).layers_off_pattern or ())
