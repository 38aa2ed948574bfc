from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import Engine, open_engine
from runtime.generate import generate, generate_batch
from runtime.sampling import Sampling
from tests.conftest import VOCABULARY
from thanos_deploy.errors import UsageError


@pytest.fixture(scope="module")
def engine(exported_llama: Path) -> Engine:
    return open_engine(exported_llama)


PROMPTS = [[72, 101, 108, 108, 111], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


def columns(engine: Engine, **options: Any) -> list[tuple[int | None, ...]]:
    """What each prompt of the batch is continued with."""
    return list(zip(*generate_batch(engine, PROMPTS, **options), strict=True))


def test_a_ragged_batch_generates_what_each_prompt_does_alone(engine: Engine) -> None:
    alone = [list(generate(engine, prompt, new_tokens=20, stop={256})) for prompt in PROMPTS]
    together = columns(engine, new_tokens=20, stop={256})
    assert [[token for token in column if token is not None] for column in together] == alone


def test_a_sequence_that_has_ended_stays_ended_and_the_others_go_on(engine: Engine) -> None:
    free = columns(engine, new_tokens=12)
    end = free[1][3]
    assert end is not None
    for before, after in zip(free, columns(engine, new_tokens=12, stop={end}), strict=True):
        cut = before.index(end) if end in before else len(before)
        assert after[:cut] == before[:cut][: len(after)]
        assert all(token is None for token in after[cut:])


def test_sampling_depends_on_the_seed_and_on_nothing_else(engine: Engine) -> None:
    def run(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=seed)
        return list(generate(engine, PROMPTS[0], new_tokens=16, sampling=sampling))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_tokens_come_one_by_one(engine: Engine) -> None:
    stream = generate(engine, PROMPTS[0], new_tokens=100)
    assert isinstance(stream, Iterator)
    next(stream)
    assert engine._mask.shape[1] == len(PROMPTS[0])  # type: ignore[attr-defined]  # no decode yet


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_nothing_to_continue_is_a_usage_error(engine: Engine, prompts: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="no text to continue"):
        next(generate_batch(engine, prompts, new_tokens=3))


@given(
    st.lists(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=4
    )
)
@settings(max_examples=25, deadline=None)
def test_padding_changes_no_logits(prompts: list[list[int]]) -> None:
    seen = []

    class Spy:
        max_sequence = 100

        def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            seen.append((ids, np.ones_like(ids) if mask is None else mask))
            return np.zeros((len(ids), VOCABULARY), np.float32)

        def decode(self, ids: np.ndarray) -> np.ndarray:
            return np.zeros((len(ids), VOCABULARY), np.float32)

    next(generate_batch(Spy(), prompts, new_tokens=1))
    ids, mask = seen[0]
    assert [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)] == prompts
    assert (np.diff(mask, axis=1) >= 0).all()  # padding is on the left only
