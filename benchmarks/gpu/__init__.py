"""What a machine with a GPU has to show, in one command and a given time: ``python benchmarks/gpu_check.py``."""
