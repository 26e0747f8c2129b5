"""What FSDP2 made of a model: which parameters are sharded and what its forwards see of them; and what of it is not taken."""

from __future__ import annotations

import collections
import dataclasses
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from entropy_fast.errors import ModelStateError
from entropy_fast.libraries import fsdp2_settings

__all__ = ["ShardedModel", "ShardedParameter", "fsdp2_modules", "is_sharded"]

_OTHERWISE = (
    "probe a model that is sharded by fully_shard over all ranks of the default process group alone (or an unwrapped one with "
    "a whole state's file, which torch.distributed.checkpoint.state_dict makes)."
)


@dataclasses.dataclass(frozen=True)
class ShardedParameter:
    """A parameter of which every rank holds a part.

    Attributes:
        name: its name in ``model.named_parameters()``.
        tensor: the DTensor, which optimizers step.
        computed_in: dtype that forwards see it in (``MixedPrecisionPolicy.param_dtype``, or its own).
        owner: name of the innermost module that ``fully_shard`` was called on around it.
    """

    name: str
    tensor: nn.Parameter
    computed_in: torch.dtype
    owner: str


@dataclasses.dataclass(frozen=True)
class ShardedModel:
    """A model that FSDP2 shards over all ranks.

    Attributes:
        modules: those that ``fully_shard`` was called on, by name.
        parameters: that are sharded, in the order of ``named_parameters()``, tied ones once.
        unreduced: name of a module whose gradients wait to be added up over ranks; None where there is none.
    """

    modules: dict[str, Any]
    parameters: tuple[ShardedParameter, ...]
    unreduced: str | None = None

    @classmethod
    def of(cls, model: nn.Module, modules: dict[str, Any]) -> ShardedModel:
        """Look at a model, whose parameters are sharded afterwards where some of them stood gathered.

        Args:
            model: possibly wrapped.
            modules: its `fsdp2_modules`.

        Raises:
            ModelStateError: it is sharded in a way that is not taken.
        """
        settings = {name: fsdp2_settings(module) for name, module in modules.items()}
        for name, found in settings.items():
            if found.offloads:
                _refuse(f"'{name or 'the whole'}' keeps its shards on the CPU (CPUOffloadPolicy)")
        for module in modules.values():
            module.reshard()
        parameters = []
        for name, parameter in model.named_parameters():
            if not is_sharded(parameter):
                continue
            owner = _owner(name, settings)
            if owner is None or id(parameter) not in settings[owner].sharded:
                _refuse(f"parameter '{name}' is a DTensor that fully_shard has not made")
            _check(name, parameter)
            dtype = settings[owner].param_dtype
            cast = dtype is not None and parameter.dtype.is_floating_point
            parameters.append(ShardedParameter(name, parameter, dtype if cast and dtype else parameter.dtype, owner))
        for name, submodule in model.named_modules():
            if type(submodule).__module__.split(".")[0] == "bitsandbytes" and any(
                map(is_sharded, submodule.parameters())
            ):
                _refuse(f"'{name}' is quantised by bitsandbytes, and its codes are sharded")
        unreduced = next((name or "the whole" for name, found in settings.items() if found.unreduced), None)
        return cls(modules, tuple(parameters), unreduced)

    def layers(self, *, trained: bool) -> dict[nn.Module, list[ShardedParameter]]:
        """Matrices by layer: by the modules of a class of which there are several, and in which there is no other.

        What is in other modules (embeddings, the output layer) is read outside of their forwards too, and so are norms.

        Args:
            trained: whether those that are trained are wanted too.
        """
        kinds = collections.Counter(type(module) for module in self.modules.values())
        inner = [
            name
            for name, module in self.modules.items()
            if kinds[type(module)] > 1 and not any(other.startswith(f"{name}.") for other in self.modules)
        ]
        matrices = [
            own for own in self.parameters if own.tensor.dim() > 1 and (trained or not own.tensor.requires_grad)
        ]
        found = {self.modules[name]: [own for own in matrices if own.owner == name] for name in inner}
        return {module: own for module, own in found.items() if own}


def fsdp2_modules(model: object) -> dict[str, Any]:
    """The modules that ``fully_shard`` was called on, by name; none where nobody has imported it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not isinstance(model, nn.Module):
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def _owner(name: str, modules: dict[str, Any]) -> str | None:
    """The innermost of the modules that a parameter is in."""
    around = [own for own in modules if not own or name.startswith(f"{own}.")]
    return max(around, key=len, default=None)


def _check(name: str, parameter: Any) -> None:
    mesh, placements = parameter.device_mesh, parameter.placements
    found = f"parameter '{name}' has placements ({', '.join(map(repr, placements))}) on a mesh of {tuple(mesh.shape)}"
    # Not a subclass: the shards of FSDP over tensor parallelism are interleaved.
    if len(placements) != 1 or type(placements[0]).__name__ != "Shard":
        _refuse(f"{found}: replicas of shards (HSDP) or layers that are split (tensor parallelism)")
    ranks, expected = mesh.mesh.flatten().tolist(), list(range(dist.get_world_size()))
    if ranks != expected:
        _refuse(f"{found} of ranks {ranks}; the default process group has ranks {expected}")
    local = parameter.to_local()
    if type(local) is not Tensor:
        kind = type(local)
        _refuse(f"the shards of parameter '{name}' are {kind.__module__}.{kind.__qualname__}, expected plain tensors")
    for hooks in ("_post_accumulate_grad_hooks", "_backward_hooks"):
        if getattr(parameter, hooks, None):
            raise ModelStateError(
                f"parameter '{name}' has a hook on its gradient, which gradients of a probe do not go through.",
                fix="remove the hook while probing.",
            )


def _refuse(found: str) -> NoReturn:
    """Raise: a way of sharding that is not taken."""
    raise ModelStateError(f"the model is sharded by FSDP2, and {found}, which is not supported.", fix=_OTHERWISE)
