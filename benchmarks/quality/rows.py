"""Measure one row: prune the model, and evaluate the result."""

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks import texts
from benchmarks.quality.record import Conditions, Judged, Row
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.calibration.data import Data
from thanos_deploy.calibration.frame import frame_of
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.texts import read_text
from thanos_deploy.measure.examine import Examination, examine, examine_dense
from thanos_deploy.measure.fidelity import Outputs
from thanos_deploy.measure.quality import TextQuality
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.head import read_head
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.pruning.recipe import METHOD, PRESET, Recipe
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.shrink.options import Cut
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.stages.checkpoints import (
    plan_widths,
    prune_checkpoint,
    shrink_checkpoint,
    survey_blocks,
)
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.training import Journals, recover_checkpoint

# Options with a place of their own in the table, or that the table does not show.
_NAMED = ("pattern", "method", "preset", "keep_shape")


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The dense model, and the evaluation of the models pruned from it.

    Attributes:
        source: the dense model.
        tokenizer: the tokenizer of the model.
        conditions: see `Conditions`.
        examination: the evaluation, which is the same for every model.
        arguments: arguments of the command line: the texts, and the folders of results, journals
            and models.
    """

    source: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    conditions: Conditions
    examination: Examination
    arguments: argparse.Namespace

    @classmethod
    def of(cls, dense: Dense, arguments: argparse.Namespace) -> "Subject":
        """Read the model and the texts."""
        source = dense.checkpoint()
        tokenizer = load_tokenizer(source.folder)
        conditions = Conditions(
            model=dense.source.name,
            model_sha256=dense.source.sha256,
            calib_tokens_sha256=_hash_of(
                texts.calibration(
                    arguments, tokenizer, count=arguments.nsamples, length=arguments.seqlen
                )
            ),
            eval_sha256=files.sha256(arguments.eval_text),
            eval_segments=arguments.eval_segments,
            eval_seqlen=arguments.eval_seqlen,
        )
        examination = Examination.of(
            read_text(arguments.eval_text),
            tokenizer,
            texts.evaluation(arguments, tokenizer),
            frame_of(tokenizer),
            questions=arguments.questions,
        )
        return cls(source, tokenizer, conditions, examination, arguments)

    @property
    def _outputs(self) -> Path:
        """The file with the outputs of the dense model, kept between calls."""
        told = {**encode(self.conditions), "questions": self.arguments.questions}
        results: Path = self.arguments.results
        return results / f".outputs-{files.sha256_of(told)[:16]}.safetensors"

    def judge_dense(self) -> Judged:
        """Evaluate the dense model, and keep its outputs to compare pruned models with."""
        found, outputs = examine_dense(
            load_model(self.source.folder), self.examination, self.source.max_positions
        )
        self._outputs.parent.mkdir(parents=True, exist_ok=True)
        outputs.write(self._outputs)
        return _judged(found)

    def judge(self, folder: Path) -> Judged:
        """Evaluate the model in a folder, and compare it with the dense model."""
        if not self._outputs.exists():
            self.judge_dense()
        outputs, head = Outputs.read(self._outputs), read_head(self.source)
        return _judged(examine(load_model(folder), self.examination, outputs, head))

    def measure(self, setting: dict[str, Any], request: PruneRequest, seed: int | None) -> Row:
        """Prune once and evaluate; an interrupted call is continued.

        Args:
            setting: options as given by the user, which name the row.
            request: the request that follows from the setting.
            seed: see `Row`.
        """
        asked = self.asked(request)
        journal = {**asked, **({} if seed is None else {"drawn": seed})}
        kept = self.arguments.results / f".journal-{files.sha256_of(journal)[:16]}"
        trainings = kept.with_name(f"{kept.name}-trainings")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            out.mkdir()
            started, processor = time.perf_counter(), time.process_time()
            blocks, resumed = self._pruned(request, seed, out, kept, journal)
            training = 0.0
            if request.recover:
                text = read_text(self.arguments.calib)
                journals = Journals(trainings, journal)
                training = recover_checkpoint(
                    self.source, text, out, request, journals=journals
                ).seconds
            seconds = time.perf_counter() - started
            used: float | None = time.process_time() - processor
            if resumed:  # the journals have wall-clock times of earlier blocks and steps only
                seconds = sum(sum(block.seconds.values()) for block in blocks) + training
                used = None
            judged = self.judge(out)
            if self.arguments.models is not None:
                shutil.copytree(out, self.arguments.models / kept.name.removeprefix(".journal-"))
        shutil.rmtree(kept)
        if request.recover:
            shutil.rmtree(trainings)
        return Row(
            way(setting, request),
            setting["pattern"],
            asked,
            judged,
            round(seconds, 1),
            None if used is None else round(used, 1),
            seed,
        )

    def asked(self, request: PruneRequest) -> dict[str, Any]:
        """Return the options of a row, with the name of the calibration text."""
        return {**request.to_json(), "calib": self.arguments.calib.name}

    def _pruned(
        self, request: PruneRequest, seed: int | None, out: Path, kept: Path, asked: dict[str, Any]
    ) -> tuple[Sequence[PrunedBlock | CutBlock], bool]:
        """Prune into a folder; return the blocks, and whether a journal was continued."""
        data, how, source = request.data, request.how, self.source
        taken = texts.calibration(
            self.arguments,
            self.tokenizer,
            count=data.nsamples,
            length=data.seqlen,
            further=how.tuning.further(data.nsamples),
            seed=seed,
        )
        ids, further = taken[: data.nsamples], taken[data.nsamples :]
        match how:
            case Cut():
                cuts = Journal(kept, asked, CutBlock)
                resumed = bool(cuts.reports)
                plan = plan_widths(source, survey_blocks(source, ids, how), how)
                return shrink_checkpoint(
                    source, ids, out, plan, how, further=further, journal=cuts
                ), resumed
            case Recipe():
                pruned = Journal(kept, asked, PrunedBlock)
                resumed = bool(pruned.reports)
                return prune_checkpoint(
                    source, ids, out, how, further=further, journal=pruned
                ), resumed


def way(setting: dict[str, Any], request: PruneRequest) -> str:
    """Return the name of a row: method, preset, and further options."""
    usual = encode(Data())
    others = [
        f"{name} {value}"
        for name, value in setting.items()
        if name not in _NAMED and usual.get(name) != value
    ]
    if isinstance(request.how, Cut):
        others.append("cut out")
    named = [setting.get("method", METHOD), setting.get("preset", PRESET)]
    return ", ".join([*named, *others]).replace("_", " ")


def _judged(found: TextQuality) -> Judged:
    return Judged(round(found.value, 2), found)


def _hash_of(ids: Tensor) -> str:
    """Return the SHA-256 of token IDs."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
