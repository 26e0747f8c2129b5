"""Looking back on the step of a model that FSDP2 shards; of others see `test_loops`, of several processes `trl.test_fsdp2`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from fsdp2_cases import OPTIMIZERS, Case, loss_of, train
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from entropy_fast import EstimateOptions, RunOptions
from entropy_fast.distributed.team import Team
from entropy_fast.integrations.looking_back import KeptPolicy

OPTIONS = EstimateOptions(weighting="sequence", baseline="responses")

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"
)


def values_of(model: nn.Module) -> list[torch.Tensor]:
    """Of what the optimizer steps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def test_a_policy_that_is_sharded_is_the_one_that_is_whole(one_process: None) -> None:
    case = Case("gpt2", lora=False)
    own, whole = case.sharded(), case.plain()
    found, batch = {}, own.batch
    for name, model, optimizer in (
        ("whole", whole, OPTIMIZERS[case.optimizer](whole.parameters())),
        ("sharded", own.model, own.optimizer),
    ):

        def look(model: nn.Module = model) -> None:
            with torch.no_grad():
                loss_of(model, batch)  # after which FSDP2 leaves whole parameters where the shards were

        look()
        kept = KeptPolicy(model)
        train(model, optimizer, batch, 3)
        moved = values_of(model)
        look()
        found[name] = kept.change_since(optimizer, batch, estimate=OPTIONS, run=RunOptions(), team=Team.alone())
        assert all(torch.equal(p, here) for p, here in zip(values_of(model), moved, strict=True))
    one, other = (dataclasses.asdict(found[name]) for name in ("whole", "sharded"))
    assert abs(one["direct"]) > 1e-6  # the steps did something
    assert other == pytest.approx(one, rel=1e-9, abs=1e-12, nan_ok=True)
