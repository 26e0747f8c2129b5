"""What one backward of Σ S_i tells about every sequence: inputs of each parameter's module, gradients of its outputs.

Sequences do not interact, so the signal that reaches sequence i's rows is that of ∇S_i alone, and any coefficient of the
sequence can be put on it afterwards. Where coefficients differ within a sequence, they go into the backward.
"""

from entropy_fast.capture import dora, lookups, lora, scaled  # noqa: F401 (each registers its kinds of layers)
from entropy_fast.capture.gradient_recorder import GradientRecorder
from entropy_fast.capture.layer_kinds import CapturedLayer, LayerKind, own_parameters, register_layer_kind
from entropy_fast.capture.modules import CapturedModules
from entropy_fast.capture.projection_recorder import Directions, ProjectionRecorder
from entropy_fast.capture.recorder import Recorder
from entropy_fast.capture.row_recorder import RowRecorder

__all__ = [
    "CapturedLayer",
    "CapturedModules",
    "Directions",
    "GradientRecorder",
    "LayerKind",
    "ProjectionRecorder",
    "Recorder",
    "RowRecorder",
    "own_parameters",
    "register_layer_kind",
]
