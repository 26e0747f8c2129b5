"""Which optimizer wrote a parameter group, told by its settings, and what its state holds for a parameter.

Files do not name the class. Its settings do, where they are of one class alone; a group of none of these classes is taken for
Adam's, whose settings are checked where they are read. Only classes are here whose constructor takes those settings, so that
the optimizer itself can be made again.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.saved_optimizer import SavedOptimizer, plain_entry
from entropy_fast.step.scalars import real_number, shown, shown_keys

__all__ = ["OptimizerKind", "checked_entry", "kind_of", "kinds_of", "misfit", "unknown_settings"]

Shape = tuple[int, ...]
Layout = Mapping[str, "Shape | None"]  # by name, a tensor's shape, or None for a number

# What groups of torch's Adam and AdamW, of bitsandbytes' and of schedulers have; more is said in a note.
SETTINGS_OF_ADAM = frozenset(
    {"params", "param_names", "lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach"}
    | {"capturable", "differentiable", "fused", "decoupled_weight_decay", "alpha", "t_alpha", "t_beta3"}
)


@dataclasses.dataclass(frozen=True)
class OptimizerKind:
    """A class of optimizers other than Adam.

    Attributes:
        name: of the class, with its module as users import it.
        settings: those that tell it apart, all of them.
        without: those that its groups never have.
        layout: for a parameter's shape and its group's settings, what the state of a parameter that was stepped holds.
        squares: names in it that are means of squares.
        load: imports the class.
        in_fp32: whether it keeps its state in fp32 for parameters of 16 bits.
    """

    name: str
    settings: frozenset[str]
    layout: Callable[[Shape, Mapping[str, Any]], Layout]
    load: Callable[[], type[torch.optim.Optimizer]]
    without: frozenset[str] = frozenset()
    squares: frozenset[str] = frozenset()
    in_fp32: bool = False

    def takes(self) -> frozenset[str]:
        """Settings that its constructor takes.

        Raises:
            ImportError, AttributeError: there is no such class.
        """
        return frozenset(inspect.signature(self.load().__init__).parameters) - {"self", "params"}


def _muon(shape: Shape, group: Mapping[str, Any]) -> Layout:
    return {"momentum_buffer": shape}


def _sgd(shape: Shape, group: Mapping[str, Any]) -> Layout:
    return {"momentum_buffer": shape} if real_number(group.get("momentum")) else {}


def _adafactor(shape: Shape, group: Mapping[str, Any]) -> Layout:
    if len(shape) < 2:
        return {"step": None, "variance": shape}
    return {"step": None, "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def _transformers_adafactor(shape: Shape, group: Mapping[str, Any]) -> Layout:
    first: Layout = {} if group.get("beta1") is None else {"exp_avg": shape}
    if len(shape) < 2:
        return {"step": None, "RMS": None, "exp_avg_sq": shape, **first}
    return {
        "step": None,
        "RMS": None,
        "exp_avg_sq_row": shape[:-1],
        "exp_avg_sq_col": (*shape[:-2], shape[-1]),
        **first,
    }


def _nadam(shape: Shape, group: Mapping[str, Any]) -> Layout:
    return {"step": None, "mu_product": None, "exp_avg": shape, "exp_avg_sq": shape}


def _radam(shape: Shape, group: Mapping[str, Any]) -> Layout:
    return {"step": None, "exp_avg": shape, "exp_avg_sq": shape}


def _transformers_class() -> type[torch.optim.Optimizer]:
    from transformers import Adafactor

    return Adafactor


def _torch_class(name: str) -> Callable[[], type[torch.optim.Optimizer]]:
    def load() -> type[torch.optim.Optimizer]:
        found: type[torch.optim.Optimizer] = getattr(torch.optim, name)
        return found

    return load


KINDS = (
    OptimizerKind(
        "torch.optim.Muon",
        frozenset({"momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"}),
        _muon,
        _torch_class("Muon"),
    ),
    OptimizerKind(
        "torch.optim.Adafactor",
        frozenset({"beta2_decay", "d", "eps"}),
        _adafactor,
        _torch_class("Adafactor"),
        squares=frozenset({"row_var", "col_var", "variance"}),
    ),
    OptimizerKind(
        "transformers.Adafactor",
        frozenset({"clip_threshold", "decay_rate", "scale_parameter", "relative_step", "warmup_init"}),
        _transformers_adafactor,
        _transformers_class,
        squares=frozenset({"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"}),
        in_fp32=True,
    ),
    OptimizerKind("torch.optim.SGD", frozenset({"momentum", "dampening", "nesterov"}), _sgd, _torch_class("SGD")),
    OptimizerKind(
        "torch.optim.NAdam",
        frozenset({"betas", "momentum_decay"}),
        _nadam,
        _torch_class("NAdam"),
        squares=frozenset({"exp_avg_sq"}),
    ),
    # It shares all of its settings with Adam, and lacks one.
    OptimizerKind(
        "torch.optim.RAdam",
        frozenset({"betas", "decoupled_weight_decay", "differentiable"}),
        _radam,
        _torch_class("RAdam"),
        without=frozenset({"amsgrad"}),
        squares=frozenset({"exp_avg_sq"}),
    ),
)


def kind_of(group: Mapping[str, Any]) -> OptimizerKind | None:
    """The class that a group's settings tell; None for Adam's, and for those that are of no class here."""
    fitting = (kind for kind in KINDS if kind.settings <= group.keys() and not kind.without & group.keys())
    return next(fitting, None)


def kinds_of(saved: SavedOptimizer) -> list[OptimizerKind | None]:
    """Of every group.

    Raises:
        OptimizerStateError: a group is that of a Muon, a Lion or another optimizer that is known and cannot be made again.
    """
    for index, group in enumerate(saved.groups):
        for name, sign in _NOT_READ.items():
            if sign(group, [plain_entry(saved.state[key]) for key in saved.keys[index] if key in saved.state]):
                raise OptimizerStateError(
                    f"optimizer file {saved.path}: parameter group {index} is that of {name}, which is not read from a file.",
                    fix="give the live optimizer: fast_delta_h1(model, optimizer, rollouts) finds its whole next step by steps "
                    "on copies, and gradient='live' takes the gradient that stands in .grad.",
                )
    return [kind_of(group) for group in saved.groups]


# By what an error calls them: whether settings and entries are theirs. Each of these would pass for a kind that is read, or
# fail for a reason that does not name it.
_NOT_READ: Mapping[str, Callable[[Mapping[str, Any], list[Mapping[str, Any]]], bool]] = {
    "a Muon with an Adam beside it (use_muon)": lambda group, entries: "use_muon" in group,
    "an optimizer with a momentum_buffer that is neither torch.optim.Muon's nor SGD's": lambda group, entries: (
        kind_of(group) is None and any("momentum_buffer" in entry for entry in entries)
    ),
    "a schedule-free optimizer": lambda group, entries: "weight_lr_power" in group and "train_mode" in group,
    "an optimizer of projected gradients (GaLore, APOLLO)": lambda group, entries: "update_proj_gap" in group,
    "an AdamW without bias correction (correct_bias=False)": lambda group, entries: group.get("correct_bias") is False,
    "AdEMAMix": lambda group, entries: _length(group.get("betas")) == 3 and any("state2" in entry for entry in entries),
    "an optimizer with one state (Lion, or bitsandbytes' RMSprop or Adagrad)": lambda group, entries: (
        _length(group.get("betas")) == 2
        and bool(entries)
        and all(bool({"exp_avg", "state1"} & entry.keys()) for entry in entries)
        and not any({"exp_avg_sq", "state2", "exp_inf"} & entry.keys() for entry in entries)
    ),
}


def _length(found: object) -> int:
    return len(found) if isinstance(found, (tuple, list)) else 0


def unknown_settings(kind: OptimizerKind | None, group: Mapping[str, Any]) -> list[str]:
    """Names of settings that neither the optimizer has (Adam, where it is None) nor a scheduler adds."""
    if kind is None:
        return sorted(key for key in group.keys() - SETTINGS_OF_ADAM if key != "correct_bias")
    try:
        known = kind.takes()
    except (ImportError, AttributeError):
        return []  # there is no such class here, which is said where it is to be made
    return sorted(group.keys() - known - {"params", "param_names", "initial_lr"})


def misfit(kind: OptimizerKind | None, group: Mapping[str, Any], entry: Mapping[str, Any], shape: Shape) -> str | None:
    """What a parameter of this shape cannot have in its state, in words; None where all fits."""
    layout: Layout = {"exp_avg_sq": shape, "state2": shape} if kind is None else kind.layout(shape, group)
    found = {key: value for key, value in entry.items() if value is not None}
    if kind is not None and found and found.keys() != layout.keys():
        return f"keys {shown_keys(found)}"
    for name, expected in layout.items():
        value = found.get(name)
        if expected is not None and isinstance(value, Tensor) and tuple(value.shape) != expected:
            return f"shape {list(value.shape)}"
    return None


def checked_entry(
    kind: OptimizerKind, group: Mapping[str, Any], name: str, shape: Shape, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """A parameter's state as its optimizer keeps it; empty where it was never stepped.

    Args:
        kind: of the optimizer.
        group: the parameter's settings.
        name: of the parameter, for messages.
        shape: of the parameter.
        entry: what the file has.

    Raises:
        OptimizerStateError: something is missing or unknown, of another shape, not finite, or a negative mean of squares.
    """
    found = {key: value for key, value in entry.items() if value is not None}
    if not found:
        return {}
    layout = kind.layout(shape, group)
    if found.keys() != layout.keys():
        raise OptimizerStateError(
            f"optimizer state of {name!r} has keys {shown_keys(entry)}; {kind.name} has {shown_keys(layout)}.",
            fix="use the state of a healthy checkpoint.",
        )
    for key, expected in layout.items():
        value = found[key]
        number = real_number(value)
        if expected is None:
            if number is None or not 0 <= number < float("inf"):
                raise _impossible(kind, name, key, shown(value))
        elif not _is_plain(value) or tuple(value.shape) != expected:
            raise OptimizerStateError(
                f"optimizer state of {name!r} has as '{key}' {shown(value)}; {kind.name} has a tensor of floating-point values "
                f"of shape {list(expected)} for a parameter of shape {list(shape)}.",
                fix="use the optimizer state that was saved with this model and adapter.",
            )
        elif not bool(torch.isfinite(value).all()):
            raise _impossible(kind, name, key, "values that are not finite")
        elif key in kind.squares and bool((value < 0).any()):
            raise _impossible(kind, name, key, "negative means of squares")
    return found


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and not value.is_meta
        and value.is_floating_point()
    )


def _impossible(kind: OptimizerKind, name: str, key: str, found: str) -> OptimizerStateError:
    return OptimizerStateError(
        f"optimizer state of {name!r}, of {kind.name}, has as '{key}' {found}.",
        fix="use the state of a healthy checkpoint.",
    )
