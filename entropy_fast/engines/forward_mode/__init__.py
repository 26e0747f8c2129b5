"""Forwards that carry derivatives along one direction of the parameters, by torch's forward mode and a few rules more."""

from entropy_fast.engines.forward_mode.forward import ForwardDerivatives, ForwardWithTangents

__all__ = ["ForwardDerivatives", "ForwardWithTangents"]
