"""Models in fp64 with stepped optimizers, which no probe changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from probe_oracle import models
from torch import nn


@pytest.fixture(scope="module")
def setups() -> Iterator[dict[str, tuple[nn.Module, torch.optim.Optimizer]]]:
    """A transformer that is written out, and a Qwen2 whose norm computes in its own dtype."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    patch = pytest.MonkeyPatch()
    patch.setattr(Qwen2RMSNorm, "forward", models.double_precision_norm)
    built = {name: make() for name, make in (("tiny", models.tiny_transformer), ("qwen2", models.qwen2))}
    yield {name: (model.train(), models.stepped_adam(model)) for name, model in built.items()}
    patch.undo()
