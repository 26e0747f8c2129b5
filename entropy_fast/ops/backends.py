"""Which implementation of an op runs: what there is, why the rest is not there, and what has run so far."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from entropy_fast.errors import BackendUnavailableError, ConfigError, EntropyFastWarning
from entropy_fast.ops import native_backend, triton_backend

__all__ = [
    "AUTO",
    "BACKENDS",
    "BackendRecord",
    "backend_report",
    "count_call",
    "requested",
    "resolve_backend",
    "runs_natively",
]

AUTO = "auto"
BACKENDS = ("reference", "native", "triton", "cuda")
_ENVIRONMENT_VARIABLE = "ENTROPY_FAST_BACKEND"
# What is tried on each kind of device when nobody asked for a backend by name, best first.
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}


@dataclass(frozen=True)
class BackendRecord:
    """One backend of this process.

    Attributes:
        name: one of :data:`BACKENDS`.
        available: whether ops can run on it here.
        reason: why it is not available; empty when it is.
        detail: what it is (instruction set, compiler, version); empty when there is nothing to say.
        calls: how many op calls it has run in this process.
        last_op: the op it ran last, None before the first.
    """

    name: str
    available: bool
    reason: str
    detail: str
    calls: int
    last_op: str | None


_lock = threading.Lock()
_calls = dict.fromkeys(BACKENDS, 0)
_last_op: dict[str, str] = {}
_warned: set[str] = set()


def _reference_reason(device_type: str) -> str:
    return ""


# Each gives the reason why the backend cannot run on a device type, or an empty string where it can.
_REASONS: dict[str, Callable[[str], str]] = {
    "reference": _reference_reason,
    "native": native_backend.cpu_reason,
    "triton": triton_backend.reason,
    "cuda": native_backend.cuda_reason,
}
# Where each may run, its own kind of device first.
_DEVICE_TYPES = {"reference": ("cpu",), "native": ("cpu",), "triton": ("cuda", "cpu"), "cuda": ("cuda",)}


def _detail(name: str) -> str:
    if name == "reference":
        return f"torch {torch.__version__}"
    if name == "triton":
        return triton_backend.detail()
    return native_backend.cpu_detail() if name == "native" else native_backend.cuda_detail()


def backend_report() -> list[BackendRecord]:
    """Every backend, available or not, in the order of :data:`BACKENDS`."""
    records = []
    for name in BACKENDS:
        reasons = [_REASONS[name](device_type) for device_type in _DEVICE_TYPES[name]]
        why_not = reasons[0] if all(reasons) else ""
        with _lock:
            calls, last_op = _calls[name], _last_op.get(name)
        records.append(BackendRecord(name, not why_not, why_not, "" if why_not else _detail(name), calls, last_op))
    return records


def requested(backend: str | None) -> str:
    """A caller's ``backend=`` as ops hand it on: None is ``"auto"``."""
    return AUTO if backend is None else backend


def resolve_backend(wanted: str | None, device: torch.device, offered: tuple[str, ...] = BACKENDS) -> str:
    """The backend that an op on ``device`` runs on.

    Args:
        wanted: a name, or None or ``"auto"`` for the environment variable ``ENTROPY_FAST_BACKEND`` and, where that
            is unset, the best available one.
        device: where the op's tensors are.
        offered: the backends that have the op.

    Returns:
        One of :data:`BACKENDS`.

    Raises:
        ConfigError: there is no backend of that name.
        BackendUnavailableError: it was asked for by name and cannot run here.
    """
    origin = "backend"
    if wanted is None or wanted == AUTO:
        origin = _ENVIRONMENT_VARIABLE
        wanted = os.environ.get(_ENVIRONMENT_VARIABLE) or AUTO
    if wanted == AUTO:
        return _best(device.type, offered)
    if wanted not in BACKENDS:
        raise ConfigError(
            f"{origin} is {wanted!r}; expected one of {', '.join(BACKENDS)} or {AUTO}.",
            fix=f"use one of these names, or leave {origin} unset to have one chosen by device.",
        )
    if wanted not in offered:
        raise BackendUnavailableError(
            f"{origin} asks for {wanted!r}, which does not have this op; {', '.join(offered)} have it.",
            fix=f"leave {origin} unset to have a backend chosen by device, or pass backend= to single ops.",
        )
    why_not = _REASONS[wanted](device.type)
    if why_not:
        raise BackendUnavailableError(
            f"{origin} asks for {wanted!r}, which cannot run on {device}: {why_not}.",
            fix=f"see `entropy-fast doctor`, or leave {origin} unset to have a backend chosen by device.",
        )
    return wanted


def runs_natively(device: torch.device) -> bool:
    """Whether a helper of the engines that has a compiled twin for CPUs alone runs compiled on ``device``.

    Not where ``ENTROPY_FAST_BACKEND`` names another backend; and no warning where there is no compiled library, since the ops
    give one.
    """
    wanted = os.environ.get(_ENVIRONMENT_VARIABLE) or AUTO
    return wanted in (AUTO, "native") and not native_backend.cpu_reason(device.type)


def _best(device_type: str, offered: tuple[str, ...]) -> str:
    preferred = _PREFERENCE.get(device_type, ("reference",))
    reasons = []
    for name in preferred:
        if name not in offered:
            continue
        why_not = _REASONS[name](device_type)
        if not why_not:
            break
        reasons.append(f"{name}: {why_not}")
    if name == "reference" and reasons and device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"No compiled kernel can run on {device_type} ({'; '.join(reasons)}). "
            "Ops run in plain torch: right, but slow.",
            EntropyFastWarning,
            stacklevel=2,
        )
    return name


def count_call(name: str, op: str) -> None:
    """Note that backend ``name`` has run ``op`` once."""
    with _lock:
        _calls[name] += 1
        _last_op[name] = op
