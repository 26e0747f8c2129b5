"""Models whose single layers are spread over ranks: told by the types of their parameters, and refused."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from entropy_fast.errors import ModelStateError
from entropy_fast.libraries import tensor_parallel_size

__all__ = ["refuse_tensor_parallel"]


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raise for models under tensor parallelism, whole or in part.

    Every engine takes a layer's inputs and output gradients for those of the whole layer. And what only one layer (the output
    layer) has of its own on each rank can be as wrong without a word: tokens of another rank's slice would be looked up in this
    one's. Parameters that FSDP2 shards are no matter of this check, unless they are split within their layer too.

    Raises:
        ModelStateError: a parameter is a DTensor that tensor parallelism made, or transformers says that the model is split.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None:
        sharded_later = _under_fsdp2(model)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, module.DTensor) and (id(parameter) not in sharded_later or _splits(parameter) > 1):
                placements = ", ".join(map(repr, parameter.placements))
                _refuse(
                    f"parameter '{name}' is a DTensor with placements ({placements}) on a mesh of "
                    f"{tuple(parameter.device_mesh.shape)}"
                )
    ranks = tensor_parallel_size(model)
    if ranks > 1:
        _refuse(f"transformers says that its layers are split over {ranks} ranks")


def _refuse(found: str) -> None:
    raise ModelStateError(
        f"the model is tensor-parallel: {found}; expected parameters that are whole on this rank, or sharded by FSDP2 alone.",
        fix="probe a model that is not split (loaded without a tensor-parallel plan, or from a checkpoint, offline); for "
        "log-probs and their gradients over a split vocabulary by themselves there is ops.sliced_linear_token_logprobs.",
    )


def _splits(parameter: Any) -> int:
    """In how many dimensions of its mesh it is not whole."""
    return sum(not placement.is_replicate() for placement in parameter.placements)


def _under_fsdp2(model: nn.Module) -> set[int]:
    """Identities of the parameters below modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return set()
    return {id(p) for module in model.modules() if isinstance(module, kind) for p in module.parameters()}
