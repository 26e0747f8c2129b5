"""What is kept of a policy that FSDP2 shards; the rest in the tests of the forecaster and of the trainers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from probe_oracle import models
from probe_oracle.batches import Shape, make_rollouts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from entropy_fast import EstimateOptions, RunOptions
from entropy_fast.distributed.team import Team
from entropy_fast.integrations.forecast_options import ForecastOptions
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.integrations.verification import verification_of

OPTIONS = EstimateOptions(weighting="sequence", baseline="responses")
BATCH = make_rollouts(Shape(sizes=(4, 4, 4), budget=3), models.VOCABULARY, 0)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"
)


@pytest.mark.parametrize("verify", ["previous", "held_out"])
def test_nothing_is_looked_at_that_fsdp2_rounds(one_process: None, verify: Any) -> None:
    model = models.tiny_transformer().float()
    window = StepWindow(BATCH, torch.zeros(BATCH.input_ids.shape, dtype=torch.float64))
    held_out = {"held_out": lambda window, prompts: BATCH} if verify == "held_out" else {}
    options = ForecastOptions(verify=verify, **held_out)  # type: ignore[arg-type]
    for dtype, needed in ((torch.bfloat16, False), (torch.float32, verify == "previous")):
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        own = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        optimizer = torch.optim.AdamW(own.parameters())
        found = verification_of(options, own, optimizer, window, 3, OPTIONS, RunOptions(), Team.alone())
        assert found is not None and found.needs_window == needed
        if dtype == torch.bfloat16:
            realised, why = found.found(optimizer, window, Team.alone())
            assert realised is None and "rounds parameters to torch.bfloat16" in why
