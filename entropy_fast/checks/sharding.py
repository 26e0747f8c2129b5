"""Models whose parameters are not whole on this process, told by their types: what is read off them would be of a piece.

Nothing is imported for that: a model that holds an instance of a class has imported its library.
"""

from __future__ import annotations

from torch import nn

from entropy_fast.errors import ModelStateError
from entropy_fast.libraries import flattened_by_fsdp

__all__ = ["refuse_sharded"]

_FLATTENED = (
    "FSDP1 keeps parameters, gradients and second moments as flattened shards, which cannot be matched to the model's "
    "parameters."
)
_WHOLE_STATES = (
    "save whole states with torch.distributed.checkpoint.state_dict (get_model_state_dict and get_optimizer_state_dict, "
    "StateDictOptions(full_state_dict=True)), or a folder with torch.distributed.checkpoint.save, and probe an unwrapped model "
    "with that."
)
_BY_ALL_RANKS = (
    "where fully_shard has sharded it over all ranks, call fast_delta_h1 on every rank with RunOptions(ranks='all'). Elsewhere "
    + _WHOLE_STATES
)
_CONSOLIDATED = (
    "consolidate the checkpoint, and probe the model without its engine, with torch.optim.AdamW on whole parameters or with "
    "the optimizer file of one."
)


def refuse_sharded(model: object) -> None:
    """Raise where parameters are flattened, partitioned or sharded.

    Sharded parameters that are frozen are let pass: a gradient of them is never asked for.

    Args:
        model: possibly wrapped, or what a wrapper holds.

    Raises:
        ModelStateError: it is, holds, or is held by FSDP1 or DeepSpeed, or trains a parameter that FSDP2 or tensor parallelism
            has sharded.
    """
    if not isinstance(model, nn.Module):
        return  # who reads it next says what it is
    parameters = list(model.named_parameters())
    # Between a forward and its backward the outermost module of FSDP2 shows whole parameters, which it replaces again.
    gathered = any(p.requires_grad for _, p in parameters) and not any(_is_dtensor(p) for _, p in parameters)
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            _refuse_wrapper(name, kind, gathered=gathered)
    for name, parameter in parameters:
        _refuse_parameter(name, parameter)


def _refuse_wrapper(name: str, kind: type, *, gathered: bool) -> None:
    who = f"the model {f'holds, as {name!r},' if name else 'is'} a {kind.__module__}.{kind.__qualname__}"
    if kind.__name__ == "FullyShardedDataParallel":
        raise ModelStateError(f"{who}: {_FLATTENED}", fix=_WHOLE_STATES)
    if kind.__name__ == "FSDPModule" and gathered:
        raise ModelStateError(f"{who} of FSDP2, whose parameters are whole for the moment alone.", fix=_BY_ALL_RANKS)
    if kind.__module__.split(".")[0] == "deepspeed" and kind.__name__.endswith("Engine"):
        raise ModelStateError(
            f"{who}: DeepSpeed steps on flattened copies of its own, which ZeRO partitions over ranks, and no gradient stands "
            "beside the parameters when it does.",
            fix=_CONSOLIDATED,
        )


def _refuse_parameter(name: str, parameter: nn.Parameter) -> None:
    if flattened_by_fsdp(parameter):
        raise ModelStateError(f"parameter '{name}' belongs to FSDP1, around the model: {_FLATTENED}", fix=_WHOLE_STATES)
    if hasattr(parameter, "ds_id"):
        raise ModelStateError(
            f"parameter '{name}' is partitioned by DeepSpeed's ZeRO stage 3, and has no values between forwards.",
            fix=_CONSOLIDATED,
        )
    if parameter.requires_grad and _is_dtensor(parameter):
        raise ModelStateError(
            f"parameter '{name}' is a DTensor, sharded by FSDP2 or tensor parallelism: this process holds a piece of it, of "
            "its gradient and of its moments.",
            fix=_BY_ALL_RANKS,
        )


def _is_dtensor(parameter: nn.Parameter) -> bool:
    return any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__)
