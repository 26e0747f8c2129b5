"""Ops with compiled kernels, and the choice of which kernel runs.

The only package that imports the compiled library or :mod:`entropy_fast.kernels`. Importing it never fails because one
of them is missing; :func:`backend_report` says what is missing and why.
"""

from entropy_fast.ops.backends import BACKENDS, BackendRecord, backend_report
from entropy_fast.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = ["BACKENDS", "BackendRecord", "TokenLogprobs", "backend_report", "token_logprobs"]
