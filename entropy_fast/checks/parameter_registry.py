"""The trainable parameters of the module that runs the forward, collected once and checked again at every use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from entropy_fast.checks.sharding import refuse_sharded
from entropy_fast.checks.tensor_parallel import refuse_tensor_parallel
from entropy_fast.errors import ModelStateError, ParameterRegistryError

__all__ = ["ParameterRegistry", "RegisteredParameter", "unwrap_model"]


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module under DistributedDataParallel and ``torch.compile`` wrappers (PEFT models stay as they are)."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


@dataclasses.dataclass(frozen=True)
class RegisteredParameter:
    """One trainable parameter.

    Attributes:
        name: its name in ``module.named_parameters()``.
        tensor: the parameter object itself.
        group: index of its optimizer group, None when the optimizer does not hold it.
    """

    name: str
    tensor: nn.Parameter
    group: int | None


@dataclasses.dataclass(frozen=True)
class ParameterRegistry:
    """Trainable parameters in ``named_parameters()`` order, tied ones once.

    Attributes:
        module: the unwrapped module that runs the forward.
        parameters: what was trainable when the registry was built.
    """

    module: nn.Module
    parameters: tuple[RegisteredParameter, ...]

    @classmethod
    def build(cls, model: nn.Module, group_of: Mapping[str, int]) -> ParameterRegistry:
        """Collect the trainable parameters.

        Args:
            model: the model, possibly wrapped.
            group_of: parameter name -> optimizer group, for the parameters the optimizer holds.

        Raises:
            ModelStateError: nothing is trainable, a parameter was created under inference mode, parameters are flattened or
                sharded, layers are split over ranks, or a hook would act on gradients as they are accumulated.
        """
        refuse_sharded(model)
        module = unwrap_model(model)
        refuse_tensor_parallel(module)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for name, parameter in module.named_parameters():
            if parameter.is_inference():
                raise ModelStateError(
                    f"parameter '{name}' was created under torch.inference_mode(); autograd can never use it.",
                    fix="load or build the model (and its adapter) outside inference mode.",
                )
        on_meta = next((name for name, p in module.named_parameters() if p.is_meta), None)
        if on_meta is not None:
            raise ModelStateError(
                f"parameter '{on_meta}' is on the meta device: it has a shape but no values.",
                fix="load the weights (from_pretrained, or to_empty and load_state_dict) before probing.",
            )
        if not named:
            raise ModelStateError(
                f"{type(module).__name__} has no trainable parameter (requires_grad is False on all "
                f"{sum(1 for _ in module.parameters())}).",
                fix="load the adapter with is_trainable=True, set requires_grad on what the optimizer trains, and do not probe "
                "inside disable_adapter(), which freezes the adapter.",
            )
        _refuse_gradient_hooks(named)
        return cls(module, tuple(RegisteredParameter(name, p, group_of.get(name)) for name, p in named))

    @property
    def tensors(self) -> list[Tensor]:
        """The parameter tensors in registry order."""
        return [p.tensor for p in self.parameters]

    @property
    def names(self) -> list[str]:
        """The parameter names in registry order."""
        return [p.name for p in self.parameters]

    @property
    def numel(self) -> int:
        """Number of trainable elements."""
        return sum(p.tensor.numel() for p in self.parameters)

    def pieces(self, places: Sequence[int], cut: Callable[[int, Tensor], Tensor]) -> ParameterRegistry:
        """Pieces of some of the parameters, which stand for them where gradients are kept.

        Args:
            places: of the parameters.
            cut: by place and tensor, the piece.
        """
        found = []
        for place in places:
            whole = self.parameters[place]
            piece = nn.Parameter(cut(place, whole.tensor.detach()), requires_grad=False)
            found.append(dataclasses.replace(whole, tensor=piece))
        return ParameterRegistry(self.module, tuple(found))

    def check(self, where: str) -> None:
        """Raise unless the module's trainable parameters are still the registered objects.

        Raises:
            ParameterRegistryError: one was replaced, added, removed or frozen since; the message names it.
            ModelStateError: one has got a hook that would act on its gradient.
        """
        _refuse_gradient_hooks([(p.name, p.tensor) for p in self.parameters])
        now = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        problem = None
        for registered in self.parameters:
            current = now.pop(registered.name, None)
            if current is None:
                problem = f"parameter '{registered.name}' is gone or no longer trainable"
            elif current is not registered.tensor:
                problem = f"parameter '{registered.name}' was replaced by another object"
            if problem:
                break
        if problem is None and now:
            problem = f"parameter '{next(iter(now))}' became trainable ({len(now)} new in all)"
        if problem:
            raise ParameterRegistryError(
                f"{where}: {problem} after the probe collected the model's parameters; the optimizer state it was matched "
                "with belongs to the old ones.",
                fix="build the probe again after setting adapters, wrapping or freezing; do not change the model in "
                "between, and do not probe inside disable_adapter(), which freezes the adapter.",
            )


def _refuse_gradient_hooks(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in named:
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ModelStateError(
                f"parameter '{name}' has a post-accumulate-grad hook (an optimizer step fused into backward?); the probe's "
                "backward would trigger it and change the model.",
                fix="remove the hook while probing.",
            )
