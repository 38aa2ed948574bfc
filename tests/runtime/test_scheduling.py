"""In which order prompts are read: oracles on the order, whatever the time."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batching import Batcher, End, Request, Token
from tests.runtime.counting import PATIENCE, Answer, Counting, Start, occupied


def test_long_prompts_are_read_in_pieces_between_the_steps_of_others(start: Start) -> None:
    engine = Counting(2, permits=0)
    batcher, first = occupied(start, engine, prompt_tokens_per_step=4)
    second = Answer()
    batcher.submit(Request((7,) * 10, 2), second)
    engine.permit()
    assert second.ids() == [8, 9]
    first.end()
    begin = engine.calls.index("join 10")
    assert engine.calls[begin : begin + 7] == [
        *("join 10", "read", "decode 1", "read", "decode 1", "read", "decode 2")
    ]


def test_short_prompts_are_read_together_as_far_as_the_limit_allows(start: Start) -> None:
    engine = Counting(8, permits=0)
    batcher, first = occupied(start, engine, prompt_tokens_per_step=6)
    answers = [Answer() for _ in range(6)]
    for answer, length in zip(answers, (2, 3, 1, 9, 1, 4), strict=True):
        batcher.submit(Request((7,) * length, 1), answer)
    engine.permit()
    for answer in (first, *answers):
        answer.end()
    joins = [call for call in engine.calls if call.startswith("join")]
    assert joins == ["join 1", "join 2 3", "join 1", "join 9", "join 1", "join 4"]


def test_a_short_prompt_is_answered_while_long_ones_are_being_read(start: Start) -> None:
    engine = Counting(5, permits=0)
    batcher, first = occupied(start, engine, prompt_tokens_per_step=4)
    long = [Answer() for _ in range(3)]
    for number, answer in enumerate(long):
        batcher.submit(Request((number,) * 400, 1), answer)
    short = Answer()
    batcher.submit(Request((70,) * 3, 2), short)
    engine.permit()
    assert short.ids() == [71, 72]
    # A piece of each of the others may come before it, and all go on in turn.
    joined = engine.calls.index("join 3")
    assert engine.calls[joined : joined + 10].count("decode 2") == 1
    for answer in (*long, first):
        answer.end()


def test_a_stream_of_short_prompts_does_not_hold_up_a_long_one(start: Start) -> None:
    batcher, long = start(Counting(4), prompt_tokens_per_step=4), Answer()
    more = True
    shorts = []

    def again(news: Token | End) -> None:
        if isinstance(news, End) and more:
            shorts.append(news)
            batcher.submit(Request((7,) * 4, 1), again)

    for _ in range(2):
        batcher.submit(Request((7,) * 4, 1), again)
    batcher.submit(Request((7,) * 400, 1), long)
    assert long.ids() == [8]
    more = False
    assert shorts


def test_of_those_that_wait_whoever_has_fewest_slots_is_next(start: Start) -> None:
    engine = Counting(3, permits=0)
    batcher, first = occupied(start, engine)
    order: list[str] = []

    def named(name: str) -> Callable[[Token | End], None]:
        return lambda news: order.append(name) if isinstance(news, End) else None

    for count in range(4):
        batcher.submit(Request((7,), 2), named(f"many {count}"), owner="many")
    last = Answer()
    batcher.submit(Request((7,), 2), named("other"), owner="other")
    batcher.submit(Request((7,), 40), last)
    engine.permit()
    last.end()
    first.end()
    # One of each owner's at first, then whatever is left.
    assert sorted(order[:2]) == ["many 0", "other"]
    assert order[2:] == ["many 1", "many 2", "many 3"]


def test_the_answers_of_one_owner_leave_a_slot_and_the_queue_to_others(start: Start) -> None:
    engine = Counting(3, permits=0)
    batcher = start(engine, queue=1)
    many = [Answer() for _ in range(8)]
    for answer in many:
        batcher.submit(Request((7,), 300), answer, owner="many")
    assert engine.decoding.wait(PATIENCE)
    assert batcher.state().active == 2
    other = Answer()
    batcher.submit(Request((70,), 2), other, owner="other")
    engine.permit()
    assert other.ids() == [71, 72]
    assert batcher.state().waiting
    for answer in many:
        answer.end()


@pytest.mark.parametrize("remembers", [True, False])
def test_one_long_prompt_of_several_answers_is_read_once(start: Start, remembers: bool) -> None:
    """Where beginnings are remembered; where not, what is read is no more than it has to be."""
    engine = Counting(8, permits=0, remembers=remembers)
    batcher, first = occupied(start, engine, prompt_tokens_per_step=16, queue=8)
    before = len(engine.pieces)
    copies, prompt = [Answer() for _ in range(6)], tuple(range(300))
    for answer in copies:
        batcher.submit(Request(prompt, 3), answer, owner="n=6")
    short = Answer()
    batcher.submit(Request((900,) * 5, 2), short)
    engine.permit()
    assert short.ids() == [901, 902]
    assert [answer.ids() for answer in copies] == [[300, 301, 302]] * 6
    read = sum(tokens for begin, tokens in engine.pieces[before:] if begin == 0)
    # The last token of each is read, because the next one follows from it.
    assert read == (300 + 5 if remembers else 6 * 300)
    first.end()


def test_when_the_answer_that_reads_a_prompt_is_cancelled_another_one_does(start: Start) -> None:
    engine = Counting(8, permits=0, remembers=True)
    batcher, first = occupied(start, engine, prompt_tokens_per_step=16)
    answers, prompt = [Answer() for _ in range(3)], tuple(range(300))
    tickets = [batcher.submit(Request(prompt, 2), answer) for answer in answers]
    engine.permit(5)
    while len(engine.pieces) < 4:
        time.sleep(0.001)
    tickets[0].cancel()
    engine.permit()
    assert answers[0].ids() == []
    assert [answer.ids() for answer in answers[1:]] == [[300, 301]] * 2
    assert engine.calls.count("join 300") == 3
    first.end()


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
    common=st.integers(0, 60),
    remembers=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_a_short_prompt_waits_for_one_piece_of_each_other_at_most(
    lengths: list[int], common: int, remembers: bool
) -> None:
    """And all are answered, whatever they have in common."""
    engine = Counting(len(lengths) + 2, permits=0, remembers=remembers)
    batcher = Batcher(engine, queue=8, prompt_tokens_per_step=16)
    try:
        first = Answer()
        batcher.submit(Request((500,), 100), first)
        assert engine.decoding.wait(PATIENCE)
        answers = [Answer() for _ in lengths]
        for number, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            prompt = (number,) * max(1, length - common)
            prompt = (7,) * min(common, length - 1) + prompt if number else (7,) * length
            batcher.submit(Request(prompt, 1), answer)
        short = Answer()
        batcher.submit(Request((900,), 2), short)
        engine.permit()
        assert short.ids() == [901, 902]
        begins = [begin for begin, _ in engine.pieces[1:]]
        assert begins.index(900) <= len(lengths)
        for number, answer in enumerate(answers):
            assert answer.ids() == [number + 1 if number else 8]
    finally:
        batcher.close(timeout=0)
