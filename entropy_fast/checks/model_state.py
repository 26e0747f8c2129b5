"""Put a model in the state a probe needs, and give it back exactly as it was, also after an exception.

Dropout has to be off, but blocks with gradient checkpointing have to stay in ``train()``: transformers recomputes
activations only there. So every module goes to ``eval()`` except those, and on those the dropout probabilities that
their own forward applies are set to zero.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.errors import CheckpointingError
from entropy_fast.libraries import overwrites_what_it_saved

__all__ = ["checkpointed_modules", "probe_state", "reentrant_checkpointing", "refuse_shared_keys"]

# Attributes that a module's own forward may use as a probability of random change while in train().
RANDOMNESS_MARKS = ("dropout", "layerdrop", "jitter", "drop_path")


def checkpointed_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules whose gradient checkpointing switch (as transformers names it) is on."""
    return [(n, m) for n, m in unwrap_model(model).named_modules() if _checkpoints(m)]


def reentrant_checkpointing(model: nn.Module) -> str | None:
    """Name of the first module that checkpoints in reentrant mode, or None."""
    for name, module in checkpointed_modules(model):
        function = getattr(module, "_gradient_checkpointing_func", None)
        # torch's own default, where use_reentrant is not passed, is reentrant.
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant") in (None, True):
            return name or type(module).__name__
    return None


def refuse_shared_keys(model: nn.Module) -> None:
    """Raise for layers that use the keys and values of others under reentrant checkpointing.

    Their backwards go into graphs that are thrown away, so the gradients of training itself are wrong (and would be here).

    Raises:
        CheckpointingError: the model has such layers, and checkpoints in reentrant mode.
    """
    name = reentrant_checkpointing(model)
    if name is None:
        return
    configurations = (getattr(module, "config", None) for module in unwrap_model(model).modules())
    shared = max((getattr(c, "num_kv_shared_layers", None) or 0 for c in configurations if c is not None), default=0)
    if isinstance(shared, int) and shared > 0:
        raise CheckpointingError(
            f"{shared} layers use the keys and values of other layers, and '{name}' uses reentrant gradient checkpointing: the "
            "gradients that training takes from it are wrong.",
            fix='model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}), for training '
            "too.",
        )


@contextlib.contextmanager
def probe_state(model: nn.Module) -> Iterator[None]:
    """Dropout off, gradients set aside, gradient synchronisation off; everything restored on the way out.

    Restored: ``param.grad`` objects, train/eval flags, dropout probabilities, and the CPU and CUDA random states.
    """
    module = unwrap_model(model)
    flags = [(m, m.training) for m in module.modules()]
    gradients = [(p, p.grad) for p in module.parameters()]
    probabilities: list[tuple[nn.Module, str, float]] = []
    cuda_devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda_devices))
        if any(overwrites_what_it_saved(m) for m in module.modules()):
            stack.enter_context(_every_backward_gets_copies(module))
        if isinstance(model, DistributedDataParallel):
            stack.enter_context(model.no_sync())
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for submodule, _ in flags:
                submodule.training = _keeps_training(submodule)
                if submodule.training:
                    chances = _chances(submodule)
                    # Noted first: whatever comes between the two leaves nothing behind.
                    probabilities.extend(chances)
                    for owner, attribute, _ in chances:
                        setattr(owner, attribute, 0.0)
            yield
        finally:
            for submodule, attribute, value in probabilities:
                setattr(submodule, attribute, value)
            for submodule, training in flags:
                submodule.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _every_backward_gets_copies(module: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Graphs that are made in it hand copies of what was saved to every backward, so that there may be several.

    Parameters themselves are handed on: nothing that trains may write over them.
    """
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def handed_on(saved: Tensor) -> Tensor:
        return saved if saved.untyped_storage().data_ptr() in owned else saved.clone()

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, handed_on)


def _keeps_training(module: nn.Module) -> bool:
    # bitsandbytes re-packs 4-bit weights for CPU inference, in place, the first time a layer in eval() is called.
    quantized = type(module).__module__.startswith("bitsandbytes")
    return quantized or _checkpoints(module)


def _checkpoints(module: nn.Module) -> bool:
    # Not getattr of the module: where there is no such attribute, that looks for a parameter and a submodule of the name, and a
    # model has many modules.
    own = vars(module).get("gradient_checkpointing", getattr(type(module), "gradient_checkpointing", False))
    return own is True


def _chances(module: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """The probabilities of random change kept as plain floats on ``module``."""
    return [
        (module, attribute, value)
        for attribute, value in vars(module).items()
        if isinstance(value, float) and value > 0 and any(mark in attribute for mark in RANDOMNESS_MARKS)
    ]
