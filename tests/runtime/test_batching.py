"""What a batcher delivers, whatever happens to requests and to the engine."""

import logging
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.batching import Batcher, Busy, End, Finish, Request, Ticket, Token
from runtime.sampling import Sampler
from tests.runtime.counting import PATIENCE, Answer, Counting, Start, occupied
from thanos_deploy.errors import UsageError


def test_a_text_ends_at_its_length_before_a_stop_token_or_where_the_engine_takes_no_more(
    start: Start,
) -> None:
    engine = Counting()
    engine.max_sequence = 7
    batcher = start(engine)
    cases = [
        (Request((1, 5), 3), [6, 7, 8], Finish.LENGTH),
        (Request((5,), 4, stop=frozenset({8})), [6, 7], Finish.STOP),
        (Request((5,), 4, stop=frozenset({6})), [], Finish.STOP),
        (Request((1, 2, 3, 4, 5), 9), [6, 7, 8], Finish.LENGTH),
        (Request((1, 2, 3, 4, 5, 6, 7), 9), [8], Finish.LENGTH),
    ]
    answers = [Answer() for _ in cases]
    for (request, _, _), answer in zip(cases, answers, strict=True):
        batcher.submit(request, answer)
    for (_, ids, reason), answer in zip(cases, answers, strict=True):
        assert answer.ids() == ids
        assert answer.end() == End(reason)
    state = batcher.state()
    assert (state.waiting, state.active, state.slots) == (0, 0, 2)
    assert state.tokens == sum(len(ids) for _, ids, _ in cases)
    assert state.prompt_tokens == sum(len(request.prompt) for request, _, _ in cases)


def test_requests_join_between_the_steps_of_others(start: Start) -> None:
    engine = Counting(permits=0)
    batcher, first = occupied(start, engine)
    second = Answer()
    batcher.submit(Request((7,), 3), second)
    engine.permit()
    assert second.ids() == [8, 9, 10]
    assert first.ids() == list(range(501, 601))
    assert engine.calls[:6] == ["join 1", "read", "decode 1", "join 1", "read", "decode 2"]


def test_more_requests_than_may_wait_are_refused_and_say_what_to_do(start: Start) -> None:
    engine = Counting(1, permits=0)
    batcher, first = occupied(start, engine, queue=1)
    waiting, late = Answer(), Answer()
    batcher.submit(Request((7,), 2), waiting)
    assert batcher.state().waiting == 1
    with pytest.raises(Busy, match="the queue is full: 1 requests wait") as caught:
        batcher.submit(Request((8,), 2), late)
    assert (caught.value.exit_code, bool(caught.value.fix)) == (5, True)
    engine.permit()
    first.end()
    assert waiting.ids() == [8, 9]
    batcher.submit(Request((8,), 2), late)
    assert late.ids() == [9, 10]


def test_a_request_that_finds_a_free_slot_needs_no_queue(start: Start) -> None:
    batcher = start(Counting(), queue=0)
    answers = [Answer(), Answer()]
    for answer in answers:
        batcher.submit(Request((7,), 2), answer)
    assert [answer.ids() for answer in answers] == [[8, 9], [8, 9]]


