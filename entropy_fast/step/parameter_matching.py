"""Which parameter of the model an entry of an optimizer file belongs to.

Names in the file decide. Where it has none, entries are matched in the orders in which optimizers are usually built, and
counts, shapes and what was stepped have to fit. Several groups, or several orders that fit, leave room for error: then a
note says that the order was guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step.optimizer_kinds import OptimizerKind, misfit
from entropy_fast.step.saved_optimizer import SavedOptimizer, plain_entry
from entropy_fast.step.scalars import shown

__all__ = ["match_parameters", "of_trained_parameter"]

# What DistributedDataParallel, torch.compile, checkpoint_wrapper and FSDP1 put into names.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
IN_FRONT = "module"


def match_parameters(
    saved: SavedOptimizer, kinds: Sequence[OptimizerKind | None], module: nn.Module
) -> tuple[list[list[str]], tuple[str, ...]]:
    """The model's names for the entries of every group, and notes about how sure they are.

    Args:
        saved: the file's content.
        kinds: the optimizer that each group is of; None for Adam.
        module: the unwrapped model. Names may be those of frozen parameters too.

    Raises:
        OptimizerStateError: names the model does not have, or no known order fits.
    """
    if saved.names is not None:
        return _by_name(saved, saved.names, module), ()
    return _by_order(saved, kinds, module)


def of_trained_parameter(module: nn.Module, only: Collection[str] | None = None) -> Callable[[str], bool]:
    """Whether a name in a file may be that of a trainable parameter, whatever wrappers have added to it.

    Args:
        module: the unwrapped model.
        only: names of the parameters that are asked for; None for all.
    """
    asked = {id(p) for name, p in module.named_parameters() if p.requires_grad and (only is None or name in only)}
    trained = {_plain_name(name) for name, p in module.named_parameters(remove_duplicate=False) if id(p) in asked}
    return lambda name: _plain_name(name) in trained


def _by_name(saved: SavedOptimizer, names: Sequence[Sequence[str]], module: nn.Module) -> list[list[str]]:
    first = {id(p): name for name, p in module.named_parameters()}
    exact = {
        name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)
    }  # tied ones have several
    plain: dict[str, set[str]] = {}
    for name, target in exact.items():
        plain.setdefault(_plain_name(name), set()).add(target)
    found, given_for = [], dict[str, str]()
    for group in names:
        targets = []
        for name in group:
            candidates = {exact[name]} if name in exact else plain.get(_plain_name(name), set())
            if len(candidates) != 1:
                raise OptimizerStateError(
                    f"optimizer file {saved.path} names {shown(name)}; the model has {len(candidates) or 'no'} such parameter.",
                    fix="adapt the model exactly as it was in training (the same adapter, under the same name).",
                )
            (target,) = candidates
            if target in given_for:
                raise OptimizerStateError(
                    f"optimizer file {saved.path} names {shown(given_for[target])} and {shown(name)}, which are one parameter.",
                    fix="save the optimizer again; every parameter belongs to one group, once.",
                )
            given_for[target] = name
            targets.append(target)
        found.append(targets)
    missing = [name for name, p in module.named_parameters() if p.requires_grad and name not in given_for]
    if missing:
        raise OptimizerStateError(
            f"optimizer file {saved.path} names {len(given_for)} parameters, and not the trainable {missing[0]!r} "
            f"({len(missing)} missing in all).",
            fix="freeze and adapt the model exactly as it was in training (the same adapter, the same modules to save).",
        )
    return found


def _plain_name(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == IN_FRONT:
        parts = parts[1:]
    return ".".join(parts)


def _by_order(
    saved: SavedOptimizer, kinds: Sequence[OptimizerKind | None], module: nn.Module
) -> tuple[list[list[str]], tuple[str, ...]]:
    """The first known order in which every count and shape fits."""
    named = dict(module.named_parameters())
    every, trainable = list(named), [name for name, p in named.items() if p.requires_grad]
    sizes = [len(listed) for listed in saved.keys]
    orders = _orders(module, trainable, sizes, "named_parameters() order")
    if every != trainable:
        orders += _orders(module, every, sizes, "named_parameters() order, frozen ones included")
    fitting, problems = [], []
    for label, order in orders:
        problem = _first_mismatch(saved, kinds, order, named)
        if problem is None:
            fitting.append((label, order))
        else:
            problems.append(f"{label}: {problem}")
    if not fitting:
        in_all = f" and {len(every)} in all" if every != trainable else ""
        tried = f" Tried {'; '.join(problems)}." if problems else ""
        raise OptimizerStateError(
            f"optimizer file {saved.path} covers {sum(sizes)} parameters, the model has {len(trainable)} trainable "
            f"ones{in_all}; they do not fit.{tried}",
            fix="freeze and adapt the model exactly as it was in training (the same adapter, the same modules to save). "
            "Without names in the file, one group in named_parameters() order fits, or the two groups of transformers' "
            "Trainer (with and without weight decay). AdamW(model.named_parameters()) writes names.",
        )
    label, order = fitting[0]
    others = [other for other, its_order in fitting[1:] if its_order != order]
    consecutive = label.startswith("named_parameters()") and sum(map(bool, sizes)) > 1
    if not others and not consecutive:
        return order, ()
    also = f" {' and '.join(others)} would fit too, and assign them differently." if others else ""
    return order, (
        f"the optimizer file does not name its parameters, and their order was guessed: {sum(map(bool, sizes))} groups were "
        f"filled in {label}, since counts and shapes fit.{also} If groups were built in another order, second moments and "
        "learning rates are another parameter's; the live optimizer, or a file of AdamW(model.named_parameters()), is sure.",
    )


def _orders(
    module: nn.Module, names: Sequence[str], sizes: Sequence[int], label: str
) -> list[tuple[str, list[list[str]]]]:
    """The known orders of these names that have groups of these sizes."""
    if sum(sizes) != len(names):
        return []
    orders = []
    if len(sizes) == 2:
        by_decay = _trainer_order(module, names)
        if [len(group) for group in by_decay] == list(sizes):
            orders.append((f"the order of transformers' Trainer ({label})", by_decay))
    rest = iter(names)
    orders.append((label, [[next(rest) for _ in range(size)] for size in sizes]))
    return orders


def _trainer_order(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Two groups: with weight decay, and without (biases and norms), each in named_parameters() order.

    The rule is Trainer.get_decay_parameter_names of transformers.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decay = set(get_parameter_names(module, [nn.LayerNorm], patterns))
    return [[n for n in names if n in decay], [n for n in names if n not in decay]]


def _first_mismatch(
    saved: SavedOptimizer,
    kinds: Sequence[OptimizerKind | None],
    order: Sequence[Sequence[str]],
    named: Mapping[str, nn.Parameter],
) -> str | None:
    for names, keys, group, kind in zip(order, saved.keys, saved.groups, kinds, strict=True):
        for name, key in zip(names, keys, strict=True):
            entry = plain_entry(saved.state.get(key, {}))
            if entry and not named[name].requires_grad:
                return f"entry {key} was stepped where '{name}' is frozen"
            shape = tuple(named[name].shape)
            found = misfit(kind, group, entry, shape)
            if found is not None:
                return f"entry {key} has {found} where '{name}' has {list(shape)}"
    return None
