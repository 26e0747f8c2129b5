"""Triton kernels, installed as ``entropy_fast.kernels``. Only ``entropy_fast.ops`` imports this package."""
