"""Check whether the claims in a bundle's manifest still hold for its files.

files      every file has the hash that was recorded when it was written
pattern    every linear layer of the checkpoint has its pattern
targets    each target checks its own stages; see `exporters.target.Target.verify`
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from exporters import patterns, targets
from thanos_deploy.bundle.engine_record import LayerProof, Summary
from thanos_deploy.bundle.layout import MODEL, PRUNE
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.check import Check, passed
from thanos_deploy.errors import GateError, InputError, IntegrityError, boundary
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.verdict import Verdict, judge
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import OnProgress, silent


def verify(
    bundle: Bundle, *, require_sparse: float | None = None, on_progress: OnProgress = silent
) -> list[Check]:
    """Run all checks that apply to a bundle.

    Args:
        bundle: a bundle whose stage prune is finished.
        require_sparse: the fraction of the linear layers that must be proven to run on sparse
            tensor cores, in every engine; None to require nothing.
        on_progress: called before each stage and at the end.

    Raises:
        InputError: nothing has been pruned yet, or a file with the recorded hash is unreadable.
    """
    bundle.require(PRUNE, "`thanos-deploy prune`")
    checks: list[Check] = []
    stages = list(bundle.stages)
    for index, stage in enumerate(stages):
        on_progress(index, len(stages))
        checks.append(_files(bundle, stage))
        # The contents of changed files are not checked.
        if checks[-1].outcome == "PASS":
            checks += _contents(bundle, stage)
    on_progress(len(stages), len(stages))
    if require_sparse is not None:
        checks += _demand(bundle, require_sparse)
    return checks


def proofs(bundle: Bundle) -> dict[str, Sequence[LayerProof]]:
    """Return the verdicts on the linear layers of each engine, by the name of its stage."""
    return {
        stage: target.proof(bundle, stage)
        for stage in bundle.stages
        if (target := targets.of_stage(stage)) is not None and target.proof is not None
    }


def _files(bundle: Bundle, stage: str) -> Check:
    files = bundle.stages[stage].files
    try:
        bundle.verify(stage)
    except IntegrityError as error:
        return Check(f"{stage}: files", "FAIL", error.message, fix=error.fix)
    return Check(
        f"{stage}: files", "PASS", f"{len(files)} files, with the hashes that were recorded"
    )


def _contents(bundle: Bundle, stage: str) -> Iterator[Check]:
    with boundary(
        InputError,
        f"{bundle.path}: the files of stage {stage!r} have the recorded hashes, but cannot be read",
        fix="make that stage again with --overwrite; do not use it unless you know who made it",
    ):
        if stage == PRUNE:
            yield patterns.check(bundle, stage, partial(_judge_checkpoint, bundle.path / MODEL))
        elif (target := targets.of_stage(stage)) is not None:
            yield from target.verify(bundle, stage)


def _judge_checkpoint(
    folder: Path, shapes: patterns.Shapes, claimed: Mapping[str, Pattern]
) -> dict[str, Verdict]:
    checkpoint = Checkpoint.open(folder)
    verdicts = {}
    for name, pattern in claimed.items():
        stored = checkpoint.stored_name(f"{name}.weight")
        (weight,) = checkpoint.weights.read([stored]).values()
        nonzero = (weight.T if checkpoint.family.transposed else weight) != 0
        verdicts[name] = judge(nonzero.numpy(), pattern)
    return verdicts


def _demand(bundle: Bundle, fraction: float) -> Iterator[Check]:
    found = proofs(bundle)
    if not found:
        able = " or ".join(each.name for each in targets.every() if each.proof is not None)
        yield Check(
            f"at least {fraction:.0%} sparse",
            "FAIL",
            "there is no engine",
            fix=f"run `thanos-deploy export` on the GPU, with --target {able}",
        )
    for stage, layers in found.items():
        picked = Summary.of(layers).picked
        enough = picked >= fraction * len(layers)
        yield Check(
            f"{stage}: at least {fraction:.0%} sparse",
            "PASS" if enough else "FAIL",
            f"{picked} of {len(layers)} linear layers are proven to run on sparse tensor cores",
            fix=""
            if enough
            else "see the reason for each layer with --layers; where a dense kernel is faster, "
            "it is right that the engine uses it",
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of checking a bundle.

    Attributes:
        bundle: name of the bundle's folder.
        checks: all checks.
        engines: the verdicts on the linear layers of each engine, by the name of its stage.
    """

    bundle: str
    checks: tuple[Check, ...]
    engines: Mapping[str, Sequence[LayerProof]]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return passed(self.checks)

    def require(self) -> "Verification":
        """Return this verification if it passed.

        Raises:
            IntegrityError: a file is missing or was changed.
            GateError: another check failed, such as a pattern or the required sparse fraction.
        """
        for check in self.checks:
            if check.outcome == "FAIL":
                kind = IntegrityError if check.name.endswith(": files") else GateError
                raise kind(f"{check.name}: {check.detail}", fix=check.fix)
        return self


def verification(checks: Sequence[Check], bundle: Bundle) -> Verification:
    """Combine the checks with the verdicts on the layers of every engine."""
    return Verification(bundle.path.name, tuple(checks), proofs(bundle))
