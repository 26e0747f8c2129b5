"""Every op against what else computes the same, and against this machine's limits: ``python -m benchmarks.kernels``."""
