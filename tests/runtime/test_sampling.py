import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.sampling import Sampler, Sampling, penalise, probabilities
from thanos_deploy.errors import UsageError

VOCABULARY = 60


def logits(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(scale=3, size=VOCABULARY).astype(np.float32)


def by_transformers(scores: np.ndarray, seen: list[int], sampling: Sampling) -> np.ndarray:
    ids = torch.tensor([seen])
    out = torch.tensor(scores, dtype=torch.float64)[None]
    steps = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    for step in steps:
        out = step(ids, out)
    return np.asarray(out.softmax(dim=-1)[0])


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, VOCABULARY + 5),
    top_p=st.floats(0.05, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
    penalty=st.floats(0.5, 2.0),
    seen=st.lists(st.integers(0, VOCABULARY - 1), min_size=1),
)
@settings(max_examples=200, deadline=None)
def test_what_is_drawn_from_is_what_transformers_draws_from(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen: list[int],
) -> None:
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    scores = penalise(logits(seed), set(seen), penalty)
    np.testing.assert_allclose(
        probabilities(scores, sampling), by_transformers(logits(seed), seen, sampling), atol=1e-12
    )


def test_without_a_temperature_the_likeliest_token_is_taken() -> None:
    assert Sampler(Sampling(), []).choose(logits(0)) == logits(0).argmax()


def test_a_token_that_was_chosen_counts_as_seen() -> None:
    scores = np.array([5.0, 4.0, 3.9], dtype=np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [])
    assert [sampler.choose(scores) for _ in range(3)] == [0, 1, 2]


def test_draws_follow_their_probabilities_and_their_seed() -> None:
    sampling = Sampling(temperature=1.0, top_k=5, seed=3)
    drawn = [Sampler(sampling, [], row).choose(logits(1)) for row in range(4000)]
    odds = probabilities(logits(1).astype(np.float64), sampling)
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert (counts[odds == 0] == 0).all()
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - 4000 * odds) <= 5 * np.sqrt(4000 * odds * (1 - odds))).all()
    again = [Sampler(sampling, [], row).choose(logits(1)) for row in range(50)]
    assert again == drawn[:50]
    other = Sampling(temperature=1.0, top_k=5, seed=5000)
    assert [Sampler(other, [], row).choose(logits(1)) for row in range(50)] != again


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_a_usage_error(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} {value}"):
        Sampling(**{name: value})  # type: ignore[arg-type]


FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
TINY = 5e-324


def positive(most: float) -> st.SearchStrategy[float]:
    """Every float above 0, the smallest and the largest often."""
    return st.sampled_from([TINY, 1e-310, 2.3e-308, 1e-45, most]) | st.floats(
        0, most, exclude_min=True, allow_subnormal=True
    )


@pytest.mark.slow
@given(
    row=st.lists(FLOAT32, min_size=1, max_size=40)
    | st.lists(st.sampled_from([0.0, -0.0, 3.4e38, -3.4e38, 1e-45]), min_size=1, max_size=40),
    sampling=st.builds(
        Sampling,
        temperature=st.just(0.0) | positive(1.7e308),
        top_k=st.integers(0, 50),
        top_p=positive(1.0),
        min_p=st.just(0.0) | positive(1.0),
        repetition_penalty=positive(1.7e308),
        seed=st.integers(0, 1 << 64),
    ),
    seen=st.lists(st.integers(0, 39)),
)
@settings(max_examples=500, deadline=None)
def test_every_finite_logit_and_every_allowed_value_give_a_token(
    row: list[float], sampling: Sampling, seen: list[int]
) -> None:
    scores = np.array(row, dtype=np.float32)
    sampler = Sampler(sampling, [token for token in seen if token < len(row)])
    assert 0 <= sampler.choose(scores) < len(row)
    if sampling.temperature:
        odds = probabilities(penalise(scores, [], 1.0), sampling)
        assert np.isfinite(odds).all()
        np.testing.assert_allclose(odds.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("temperature", [TINY, 1e-310, 1e-45, 1e-9])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    for seed in range(20):
        row = logits(seed)
        assert Sampler(Sampling(temperature=temperature), []).choose(row) == row.argmax()


def test_a_draw_at_the_very_end_is_the_last_possible_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_k=2), [])

    class Last:
        def random(self) -> float:
            return float(np.nextafter(1, 0))

    monkeypatch.setattr(sampler, "_random", Last())
    assert sampler.choose(np.array([1, 1, 0, 0], dtype=np.float32)) == 1


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    allowed=st.lists(st.booleans(), min_size=8, max_size=8).filter(any),
    temperature=st.sampled_from([0.0, 1e-300, 0.7, 2.0]),
    penalty=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, 7), st.floats(-100, 100), max_size=8),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.01, 1),
)
def test_only_what_is_allowed_is_chosen(
    logits: list[float],
    allowed: list[bool],
    temperature: float,
    penalty: float,
    bias: dict[int, float],
    top_k: int,
    top_p: float,
) -> None:
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=1.3,
        frequency_penalty=penalty,
        presence_penalty=penalty,
    )
    sampler = Sampler(sampling, [1, 2], bias=bias)
    for _ in range(3):
        assert allowed[sampler.choose(np.array(logits, np.float32), np.array(allowed))]
