"""Numbers of all ranks from what each of them has; with several ranks in tests/sharded and tests/distributed/test_team.py."""

from __future__ import annotations

import torch
from probe_models.batches import make_rollouts

from entropy_fast.distributed import Team
from entropy_fast.distributed.dealing import Share
from entropy_fast.distributed.layout import Layout


def share() -> Share:
    batch = make_rollouts((2, 3, 2))
    return Share(Team.alone(), batch, [[0], [1], [2]], [[0, 2]])


def test_all_parameters_of_own_units_are_complete_where_a_process_is_alone() -> None:
    layout = Layout(Team.alone(), None, 2)
    own = torch.randn(2, 3, dtype=torch.float64)
    assert layout.units(share()) == [0, 2]
    assert layout.add_parameters([1.0, 2.0]) == [1.0, 2.0]
    assert layout.of_all_parameters(own) is own
    assert torch.equal(layout.complete(own.clone()), own)


def test_own_elements_of_all_units_stand_at_their_parameters_places() -> None:
    layout = Layout(Team.alone(), ((3, 1),), 5)
    own = torch.arange(6.0).view(2, 3)
    assert layout.units(share()) == [0, 1, 2]
    found = layout.of_all_parameters(own)
    assert found.tolist() == [[0, 0, 0], [3, 4, 5], [0, 0, 0], [0, 1, 2], [0, 0, 0]]
    assert torch.equal(layout.complete(own), found)
    units = own.clone()
    layout.add_units([units])
    assert torch.equal(units, own)
