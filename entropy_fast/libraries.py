"""What is taken from inside peft, transformers and torch's FSDP, in one place, and imported when it is used.

Their private names move; here is where to look when they have. Classes are told by their names: a model that holds an instance
of one has imported its library, and a model that holds none needs no import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Fsdp2Settings",
    "attention_configurations",
    "attention_function",
    "dequantized_weight",
    "embedding_scale",
    "flattened_by_fsdp",
    "fsdp2_casts",
    "fsdp2_hooks",
    "fsdp2_settings",
    "is_exactly",
    "overwrites_what_it_saved",
    "prompt_learning",
    "runs_its_own_forward",
    "tensor_parallel_size",
    "trainer_decay_names",
    "transformers_base",
]

_IMPLEMENTATION = "_attn_implementation_internal"
_OVERWRITERS = ("liger", "unsloth")  # in the name of a package; a kernel hub puts more around it


def is_exactly(module: object, *classes: str) -> bool:
    """Whether the class of ``module`` (no subclass of it) is one of those, such as ``peft.tuners.lora.layer.Linear``."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" in classes


def dequantized_weight(layer: nn.Module) -> Tensor:
    """The weight of a peft layer's base, whatever it is stored as."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer)
    return weight


def flattened_by_fsdp(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a flattened one of torch's FSDP1, or shows a part of one under its original name."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


@dataclasses.dataclass(frozen=True)
class Fsdp2Settings:
    """How ``fully_shard`` was called on a module, and what its gradients are at.

    Attributes:
        param_dtype: that forwards see its parameters in; None for their own.
        offloads: whether shards are kept on the CPU, and gathered from there.
        sharded: identities of its parameters while they are sharded.
        unreduced: whether gradients wait to be added up over ranks (``set_requires_gradient_sync(False)``).
    """

    param_dtype: torch.dtype | None
    offloads: bool
    sharded: frozenset[int]
    unreduced: bool


def fsdp2_settings(module: Any) -> Fsdp2Settings:
    """Of a module that ``fully_shard`` was called on."""
    state = module._get_fsdp_state()
    # Older versions of torch know one group, or None.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    sharded = [parameter for group in groups if group is not None for parameter in group.fsdp_params]
    waiting = [
        gradient
        for parameter in sharded
        for gradient in (
            parameter.unsharded_accumulated_grad,
            getattr(getattr(parameter, "_unsharded_param", None), "grad", None),
        )
    ]
    return Fsdp2Settings(
        state._mp_policy.param_dtype,
        any(parameter.offload_to_cpu for parameter in sharded),
        frozenset(id(parameter.sharded_param) for parameter in sharded),
        any(gradient is not None for gradient in waiting),
    )


def fsdp2_casts(module: Any) -> tuple[Callable[[Any, Any], tuple[Any, Any]] | None, Callable[[Any], Any] | None]:
    """What a module's mixed precision policy makes of its forward's arguments, and of what that returns; None for nothing."""
    state = module._get_fsdp_state()
    policy = state._mp_policy
    casts_inputs = policy.cast_forward_inputs and policy.param_dtype is not None
    return (
        state._cast_forward_inputs if casts_inputs else None,
        None if policy.output_dtype is None else state._cast_output_dtype,
    )


def fsdp2_hooks(module: nn.Module) -> tuple[list[int], list[int]]:
    """Keys of the hooks that FSDP2 has before and after a module's forward."""
    before, after = (
        [key for key, hook in hooks.items() if _is_of_fsdp2(hook)]
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    )
    return before, after


def _is_of_fsdp2(hook: Any) -> bool:
    while hook is not None:
        kinds = type(getattr(hook, "__self__", None)).__mro__
        if any(kind.__name__ == "FSDPState" for kind in kinds):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


