"""Which modules' parameters are captured, and the exchange of their forwards while a capture runs.

A parameter is captured where it is used as a module of a known kind uses it. Whatever else a model does with it shows as an
ordinary gradient after the backward (`uncaptured_uses`), and such a parameter is left to the slower path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from entropy_fast.capture.layer_kinds import CapturedLayer, layer_kinds, own_parameters
from entropy_fast.capture.recorder import Recorder

__all__ = ["CapturedModules", "uncaptured_uses"]


class CapturedModules:
    """The modules of a model that hold captured parameters.

    Args:
        module: the model.
        names: trainable parameters by id: their names in the registry.
        left_out: names that must not be captured.

    Attributes:
        captured: names of the parameters that are.
    """

    def __init__(self, module: nn.Module, names: Mapping[int, str], left_out: frozenset[str] = frozenset()) -> None:
        holders: list[tuple[nn.Module, CapturedLayer | None, frozenset[str]]] = []
        contained: set[int] = set()
        for path, submodule in module.named_modules():
            if id(submodule) in contained:
                continue
            # Experts get tokens in an order of their own, which nothing in their shape tells.
            layer = None if "experts" in path.split(".") else _captured_layer(submodule, names)
            known = frozenset() if layer is None else layer.parameters
            if layer is not None:
                contained |= layer.stands_for
                holders.append((submodule, layer, known))
            if rest := frozenset(own_parameters(submodule, names).values()) - known:
                holders.append((submodule, None, rest))
        # A captured module hands nothing to ordinary autograd, so it is captured whole or not at all; and a parameter is
        # captured in all its modules or in none.
        refused = set(left_out) | _hooked(module, names)
        refused.update(*(own for _, layer, own in holders if layer is None))
        while any(own & refused and own - refused for _, _, own in holders):
            refused.update(*(own for _, _, own in holders if own & refused))
        self.captured: set[str] = set().union(*(own for _, _, own in holders)) - refused
        self._layers = [(submodule, layer) for submodule, layer, own in holders if layer and not own & refused]

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Forwards and backwards in this context hand their signals to ``recorder``."""
        changed: list[nn.Module] = []
        try:
            for submodule, layer in self._layers:
                capturing = layer.maker(submodule.forward, recorder)
                # Noted first: an interrupt between the two lines leaves nothing behind.
                changed.append(submodule)
                submodule.forward = capturing
            yield
        finally:
            for submodule in changed:
                submodule.__dict__.pop("forward", None)


def uncaptured_uses(tensors: Sequence[Tensor], names: Sequence[str], captured: set[str]) -> set[str]:
    """Captured parameters that have an ordinary gradient all the same: something else in the model uses them too."""
    return {name for tensor, name in zip(tensors, names, strict=True) if tensor.grad is not None and name in captured}


def _captured_layer(module: nn.Module, names: Mapping[int, str]) -> CapturedLayer | None:
    for kind in layer_kinds():
        if (layer := kind(module, names)) is not None:
            return layer
    return None


def _hooked(module: nn.Module, names: Mapping[int, str]) -> set[str]:
    """Trainable parameters with a hook on their gradient, which has to see one."""
    return {names[id(p)] for p in module.parameters() if id(p) in names and getattr(p, "_backward_hooks", None)}
