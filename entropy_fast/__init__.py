"""How much will the next RL update change a language model's policy entropy, how sure are we, and why."""

from __future__ import annotations

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING

from entropy_fast._version import __version__
from entropy_fast.accessors import register_accessor

if TYPE_CHECKING:
    from entropy_fast import candidates, errors, ops
    from entropy_fast.api import fast_delta_h1
    from entropy_fast.config import EstimateOptions, RunOptions
    from entropy_fast.estimates.result import DeltaH1Result
    from entropy_fast.offline_entropy_probe import OfflineEntropyProbe
    from entropy_fast.probe_components import ProbeComponents
    from entropy_fast.rollouts import Rollouts, read_rollouts, write_rollouts
    from entropy_fast.step import AdamState

__all__ = [
    "AdamState",
    "DeltaH1Result",
    "EstimateOptions",
    "OfflineEntropyProbe",
    "ProbeComponents",
    "Rollouts",
    "RunOptions",
    "__version__",
    "candidates",
    "errors",
    "fast_delta_h1",
    "ops",
    "read_rollouts",
    "write_rollouts",
]

# entropy_fast.kernels lives in kernels/triton of a source tree. Extending the path lets `python -m benchmarks.x`, which
# imports this package from the working directory, find it in the installed copy of the package.
__path__ = extend_path(__path__, __name__)

# Resolved on first use: the command line answers --help, and the compiled library loads, without importing torch.
_HOME = {
    "AdamState": "entropy_fast.step",
    "DeltaH1Result": "entropy_fast.estimates.result",
    "EstimateOptions": "entropy_fast.config",
    "OfflineEntropyProbe": "entropy_fast.offline_entropy_probe",
    "ProbeComponents": "entropy_fast.probe_components",
    "Rollouts": "entropy_fast.rollouts",
    "RunOptions": "entropy_fast.config",
    "fast_delta_h1": "entropy_fast.api",
    "read_rollouts": "entropy_fast.rollouts",
    "write_rollouts": "entropy_fast.rollouts",
}
# What results and ledgers look like is known by a layer above them.
register_accessor("result.plot", "entropy_fast.report.plots.accessors:ResultPlots")
register_accessor("result.html", "entropy_fast.report.notebook:result_html")
register_accessor("ledger.plot", "entropy_fast.report.plots.accessors:LedgerPlots")

_MODULES = ("candidates", "errors", "ops")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'entropy_fast' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
