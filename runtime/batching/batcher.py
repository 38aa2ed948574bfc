"""The thread that decodes the sequences of several requests together."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.batching.requests import Deliver, End, Finish, Request
from runtime.batching.texts import Text, Ticket
from runtime.engine import Logits, Reading, SlotEngine, require_readable
from thanos_deploy.errors import ResourceError, UsageError

# Prompt tokens read between two decode steps; running requests wait while they are read.
PROMPT_TOKENS = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class State:
    """The state of a batcher.

    Attributes:
        waiting: number of requests that wait for a slot.
        active: number of requests that have a slot.
        slots: number of slots.
        steps: decode steps of the whole batch since the start.
        tokens: tokens delivered since the start.
        prompt_tokens: tokens of all prompts that were read since the start.
        reused_tokens: those prompt tokens that came from the prefix cache.
    """

    waiting: int
    active: int
    slots: int
    steps: int
    tokens: int
    prompt_tokens: int
    reused_tokens: int


class Busy(ResourceError):  # noqa: N818  # named like queue.Full
    """The queue is full, or the batcher is closing."""


@dataclass(slots=True)
class _Group:
    """Requests whose prompts are read together."""

    reading: Reading
    sequences: list[Text]


class Batcher:
    """Decodes the sequences of several requests together, on one thread of its own."""

    def __init__(
        self, engine: SlotEngine, *, queue: int, prompt_tokens_per_step: int = PROMPT_TOKENS
    ) -> None:
        """Start the thread.

        Args:
            engine: the engine, whose rows only this batcher may use.
            queue: largest number of owners whose requests wait for a slot; see `submit`.
            prompt_tokens_per_step: about how many prompt tokens are read between two decode steps.
        """
        self._engine = engine
        self._queue = queue
        self._prompt_tokens_per_step = prompt_tokens_per_step
        self._lock = threading.Condition()
        self._waiting: list[Text] = []
        self._admitted: list[Text] = []  # have a slot; reading of their prompts has not begun
        self._groups: deque[_Group] = deque()  # read in turn, the first group next
        self._rows: list[Text] = []
        self._active = 0  # sequences with a slot
        self._closing = False
        self._abandoned = False
        self._steps = self._tokens = self._prompt_tokens = self._reused_tokens = 0
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, deliver: Deliver, *, owner: Hashable | None = None
    ) -> Ticket:
        """Queue a request.

        Args:
            request: the prompt to continue, and how.
            deliver: called with every token, and then with the end.
            owner: identifies requests that belong together; None for a request by itself. The next
                free slot goes to the waiting request whose owner has the fewest slots. The last
                free slot never goes to an owner that already has one.

        Raises:
            Busy: the queue is full, or the batcher is closing.
            UsageError: the engine cannot read the prompt.
        """
        require_readable(np.array([request.prompt]), self._engine.vocabulary)
        # The last token is never fed back to the engine.
        most = self._engine.max_sequence - len(request.prompt) + 1
        if most < 1:
            raise UsageError(
                f"a prompt of {len(request.prompt)} tokens: the model takes at most "
                f"{self._engine.max_sequence}",
                fix="use a shorter prompt, or export with a larger --max-seq",
            )
        sequence = Text(request, deliver, most, owner)
        with self._lock:
            if self._closing:
                raise Busy("the batcher is closing", fix="send the request to another server")
            owners = {other.owner for other in self._waiting}
            if sequence.owner not in owners and len(owners) >= self._queue + self._free():
                raise Busy(
                    f"the queue is full: {len(owners)} requests wait for a slot",
                    fix="try again later, or allow a longer queue",
                )
            self._waiting.append(sequence)
            self._lock.notify()
        return sequence.ticket

    def state(self) -> State:
        """Return the current state."""
        with self._lock:
            return State(
                waiting=len(self._waiting),
                active=self._active,
                slots=self._engine.slots,
                steps=self._steps,
                tokens=self._tokens,
                prompt_tokens=self._prompt_tokens,
                reused_tokens=self._reused_tokens,
            )

    def close(self, *, timeout: float | None = None) -> bool:
        """Shut down gracefully: take no more requests, finish the others, and end the thread.

        Must not be called from a callback.

        Args:
            timeout: seconds after which unfinished requests end with CLOSED; None for no limit.

        Returns:
            True if all requests were finished in time.
        """
        with self._lock:
            self._closing = True
            self._lock.notify()
        self._thread.join(timeout)
        finished = not self._thread.is_alive()
        self._abandoned = True
        self._thread.join()
        return finished

    def _free(self) -> int:
        return self._engine.slots - self._active

    def _work(self) -> None:
        while self._wait():
            try:
                self._give_up()
                self._release()
                self._admit()
                self._begin()
                self._read()
                self._release()  # a text may end with its first token
                self._decode()
            except Exception as error:
                _log.exception("the engine failed; its running requests end")
                self._fail(f"{type(error).__name__}: {error}")

    def _wait(self) -> bool:
        """Sleep until there is something to do; False if there never will be."""

        def busy() -> bool:
            return bool(self._waiting or self._active)

        with self._lock:
            self._lock.wait_for(lambda: busy() or self._closing)
            return busy()

    def _give_up(self) -> None:
        """End all requests, waiting or active, that were cancelled or are past their deadline."""
        now = time.monotonic()
        with self._lock:
            for sequence in (*self._waiting, *self._with_slots()):
                sequence.give_up(now, closed=self._abandoned)
            ended = [sequence for sequence in self._waiting if sequence.end]
            self._waiting = [sequence for sequence in self._waiting if not sequence.end]
        for sequence in ended:
            sequence.finish()

    def _with_slots(self) -> list[Text]:
        read = (one for group in self._groups for one in group.sequences)
        return [*self._admitted, *read, *self._rows]

    def _release(self) -> None:
        """Free the slots of the sequences that have ended."""
        self._forget(self._admitted, lambda _: None)
        self._forget(self._rows, self._engine.leave)
        for group in self._groups:
            self._forget(group.sequences, group.reading.abandon)
        self._groups = deque(group for group in self._groups if group.sequences)

    def _forget(self, sequences: list[Text], forget: Callable[[int], None]) -> None:
        for place in reversed(range(len(sequences))):
            sequence = sequences[place]
            if sequence.end:
                forget(place)
                sequences[place] = sequences[-1]
                sequences.pop()
                self._active -= 1
                sequence.finish()

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        with self._lock:
            admitted = self._next()
            self._waiting = [one for one in self._waiting if one not in admitted]
            self._admitted += admitted
            self._active += len(admitted)

    def _begin(self) -> None:
        """Start to read prompts; short prompts that come together are read together.

        A prefix in the prefix cache is not read again. So a long prompt waits while another request
        reads a long prefix of it, such as another answer to the same prompt.
        """
        begun: list[Text] = []
        for sequence in self._admitted:
            if not self._is_being_read(sequence, begun):
                begun.append(sequence)
        for group in self._grouped(begun):
            reading = self._engine.join([one.request.prompt for one in group])
            self._groups.append(_Group(reading, group))
            self._admitted = [one for one in self._admitted if one not in group]

    def _is_being_read(self, sequence: Text, begun: Sequence[Text]) -> bool:
        """Whether waiting for another prompt saves at least as much reading as it costs."""
        prompt = sequence.request.prompt
        unread = self._unread(prompt)
        if unread <= self._prompt_tokens_per_step:
            return False
        others = [(one, self._unread(one.request.prompt)) for one in begun]
        for group in self._groups:
            others += [(one, group.reading.left) for one in group.sequences]
        for other, left in others:
            # Length of the common prefix that is worth waiting for: the tokens in the prefix cache
            # now, and as many more as the other prompt has left to read, at least one piece.
            saved = len(prompt) - unread + max(left, self._prompt_tokens_per_step)
            if (
                other.number < sequence.number  # so that no two wait for each other
                and left <= unread
                and prompt[:saved] == other.request.prompt[:saved]
            ):
                return True
        return False

    def _unread(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are not in the prefix cache."""
        return len(prompt) - self._engine.remembered(prompt)

    def _grouped(self, sequences: Sequence[Text]) -> list[list[Text]]:
        """Group the sequences whose prompts are read together, in their order."""
        groups: list[list[Text]] = []
        longest = 0
        for sequence in sequences:
            unread = self._unread(sequence.request.prompt)
            longest = max(longest, unread)
            if groups and (len(groups[-1]) + 1) * longest <= self._prompt_tokens_per_step:
                groups[-1].append(sequence)
            else:
                groups.append([sequence])
                longest = unread
        return groups

    def _next(self) -> list[Text]:
        """Choose the waiting requests that get the free slots.

        Each slot goes to the request whose owner has the fewest slots; of several, to the first.
        """
        slots = Counter(sequence.owner for sequence in self._with_slots())
        waiting, chosen = list(self._waiting), []
        for free in range(self._free(), 0, -1):
            if not waiting:
                break
            sequence = min(waiting, key=lambda one: slots[one.owner])
            if free == 1 and slots[sequence.owner]:
                break  # keep it for another owner, which would otherwise wait for an answer to end
            waiting.remove(sequence)
            slots[sequence.owner] += 1
            chosen.append(sequence)
        return chosen

    def _decode(self) -> None:
        if self._rows:
            ids = np.array([sequence.last for sequence in self._rows], dtype=np.int64)
            self._extend(self._rows, self._engine.decode(ids))
            self._steps += 1

    def _read(self) -> None:
        """Read prompts, group by group in turn, so that a short one does not wait for long ones."""
        left = self._prompt_tokens_per_step
        for _ in range(len(self._groups)):
            group = self._groups.popleft()
            self._groups.append(group)  # it stays there if reading fails
            tokens = min(left, group.reading.left)
            logits = group.reading.read(tokens)
            if logits is not None:
                self._groups.pop()
                self._rows += group.sequences
                self._prompt_tokens += sum(len(one.request.prompt) for one in group.sequences)
                self._reused_tokens += group.reading.reused
                self._extend(group.sequences, logits)
            left -= tokens
            if left <= 0:
                break

    def _extend(self, sequences: Sequence[Text], logits: Logits) -> None:
        for sequence, row in zip(sequences, logits, strict=True):
            try:
                self._tokens += sequence.extend(row)
            except UsageError as error:
                sequence.end = End(Finish.REFUSED, error.message)
            except Exception as error:  # only this row failed; the others continue
                _log.exception("a row failed; its request ends")
                sequence.end = End(Finish.FAILED, f"{type(error).__name__}: {error}")

    def _fail(self, error: str) -> None:
        """End all requests that have a slot."""
        self._engine.clear()
        failed = self._with_slots()
        self._admitted = []
        self._groups.clear()
        self._rows = []
        self._active = 0
        for sequence in failed:
            sequence.end = sequence.end or End(Finish.FAILED, error)
            sequence.finish()
