"""How work is divided: pure functions of sizes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thanos_deploy.errors import UsageError
from thanos_deploy.ranks.group import Ranks
from thanos_deploy.ranks.schedule import Job, even, factor_cost, job_cost, owners, pieces
from thanos_deploy.ranks.shards import TOKENS_PER_BATCH, Layout
from thanos_deploy.ranks.sums import OrderedSum, run_of, whole_of

jobs = st.builds(
    lambda layer, rows, cols: Job(layer % 4, layer, rows, cols),
    layer=st.integers(0, 11),
    rows=st.integers(1, 4096),
    cols=st.sampled_from([64, 512, 4096]),
)


@given(
    count=st.integers(1, 600),
    length=st.integers(1, 5000),
    further=st.sampled_from([0, 1, 7, 300]),
)
def test_batches_are_all_segments_in_order_and_shards_run_on(
    count: int, length: int, further: int
) -> None:
    layout = Layout.of(count, length, further)
    assert [n for one in layout.batches for n in range(one.first, one.stop)] == list(
        range(count + further)
    )
    for one in layout.batches:
        assert one.stop - one.first == 1 or (one.stop - one.first) * length <= TOKENS_PER_BATCH
    shards = [shard for shard, _ in itertools.groupby(one.shard for one in layout.batches)]
    assert shards == list(range(len(shards)))
    counted = [one for one in layout.batches if one.counted]
    assert layout.shards == min(32, len(counted))
    # What statistics are taken of is cut as if nothing followed.
    assert counted == list(Layout.of(count, length).batches)
    assert {one.shard for one in counted}.isdisjoint(
        one.shard for one in layout.batches if not one.counted
    )


@given(count=st.integers(1, 600), length=st.integers(1, 5000), size=st.integers(1, 32))
def test_every_shard_is_one_ranks_and_every_rank_has_one(
    count: int, length: int, size: int
) -> None:
    layout = Layout.of(count, length)
    ranks = [Ranks(rank, size) for rank in range(size)]
    if size > layout.shards:
        with pytest.raises(UsageError, match=f"{size} processes"):
            layout.require(size)
        return
    layout.require(size)
    own = [[shard for shard in range(layout.shards) if one.owns(shard)] for one in ranks]
    assert sorted(itertools.chain(*own)) == list(range(layout.shards))
    assert all(own)
    assert max(map(len, own)) == ranks[0].turns(layout.shards)


@given(count=st.integers(1, 40), size=st.integers(1, 8), first=st.integers(0, 7))
def test_the_parts_of_a_sum_are_computed_once_each(count: int, size: int, first: int) -> None:
    sums = [OrderedSum(Ranks(rank, size), count, first % size) for rank in range(size)]
    parts = [one.mine(turn) for one in sums for turn in range(one.turns)]
    assert sorted(part for part in parts if part is not None) == list(range(count))


def test_a_rank_by_itself_adds_in_the_order_of_the_parts() -> None:
    parts = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    sums = OrderedSum(Ranks(0, 1), len(parts))
    for part in parts:
        sums.add([part.clone(), part[:3].clone()])
    wanted = parts[0].clone()
    for part in parts[1:]:
        wanted += part
    whole, few = sums.finish()
    assert torch.equal(whole, wanted)
    assert torch.equal(few, wanted[:3])


@given(entries=st.integers(1, 1000), size=st.integers(1, 9))
def test_runs_cover_a_tensor_and_end_where_no_vector_does(entries: int, size: int) -> None:
    tensor = torch.arange(1, entries + 1)
    runs = [run_of(Ranks(rank, size), tensor) for rank in range(size)]
    assert {len(run) % 64 for run in runs} == {0}
    assert len({len(run) for run in runs}) == 1
    together = torch.cat(runs)
    assert torch.equal(together[:entries], tensor)
    assert not together[entries:].any()
    if size == 1:
        assert torch.equal(whole_of(Ranks(0, 1), runs[0], tensor.shape), tensor)


@given(count=st.integers(1, 100), parts=st.integers(1, 20))
def test_even_runs_cover_everything_and_differ_by_one(count: int, parts: int) -> None:
    runs = even(count, parts)
    assert [n for run in runs for n in range(run.start, run.stop)] == list(range(count))
    lengths = [run.stop - run.start for run in runs]
    assert 1 <= min(lengths) >= max(lengths) - 1
    assert len(runs) == min(count, parts)


@given(rows=st.integers(1, 100_000), device=st.sampled_from(["cpu", "cuda"]))
def test_pieces_are_wide_enough_to_be_worth_it(rows: int, device: str) -> None:
    whole, most = {"cpu": (512, 1024), "cuda": (16384, 16384)}[device]
    found = pieces(rows, device)
    assert [n for one in found for n in (one.start, one.stop)][1:-1:2] == [
        one.start for one in found[1:]
    ]
    assert (found[0].start, found[-1].stop) == (0, rows)
    assert len(found) <= 8
    assert (len(found) == 1) == (rows <= whole)
    assert len(found) == 1 or min(one.stop - one.start for one in found) >= whole // 2
    assert len(found) == 8 or max(one.stop - one.start for one in found) <= most


@given(work=st.lists(jobs, max_size=12), ranks=st.integers(1, 5))
def test_the_busiest_rank_is_not_far_from_the_mean(work: list[Job], ranks: int) -> None:
    chosen = owners(work, ranks)
    assert len(chosen) == len(work)
    assert set(chosen) <= set(range(ranks))
    busy = [
        sum(job_cost(job) for job, owner in zip(work, chosen, strict=True) if owner == rank)
        for rank in range(ranks)
    ]
    largest = max((job_cost(job) + 2 * factor_cost(job.cols) for job in work), default=0.0)
    factors = sum({job.group: factor_cost(job.cols) for job in work}.values())
    # List scheduling: no rank ends later than the mean and one job more, factors included.
    assert max(busy) <= sum(busy) / ranks + largest + factors + 1e-6
