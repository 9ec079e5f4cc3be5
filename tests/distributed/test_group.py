"""The process group that the other tests here run on."""

import pytest
import torch
import torch.distributed as dist


def _sum_of_ranks() -> float:
    ranks = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(ranks)
    return ranks.item()


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("as asked")
    dist.barrier()


@pytest.mark.parametrize("size", ["two", "four"])
def test_every_rank_runs_the_function(size, request):
    group = request.getfixturevalue(size)
    assert group(_sum_of_ranks) == [sum(range(group.world))] * group.world


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_is_told_with_its_traceback_and_does_not_stop_the_next_call(two, rank):
    with pytest.raises(AssertionError, match=f"rank {rank} of 2(?s:.)*ValueError: as asked"):
        two(_fail_on, rank)
    assert two(_sum_of_ranks) == [1.0, 1.0]