def overwrites_what_it_saved(module: nn.Module) -> bool:
    """Whether a module's forward is of a library whose backwards write their results over the activations that they saved.

    Liger's and Unsloth's gated products do, from Triton, where autograd does not see it: a first backward is right, and a
    second one over the same graph goes through what the first has left.
    """
    function = getattr(module.forward, "__func__", module.forward)
    return any(name in getattr(function, "__module__", "").split(".")[0] for name in _OVERWRITERS)


def embedding_scale(layer: nn.Module) -> Tensor | None:
    """What a peft layer over a scaled embedding multiplies its adapters' share by; None where the embedding has no scale."""
    scale: Tensor | None = layer._get_embed_scale()  # type: ignore[operator]
    return scale


def transformers_base(module: nn.Module) -> Any:
    """The transformers model under adapter wrappers, of which the decoder and the output layer are known; None for others."""
    from transformers import PreTrainedModel

    unwrap = getattr(module, "get_base_model", None)
    base = unwrap() if callable(unwrap) else module
    return base if isinstance(base, PreTrainedModel) and base.base_model is not base else None


def attention_configurations(module: nn.Module) -> list[Any]:
    """The configurations under ``module`` that say which attention function its layers use."""
    found = (getattr(submodule, "config", None) for submodule in module.modules())
    return list({id(c): c for c in found if hasattr(c, _IMPLEMENTATION)}.values())


@contextlib.contextmanager
def attention_function(configurations: Sequence[Any], function: Callable[..., Any]) -> Iterator[None]:
    """Let every layer that these configurations belong to get ``function`` for its attention."""
    from transformers import AttentionInterface

    name = f"entropy_fast_{uuid.uuid4().hex}"
    before = [(config, getattr(config, _IMPLEMENTATION)) for config in configurations]
    try:
        AttentionInterface.register(name, function)
        for config, _ in before:
            setattr(config, _IMPLEMENTATION, name)
        yield
    finally:
        for config, implementation in before:
            setattr(config, _IMPLEMENTATION, implementation)
        AttentionInterface._global_mapping.pop(name, None)


def tensor_parallel_size(module: nn.Module) -> int:
    """Over how many ranks transformers split a model's layers as it loaded it; 1 where it did not.

    Versions before 5 leave plain tensors with this rank's part in some layers, which nothing else tells from whole ones.
    """
    found = (vars(submodule).get("_tp_size") for submodule in module.modules())
    return max((size for size in found if isinstance(size, int)), default=1)


def trainer_decay_names(module: nn.Module) -> set[str]:
    """Names of the parameters that transformers' Trainer puts into its group with weight decay.

    The rule is Trainer.get_decay_parameter_names.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    return set(get_parameter_names(module, [torch.nn.LayerNorm], patterns))


def prompt_learning(module: nn.Module) -> bool:
    """Whether a peft model's active adapter puts virtual tokens before every sequence (prompt and prefix tuning)."""
    config = getattr(module, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def runs_its_own_forward(module: nn.Module) -> bool:
    """Whether what stands in place of a module's forward comes down to its class's own, but for casts of what it returns.

    Two libraries put something there: accelerate, autocast around it and outputs in float32; TRL, a forward that scores tokens
    where it is asked to (``fused_lm_head=True``) and calls the one before elsewhere. They may stand on top of each other.
    """
    placed = module.__dict__.get("forward")
    while placed is not None:
        function = getattr(placed, "__func__", placed)
        if function is type(module).forward:
            return True
        inner = getattr(function, "__wrapped__", None)
        if type(inner).__module__.startswith("accelerate."):
            placed = getattr(module, "_original_forward", None)
        else:
            placed = _before_fused_head(function)
    return False


def _before_fused_head(function: Any) -> Any:
    """The forward that TRL's calls unless it is asked to score tokens; None where the function is not TRL's."""
    code = getattr(function, "__code__", None)
    if code is None or function.__globals__.get("__name__") != "trl.trainer.utils" or code.co_name != "_fused_forward":
        return None
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    return cells["original_forward"].cell_contents if "original_forward" in cells else None
