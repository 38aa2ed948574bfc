"""The journal of a training: its state is saved now and then, so that it can be continued.

A folder with the newest state:

    step-000120.safetensors  trained tensors, moments and derived tensors after that many steps
    state.json               the number of that step, and size and SHA-256 of the file

A training that continues from a state gives the same bytes as one that was never interrupted. The
JSON is flushed and renamed into place last; only then is the previous state deleted. Tensors are
stored whole, whatever the number of ranks, so another number of ranks can continue.

A state is large: three float32 numbers for every trained weight. So a state is written every few
minutes, and less often if writing takes long. If the disk has no room for it beside the model that
is still to be written, no state is written from then on, and a warning says so.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.files import FileRecord, Json, file_record
from thanos_deploy.calibration import journal_folder
from thanos_deploy.model.tensorfile import Kind, TensorFile, bytes_of
from thanos_deploy.ranks.group import current

logger = logging.getLogger(__name__)

_STATE = "state.json"

# Least time between two states: in seconds, and as a multiple of the time that writing one takes.
_EVERY_SECONDS = 300.0
_EVERY_WRITES = 20


@dataclass(frozen=True, slots=True)
class Reached:
    """How far a training has come.

    Attributes:
        step: number of the last finished step; 0 for none.
        nats: the divergence of each step so far, in nats per token.
        seconds: time that these steps took.
    """

    step: int = 0
    nats: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _State:
    """What `state.json` holds, and what the first rank tells the others.

    Attributes:
        reached: how far the training has come.
        files: the file with the tensors, by its name; empty at the beginning.
    """

    reached: Reached = field(default_factory=Reached)
    files: Mapping[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A decision for all ranks by the first rank, which has the clock and the disk."""

    yes: bool


class TrainingJournal:
    """The journal of one training.

    Attributes:
        reached: the progress from which the training continues.
    """

    def __init__(self, folder: Path, owner: Json, *, room: int) -> None:
        """Continue the journal in a folder if it is intact, or begin a new one.

        Args:
            folder: a folder for this journal alone, visible to all ranks.
            owner: everything that the training depends on.
            room: bytes that must stay free on the disk beside a state.

        Raises:
            InputError: the journal names a file outside its folder.
        """
        self._folder, self._room, self._ranks = folder, room, current()
        state = self._ranks.from_first(self._opened(owner) if self._ranks.is_first else _State())
        self.reached = state.reached
        self._file = next(iter(state.files), None)
        self._since, self._wrote, self._fits = time.monotonic(), 0.0, True

    def _opened(self, owner: Json) -> _State:
        journal_folder.claim(self._folder, owner)
        state, path = _State(), self._folder / _STATE
        found = journal_folder.found(path, partial(decode, _State))
        if found is not None and journal_folder.intact(self._folder, found.files):
            state = found
        if state.reached.step:
            logger.info("%s: continuing after %d steps", self._folder, state.reached.step)
        elif path.exists():
            logger.warning(
                "%s: the training starts over, because its last state is damaged", self._folder
            )
        journal_folder.drop_all_but(self._folder, {_STATE, *state.files} if state.files else {})
        return state

    def tensors(self) -> TensorFile:
        """Open the file of the current state for reading."""
        assert self._file is not None
        return TensorFile.open(self._folder / self._file)

    def is_due(self) -> bool:
        """Return whether it is time to write a state; the answer is the same on all ranks."""
        past = time.monotonic() - self._since
        return self._ranks.from_first(
            _Answer(self._fits and past >= max(_EVERY_SECONDS, _EVERY_WRITES * self._wrote))
        ).yes

    def keep(
        self, reached: Reached, kinds: Mapping[str, Kind], whole: Callable[[str], Tensor]
    ) -> None:
        """Write a state and delete the previous one; keep the previous one if the disk has no room.

        Args:
            reached: how far the training has come.
            kinds: dtype and shape of each tensor, by its name.
            whole: returns a whole tensor by its name; all ranks call it for one tensor after
                another.
        """
        began = time.monotonic()
        name = f"step-{reached.step:06d}.safetensors"
        fits = self._has_room(bytes_of(kinds) + self._room) if self._ranks.is_first else False
        self._fits = self._ranks.from_first(_Answer(fits)).yes
        if not self._fits:
            return
        file = TensorFile.create(self._folder / name, kinds) if self._ranks.is_first else None
        for one in kinds:
            tensor = whole(one)
            if file is not None:
                file.write(one, tensor)
        if file is not None:
            with file:
                file.sync()
            state = _State(reached, {name: file_record(file.path)})
            journal_folder.seal(self._folder / _STATE, encode(state))
            journal_folder.drop_all_but(self._folder, {_STATE, name})
        self._ranks.barrier()
        self._file, self.reached = name, reached
        self._since = time.monotonic()
        self._wrote = self._since - began

    def _has_room(self, needed: int) -> bool:
        """Return whether the disk has this many bytes free; log a warning if not."""
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            logger.warning(
                "%s: the training's state is not kept, because the disk has %d MB left, and the "
                "state and the model take %d MB; if this run is ended, the training goes on from "
                "step %d",
                self._folder,
                free // 10**6,
                needed // 10**6,
                self.reached.step,
            )
        return free >= needed