@pytest.mark.parametrize("prompt", [(), (1, -1), (1, 1000), (2**70,), (1,) * 1001])
def test_a_prompt_that_no_engine_reads_is_refused(start: Start, prompt: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        start(Counting()).submit(Request(prompt, 1), Answer())


@pytest.mark.parametrize("values", [{"new_tokens": 0}, {"new_tokens": 1, "alternatives": -1}])
def test_a_request_out_of_range_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        Request((1,), **values)  # type: ignore[arg-type]


def test_cancelling_frees_the_slot_at_the_next_step(start: Start) -> None:
    engine = Counting(1, permits=0)
    batcher, waiting = start(engine), Answer()
    first = Answer()
    ticket = batcher.submit(Request((500,), 400), first)
    batcher.submit(Request((7,), 2), waiting)
    first.begun()
    ticket.cancel()
    engine.permit()
    assert first.end() == End(Finish.CANCELLED)
    assert len(first.tokens) <= 2  # one of the prompt, one of the step that was being taken
    assert waiting.ids() == [8, 9]
    ticket.cancel()
    assert batcher.close()


def test_a_cancelled_request_leaves_the_queue_without_a_slot(start: Start) -> None:
    engine = Counting(1, permits=0)
    batcher, first = occupied(start, engine)
    waiting = Answer()
    batcher.submit(Request((7,), 2), waiting).cancel()
    engine.permit(1)
    assert waiting.end() == End(Finish.CANCELLED)
    assert waiting.tokens == []
    assert batcher.state().active == 1
    engine.permit()
    first.end()


def test_a_prompt_that_is_being_read_can_be_cancelled(start: Start) -> None:
    engine = Counting(3, permits=0)
    batcher, first = occupied(start, engine, prompt_tokens_per_step=4)
    long, other = Answer(), Answer()
    ticket = batcher.submit(Request((7,) * 400, 2), long)
    batcher.submit(Request((7,), 2), other)
    engine.permit(2)
    engine.decoding.clear()
    assert engine.decoding.wait(PATIENCE)
    ticket.cancel()
    engine.permit()
    assert long.end() == End(Finish.CANCELLED)
    assert other.ids() == [8, 9]
    assert "abandon" in engine.calls
    first.end()


def test_a_request_is_given_up_at_its_deadline(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 10.0
    monkeypatch.setattr("runtime.batching.batcher.time", SimpleNamespace(monotonic=lambda: now))
    engine = Counting(1, permits=0)
    batcher, early, first, waiting = start(engine), Answer(), Answer(), Answer()
    batcher.submit(Request((1,), 5, deadline=10.0), early)
    assert early.end() == End(Finish.DEADLINE)
    batcher.submit(Request((500,), 400, deadline=20.0), first)
    assert engine.decoding.wait(PATIENCE)
    batcher.submit(Request((7,), 2, deadline=19.0), waiting)
    now = 20.0
    engine.permit()
    assert first.end() == End(Finish.DEADLINE)
    assert waiting.end() == End(Finish.DEADLINE)
    assert (early.tokens, waiting.tokens, len(first.tokens)) == ([], [], 2)


@pytest.mark.parametrize("call", ["remembered", "join", "read", "decode", "leave"])
def test_when_the_engine_fails_its_requests_end_and_the_next_one_works(
    start: Start, call: str
) -> None:
    engine = Counting()
    engine.broken = {call}
    batcher, answers = start(engine), [Answer(), Answer()]
    for answer in answers:
        batcher.submit(Request((7,), 3), answer)
    ends = [answer.end() for answer in answers]
    assert any(
        end.reason is Finish.FAILED and f"RuntimeError: {call}" in str(end.error) for end in ends
    ) or (call == "leave" and all(end.reason is Finish.LENGTH for end in ends))
    engine.broken = set()
    after = Answer()
    batcher.submit(Request((7,), 3), after)
    assert after.ids() == [8, 9, 10]
    assert batcher.state().active == 0


def test_a_row_whose_token_cannot_be_chosen_ends_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Sampler.choose

    def fragile(self: Sampler, *given: np.ndarray) -> int:
        token = choose(self, *given)
        if token == 9:
            raise IndexError("out of range")
        return token

    monkeypatch.setattr(Sampler, "choose", fragile)
    batcher, bad, good = start(Counting()), Answer(), Answer()
    batcher.submit(Request((7,), 5), bad)
    batcher.submit(Request((70,), 5), good)
    assert good.ids() == [71, 72, 73, 74, 75]
    end = bad.end()
    assert (end.reason, end.error) == (Finish.FAILED, "IndexError: out of range")
    assert bad.ids() == [8]


class Only:
    """Allows one token after the other, and then nothing more."""

    def __init__(self, *tokens: int) -> None:
        self._tokens = list(tokens)

    def allowed(self) -> np.ndarray:
        if not self._tokens:
            raise UsageError("too complex", fix="make it simpler")
        allowed = np.zeros(1000, bool)
        allowed[self._tokens[0]] = True
        return allowed

    def take(self, token: int) -> None:
        assert token == self._tokens.pop(0)


def test_a_constraint_decides_and_ends_its_own_request_only(start: Start) -> None:
    batcher, formed, ended, free = start(Counting(3)), Answer(), Answer(), Answer()
    batcher.submit(Request((7,), 5, constraint=Only(50, 3)), formed)
    stop = frozenset({9})
    batcher.submit(Request((7,), 5, constraint=Only(50, 9), stop=stop, min_tokens=4), ended)
    batcher.submit(Request((70,), 5), free)
    assert free.ids() == [71, 72, 73, 74, 75]
    assert (formed.ids(), formed.end()) == ([50, 3], End(Finish.REFUSED, "too complex"))
    # Where only the end is allowed it ends, whatever the least number of tokens.
    assert (ended.ids(), ended.end()) == ([50], End(Finish.STOP))


def test_logits_that_are_not_finite_end_their_own_request_only(start: Start) -> None:
    class Overflowing(Counting):
        def _logits(self, last: Sequence[int]) -> np.ndarray:
            logits = super()._logits(last)
            logits[np.array(last) == 9] = np.nan
            return logits

    batcher, bad, good = start(Overflowing()), Answer(), Answer()
    batcher.submit(Request((7,), 5), bad)
    batcher.submit(Request((70,), 5), good)
    assert bad.ids() == [8, 9]
    assert bad.end().reason is Finish.FAILED
    assert good.ids() == [71, 72, 73, 74, 75]


@pytest.mark.parametrize("at", [Token, End])
def test_a_callback_that_raises_ends_its_own_request_only(
    start: Start, at: type, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Token | End] = []

    def raising(news: Token | End) -> None:
        seen.append(news)
        if isinstance(news, at):
            raise ValueError("the reader is gone")

    batcher, other, after = start(Counting()), Answer(), Answer()
    with caplog.at_level(logging.ERROR):
        batcher.submit(Request((7,), 5), raising)
        batcher.submit(Request((70,), 5), other)
        assert other.ids() == [71, 72, 73, 74, 75]
        batcher.submit(Request((7,), 2), after)
        assert after.ids() == [8, 9]
        assert batcher.close()
    assert seen[-1] == End(Finish.CANCELLED if at is Token else Finish.LENGTH)
    assert sum(isinstance(news, End) for news in seen) == 1
    assert "a callback raised" in caplog.text


def test_a_callback_may_cancel_and_submit(start: Start) -> None:
    batcher, second = start(Counting()), Answer()
    tickets: list[Ticket] = []
    ready = threading.Event()
    ends = []

    def deliver(news: Token | End) -> None:
        assert ready.wait(PATIENCE)
        tickets[0].cancel()
        if isinstance(news, End):
            ends.append(news)
            batcher.submit(Request((7,), 2), second)

    tickets.append(batcher.submit(Request((7,), 500), deliver))
    ready.set()
    assert second.ids() == [8, 9]
    assert ends == [End(Finish.CANCELLED)]


def test_closing_finishes_what_was_taken_and_takes_nothing_new(start: Start) -> None:
    engine = Counting(1, permits=0)
    batcher, first = occupied(start, engine)
    waiting = Answer()
    batcher.submit(Request((7,), 2), waiting)
    closing = threading.Thread(target=lambda: results.append(batcher.close()))
    results: list[bool] = []
    closing.start()
    while not refuses(batcher):
        time.sleep(0.001)
    engine.permit()
    closing.join(PATIENCE)
    assert results == [True]
    assert (len(first.ids()), waiting.ids()) == (100, [8, 9])
    assert batcher.close()  # once more


def refuses(batcher: Batcher) -> bool:
    try:
        batcher.submit(Request((1,), 1), lambda news: None)
    except Busy as error:
        return "closing" in error.message
    return False


def test_what_is_not_finished_in_time_ends_when_the_batcher_closes(start: Start) -> None:
    engine = Counting(1)
    engine.max_sequence = engine.vocabulary = 10**6
    engine._logits = lambda last: np.ones((len(last), 2), np.float32)  # type: ignore[method-assign]
    batcher, endless, waiting = start(engine), Answer(), Answer()
    batcher.submit(Request((1,), 10**6), endless)
    batcher.submit(Request((1,), 1), waiting)
    endless.begun()
    assert not batcher.close(timeout=0.01)
    assert endless.end() == waiting.end() == End(Finish.CLOSED)
    assert batcher.state().active == 0


@pytest.mark.parametrize("count", [1, 3, 999, 1000, 5000])
def test_of_equally_likely_alternatives_the_smaller_ids_come_first(
    start: Start, count: int
) -> None:
    batcher, answer = start(Counting()), Answer()
    batcher.submit(Request((7,), 1, alternatives=count), answer)
    answer.end()
    (token,) = answer.tokens
    others = [number for number in range(1000) if number != 8]
    assert [number for number, _ in token.alternatives] == [8, *others][:count]
    assert token.alternatives[0] == (8, token.logprob)
