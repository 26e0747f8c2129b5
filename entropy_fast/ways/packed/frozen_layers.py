"""A decoder's untrained RMS norms and gated MLPs exchanged for compiled ones, for as long as a context lasts.

Only what is seen to compute the same. The source of a class says that nothing but the formula's operations stands in its
forward (a clamp of values that are rarely that large would not show in numbers), and a layer of each class is held to the
formula. On other devices and in other dtypes the layers run as they are.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast import reference
from entropy_fast.ops import compiled_layers_take, gated_silu, rms_norm

__all__ = ["FrozenLayers"]

Forward = Callable[[Tensor], Tensor]
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.Lambda, ast.FunctionDef)

# The words that a forward may be written with, beside its own variables: with any other it may do more.
_NORM_WORDS = frozenset(
    {
        "self",
        "weight",
        "variance_epsilon",
        "eps",
        "_norm",
        "to",
        "dtype",
        "float",
        "float32",
        "pow",
        "mean",
        "rsqrt",
        "type_as",
    }
    | {"torch"}
)
_GATE_WORDS = frozenset({"self", "gate_proj", "up_proj", "down_proj", "act_fn"})

# Roundings of the largest number that a layer may be away from the formula: sums may be taken in another order.
_ROUNDINGS = 16


class FrozenLayers:
    """The layers of a decoder that have a compiled twin.

    Args:
        decoder: the model; parameters that require a gradient are trained.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Forward]] = []
        same: dict[tuple[type, str, torch.dtype], float | None] = {}
        for module in decoder.modules():
            if not type(module).__module__.startswith("transformers.") or "forward" in module.__dict__:
                continue
            if (weight := _norm_weight(module)) is not None:
                key = (type(module), "norm", weight.dtype)
                if key not in same:
                    same[key] = _added_to_weight(module, weight)
                added = same[key]
                if added is not None:
                    self._forwards.append((module, _norm(module, added)))
            elif _is_gated(module):
                key = (type(module), "gate", torch.float32)
                if key not in same:
                    same[key] = 0.0 if _gates_as_expected(module) else None
                if same[key] is not None:
                    self._forwards.append((module, _gated(module)))

    def __len__(self) -> int:
        return len(self._forwards)

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Forwards in this context are compiled where the dtype and the device allow it."""
        changed = []
        try:
            for module, forward in self._forwards:
                # A module that something else has exchanged meanwhile belongs to that.
                if "forward" not in module.__dict__:
                    module.forward = forward
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward


def _norm_weight(module: Any) -> Tensor | None:
    """The weight of what may be an untrained RMS norm that runs compiled; None otherwise."""
    parameters = module._parameters
    weight = parameters.get("weight")
    if not type(module).__name__.endswith("RMSNorm") or len(parameters) != 1 or module._modules or weight is None:
        return None
    if not written_with(type(module), _NORM_WORDS):
        return None
    known = weight.dim() == 1 and not weight.requires_grad and compiled_layers_take(weight)
    return weight if known and _epsilon(module) is not None else None


def _epsilon(module: Any) -> float | None:
    found = [getattr(module, name, None) for name in ("variance_epsilon", "eps")]
    given = [value for value in found if isinstance(value, float)]
    return given[0] if len(given) == 1 else None


def _added_to_weight(module: nn.Module, weight: Tensor) -> float | None:
    """What is added to the weight before it is applied, 0 or 1; None where the module computes something else."""
    epsilon = _epsilon(module)
    assert epsilon is not None
    # In 16 bits many formulas would look alike.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    copied = copy.deepcopy(module).to(wide.dtype)
    wave = torch.sin(torch.arange(3.0 * len(wide), dtype=wide.dtype)).view(1, 3, -1)
    # Of ordinary size, and so small that epsilon counts.
    probes = (wave, wave * epsilon**0.5)
    with torch.no_grad():
        for added in (0.0, 1.0):
            if all(_same(copied(x), reference.rms_norm(x, wide + added, epsilon)) for x in probes):
                narrow = wave.to(weight.dtype)
                # One that multiplies by its weight before it rounds has another result there.
                as_here = _same(module(narrow), reference.rms_norm(narrow, weight + added, epsilon), roundings=1)
                return added if weight.dtype == wide.dtype or as_here else None
    return None


def _norm(module: Any, added: float) -> Forward:
    plain: Forward = module.forward

    def run(hidden_states: Tensor) -> Tensor:
        weight, epsilon = module.weight, _epsilon(module)
        if epsilon is None or not compiled_layers_take(hidden_states, weight):
            return plain(hidden_states)
        return rms_norm(hidden_states, weight + added if added else weight, epsilon)

    return run


def _is_gated(module: Any) -> bool:
    projections = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    own = any(True for _ in module.parameters(recurse=False))
    parts = all(isinstance(projection, nn.Module) for projection in projections)
    return silu and not own and parts and written_with(type(module), _GATE_WORDS)


_written: dict[tuple[object, ...], bool] = {}  # what `written_with` has found


def written_with(kind: type, words: frozenset[str]) -> bool:
    """Whether the forward of a class, and its ``_norm`` if it has one, is straight-line code made of these words alone."""
    # A class may be given another forward, and its own back.
    key = (kind, getattr(kind, "forward", None), getattr(kind, "_norm", None), words)
    if key not in _written:
        _written[key] = _is_written_with(kind, words)
    return _written[key]


def _is_written_with(kind: type, words: frozenset[str]) -> bool:
    try:
        methods = [getattr(kind, name) for name in ("forward", "_norm") if hasattr(kind, name)]
        trees = [ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method)))) for method in methods]
    except (OSError, TypeError, SyntaxError):
        # No source to read: compiled, or made at run time.
        return False
    for tree in trees:
        (definition,) = tree.body
        if not isinstance(definition, ast.FunctionDef):
            return False
        nodes = [node for statement in definition.body for node in ast.walk(statement)]
        own = {argument.arg for argument in definition.args.args}
        own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        used = {node.id for node in nodes if isinstance(node, ast.Name)} - own
        used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if used - words or any(isinstance(node, _BRANCHES) for node in nodes):
            return False
    return True


def _gates_as_expected(module: Any) -> bool:
    weight, size = (getattr(module.gate_proj, name, None) for name in ("weight", "in_features"))
    if not isinstance(weight, Tensor) or not isinstance(size, int):
        return False
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.sin(torch.arange(3.0 * size, device=weight.device, dtype=dtype)).view(1, 3, -1)
    if not compiled_layers_take(x):
        return False
    # A projection's dropout, if it has one, must not move the generator.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = module.down_proj(reference.gated_silu(module.gate_proj(x), module.up_proj(x)))
        return _same(module(x), expected)


def _gated(module: Any) -> Forward:
    def run(x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        taken = compiled_layers_take(gate, up) and gate.shape == up.shape
        result: Tensor = module.down_proj(gated_silu(gate, up) if taken else module.act_fn(gate) * up)
        return result

    return run


def _same(found: object, expected: Tensor, roundings: int = _ROUNDINGS) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    allowed = roundings * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    return bool(((found - expected).abs() <= allowed).all())
