"""Units dealt to ranks: all of them, once, evenly, and the same wherever it is asked."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from probe_models.batches import make_rollouts

from entropy_fast.distributed import Team
from entropy_fast.distributed.dealing import deal, share_of

COSTS = st.lists(st.integers(1, 1000), max_size=40)


@given(COSTS, st.integers(1, 7))
def test_every_unit_is_dealt_once_and_nobody_has_more_than_a_share_and_a_unit(costs, ranks):
    parts = deal(costs, ranks)
    assert len(parts) == ranks
    assert sorted(number for part in parts for number in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(costs[number] for number in part) for part in parts]
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0)


def test_the_most_costly_goes_first_and_ties_to_the_lower_rank():
    assert deal([1, 5, 4, 3], 2) == [[0, 1], [2, 3]]
    assert deal([2, 2, 2], 2) == [[0, 2], [1]]
    assert deal([3], 3) == [[0], [], []]


def test_alone_a_rank_has_all_and_its_tables_stay_as_they_are():
    batch = make_rollouts((2, 3, 2))
    share = share_of(Team.alone(), batch, [[0], [1, 2]])
    assert share.numbers == [0, 1] and share.prompts == [0, 1, 2] and share.most == 2
    assert share.sizes.tolist() == [1, 2]
    assert sorted(share.rows().tolist()) == list(range(batch.n_sequences))
    table = torch.randn(batch.n_sequences)
    before = table.clone()
    share.fill([table])
    assert torch.equal(table, before)
