"""What is run, in the order of its worth. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "environment"
NO_CUDA_DEVICE = 7  # exit status of the environment's stage


@dataclasses.dataclass(frozen=True)
class Options:
    """What every stage is told.

    Attributes:
        device: ``cuda`` or ``cpu``.
        size: ``full``, or ``micro`` to see that everything runs.
    """

    device: str
    size: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part that has a process and a time limit of its own.

    Attributes:
        name: how it is asked for.
        title: heading in the report.
        share: of the time that is left when it starts; what it does not take goes to those after it.
        command: what runs it: it is given the options and the file for its rows as one JSON object more.
        skipped_on_cpu: why it is not run on a CPU; empty where it is.
    """

    name: str
    title: str
    share: float
    command: tuple[str, ...]
    skipped_on_cpu: str = ""


def _stage(name: str, title: str, share: float, skipped_on_cpu: str = "") -> Stage:
    return Stage(name, title, share, (sys.executable, "-m", f"benchmarks.gpu.{name}"), skipped_on_cpu)


STAGES = (
    _stage(ENVIRONMENT, "Machine", 0.2),
    _stage("build", "Build", 0.5, "the device is the CPU: no CUDA is built; the compiled module there is is used"),
    _stage("exactness", "One pass against two, small models", 0.4),
    _stage("device_tests", "Tests marked gpu", 0.35, "the device is the CPU: these tests need a CUDA device"),
    _stage("kernel_speed", "Kernels against float64, rivals and limits", 0.5),
    _stage("large_model", "The probe beside the training step", 0.8),
    _stage("output_memory", "Memory of linear_token_logprobs_with_units", 1.0),
)
