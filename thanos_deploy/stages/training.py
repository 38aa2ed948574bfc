"""Training in the stage prune, with the dense model as the teacher.

The remaining weights are trained after pruning, and the scales of a quantised model after
quantisation.
"""

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from thanos_deploy.bundle import files, layout
from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration import journal_folder
from thanos_deploy.calibration.frame import frame_of
from thanos_deploy.calibration.segments import every_segment
from thanos_deploy.calibration.texts import Text
from thanos_deploy.machine import devices
from thanos_deploy.machine.precision import multiplies_bfloat16
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.own_text import Habits, beginnings, own_text
from thanos_deploy.pruning.recover import recover
from thanos_deploy.pruning.result import Recovery
from thanos_deploy.pruning.train_scales import train_scales
from thanos_deploy.pruning.training_journal import TrainingJournal
from thanos_deploy.ranks.group import current
from thanos_deploy.stages.request import PruneRequest

_OWN_TEXT = "the dense model's own text"

# Names of the folders with the journals.
_TRAINED, _SCALES, _TEXT = "trained", "scales", "own-text"


@dataclass(frozen=True, slots=True)
class Journals:
    """The journals of the trainings of one run.

    Attributes:
        folder: the folder that contains all of them.
        owner: everything that the result depends on.
    """

    folder: Path
    owner: Json

    def training(self, name: str, *written: Path) -> TrainingJournal:
        """Open the journal of one training.

        Args:
            name: name of the journal's folder.
            written: existing folders of which the training will write a new version beside the old
                one; the journal leaves room for them on the disk.
        """
        room = sum(map(files.size, written))
        return TrainingJournal(self.folder / name, self.owner, room=room)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Text that the dense model generated.

    Attributes:
        rows: the pieces that were kept; empty if nothing was generated yet.
        drawn: number of generated pieces, including those that were dropped.
    """

    rows: tuple[str, ...] = ()
    drawn: int = 0


def recover_checkpoint(
    source: Checkpoint,
    text: Text,
    folder: Path,
    request: PruneRequest,
    announce: Announce = quietly,
    journals: Journals | None = None,
) -> Recovery:
    """Train the pruned model in a folder and replace it by the trained model.

    All ranks train together, and rank 0 writes.

    Args:
        source: the dense model, the teacher.
        text: the calibration text. The model is trained on it, or on text that the dense model
            generates from it, which rank 0 writes beside the folder.
        folder: the pruned model.
        request: what to train, and on how many segments.
        announce: told of each task.
        journals: keep the progress on the disk; None starts from the beginning and keeps nothing.
    """
    tokenizer, first = load_tokenizer(source.folder), current().is_first
    lessons, drawn = text, None
    if request.recover_text != "calib":
        found = _own_text(source, text, request, announce, journals)
        rows, drawn = found.rows, found.drawn
        lessons = Text.of_rows(_OWN_TEXT, rows)
        if first:
            kept = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
            folder.with_name(layout.OWN_TEXT).write_text(kept, encoding="utf-8")
    trained = folder.with_name(f"{folder.name}-trained")
    if first:
        trained.mkdir()
    recovery = recover(
        Checkpoint.open(folder),
        source,
        every_segment(lessons, tokenizer, length=request.data.seqlen),
        trained if first else None,
        count=request.recover,
        update_rank=request.recover_rank,
        seed=request.data.seed,
        device=request.chosen_device,
        journal=None if journals is None else journals.training(_TRAINED, folder),
        on_progress=announce(f"Train the remaining weights on {request.recover} segments"),
    )
    replace_checkpoint(folder, trained)
    return replace(recovery, drawn=drawn)


def train_scales_checkpoint(
    source: Checkpoint,
    text: Text,
    folder: Path,
    codes: Path,
    request: PruneRequest,
    announce: Announce = quietly,
    journals: Journals | None = None,
) -> Recovery:
    """Train the scales of a quantised model, and replace the model and its codes.

    The text is the one that `recover_checkpoint` trained on. All ranks train together, and rank 0
    writes. For the arguments see `recover_checkpoint`; `codes` is the folder of the codes.
    """
    first, lessons = current().is_first, text
    if request.recover_text != "calib":
        kept = folder.with_name(layout.OWN_TEXT).read_text(encoding="utf-8")
        lessons = Text.of_rows(_OWN_TEXT, [loads(row)["text"] for row in kept.splitlines()])
    model, new_codes = (one.with_name(f"{one.name}-trained") for one in (folder, codes))
    if first:
        model.mkdir()
        new_codes.mkdir()
    trained = train_scales(
        Checkpoint.open(folder),
        Codes.open(codes),
        source,
        every_segment(lessons, load_tokenizer(source.folder), length=request.data.seqlen),
        model if first else None,
        new_codes if first else None,
        count=request.recover,
        seed=request.data.seed,
        device=request.chosen_device,
        journal=None if journals is None else journals.training(_SCALES, folder, codes),
        on_progress=announce(f"Train the scales on {request.recover} segments"),
    )
    replace_checkpoint(folder, model)
    replace_checkpoint(codes, new_codes)
    return trained


def _own_text(
    source: Checkpoint,
    text: Text,
    request: PruneRequest,
    announce: Announce,
    journals: Journals | None,
) -> _Drawn:
    """Let the dense model generate the training text, unless the journal has it already."""
    if journals is None:
        return _drawn(source, text, request, announce)
    folder, ranks = journals.folder / _TEXT, current()
    kept = folder / "text.json"
    found = _Drawn()
    if ranks.is_first:
        journal_folder.claim(folder, journals.owner)
        found = journal_folder.found(kept, partial(decode, _Drawn)) or found
    found = ranks.from_first(found)
    if not found.rows:
        found = _drawn(source, text, request, announce)
        if ranks.is_first:
            journal_folder.seal(kept, encode(found))
    return found


def _drawn(source: Checkpoint, text: Text, request: PruneRequest, announce: Announce) -> _Drawn:
    """Let the dense model generate the training text; see `own_text.own_text`."""
    tokenizer, length, seed = load_tokenizer(source.folder), request.data.seqlen, request.data.seed
    pieces = every_segment(text, tokenizer, length=length)
    chat = request.recover_text == "chat"
    begin = beginnings(pieces, len(frame_of(tokenizer)), tokenizer, chat=chat, seed=seed)
    device = request.chosen_device
    with devices.memory_for("the dense model, which generates text"):
        # bfloat16 halves the bytes to read for each token; used where its products are not slower.
        dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
        rows, drawn = own_text(
            # mypy: a wrapper of `to` hides its argument `self`.
            load_model(source.folder, device).to(dtype),  # type: ignore[arg-type]
            tokenizer,
            begin,
            Habits.of(pieces, tokenizer),
            count=request.recover,
            length=length,
            seed=seed,
            on_progress=announce(f"Generate {request.recover} pieces of text with the dense model"),
        )
    return _Drawn(tuple(rows), drawn)


def replace_checkpoint(folder: Path, finished: Path) -> None:
    """Replace a folder by a finished one, as soon as all ranks have read the old folder."""
    current().barrier()
    if current().is_first:
        shutil.rmtree(folder)
        finished.rename(folder)
    current().barrier()
