import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.tensorrt.profiles import profiles, shapes
from thanos_deploy.errors import UsageError

CACHE = ("batch", 3, "past", 64)


def test_shapes_of_every_input_for_prefill_and_decode() -> None:
    prefill, decode = profiles([1, 8], [128, 1024], 2048)
    assert shapes(prefill, ("batch", "sequence")) == ((1, 1), (1, 128), (8, 1024))
    assert shapes(prefill, ("batch", "total")) == ((1, 1), (1, 128), (8, 1024))
    assert shapes(prefill, CACHE) == ((1, 3, 0, 64), (1, 3, 0, 64), (8, 3, 0, 64))
    assert shapes(decode, ("batch", "sequence")) == ((1, 1), (1, 1), (8, 1))
    assert shapes(decode, ("batch", "total")) == ((1, 2), (1, 129), (8, 2048))
    assert shapes(decode, CACHE) == ((1, 3, 1, 64), (1, 3, 128, 64), (8, 3, 2047, 64))


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=3),
    st.lists(st.integers(1, 4096), min_size=1, max_size=3),
    st.integers(2, 8192),
)
def test_profiles_are_ordered_and_never_longer_than_the_model(
    batch: list[int], prompt: list[int], longest: int
) -> None:
    if max(prompt) > longest:
        with pytest.raises(UsageError, match="together"):
            profiles(batch, prompt, longest)
        return
    for way in profiles(batch, prompt, longest):
        for dims in (("batch", "sequence"), ("batch", "total"), CACHE):
            least, usual, most = shapes(way, dims)
            assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        assert shapes(way, ("total",))[2][0] <= longest


@pytest.mark.parametrize(("batch", "prompt"), [([], [1]), ([0], [1]), ([1], [0, 5])])
def test_sizes_that_are_not_positive_are_refused(batch: list[int], prompt: list[int]) -> None:
    with pytest.raises(UsageError, match="positive"):
        profiles(batch, prompt, 128)
