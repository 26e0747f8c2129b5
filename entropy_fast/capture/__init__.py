"""What one backward of Σ S_i tells about every sequence: inputs of each parameter's module, gradients of its outputs.

Sequences do not interact, so the signal that reaches sequence i's rows is that of ∇S_i alone, and any coefficient of the
sequence can be put on it afterwards. Where coefficients differ within a sequence, they go into the backward, and X and g
take one each.
"""

from entropy_fast.capture.modules import CapturedModules
from entropy_fast.capture.sequence_projections import Directions, SequenceProjections
from entropy_fast.capture.signal_rows import SignalRows
from entropy_fast.capture.unit_gradients import UnitGradients

__all__ = ["CapturedModules", "Directions", "SequenceProjections", "SignalRows", "UnitGradients"]
