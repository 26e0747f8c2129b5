"""Ops with compiled kernels, and the choice of which kernel runs.

The only package that imports the compiled library or :mod:`entropy_fast.kernels`. Importing it never fails because one
of them is missing; :func:`backend_report` says what is missing and why.
"""

from entropy_fast.ops.backends import BACKENDS, BackendRecord, backend_report
from entropy_fast.ops.frozen_layers import compiled_layers_take, gated_silu, rms_norm
from entropy_fast.ops.linear_token_logprobs import linear_token_logprobs, linear_token_logprobs_with_units
from entropy_fast.ops.packed_attention import packed_attention, packed_attention_backward
from entropy_fast.ops.precondition_accumulate import precondition_accumulate
from entropy_fast.ops.sliced_linear_token_logprobs import (
    sliced_linear_token_logprobs,
    sliced_linear_token_logprobs_with_units,
)
from entropy_fast.ops.token_logprobs import TokenLogprobs, token_logprobs
from entropy_fast.ops.unit_products import UnitRuns, add_unit_products
from entropy_fast.ops.vocabulary_slice import VocabularySlice
from entropy_fast.reference import LinearTokenLogprobs

__all__ = [
    "BACKENDS",
    "BackendRecord",
    "LinearTokenLogprobs",
    "TokenLogprobs",
    "UnitRuns",
    "VocabularySlice",
    "add_unit_products",
    "backend_report",
    "compiled_layers_take",
    "gated_silu",
    "linear_token_logprobs",
    "linear_token_logprobs_with_units",
    "packed_attention",
    "packed_attention_backward",
    "precondition_accumulate",
    "rms_norm",
    "sliced_linear_token_logprobs",
    "sliced_linear_token_logprobs_with_units",
    "token_logprobs",
]
