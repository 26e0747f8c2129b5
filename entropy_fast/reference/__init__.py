"""Every op in plain torch: the definition that the compiled kernels are held to, and their stand-in where none runs."""

from entropy_fast.reference.frozen_layers import gated_silu, rms_norm
from entropy_fast.reference.linear_token_logprobs import LinearTokenLogprobs, linear_logits, linear_token_logprobs
from entropy_fast.reference.packed_attention import packed_attention
from entropy_fast.reference.precondition_accumulate import precondition_accumulate
from entropy_fast.reference.token_logprobs import log_probabilities, token_logprobs, token_logprobs_backward
from entropy_fast.reference.unit_products import unit_products
from entropy_fast.reference.vocabulary_slices import (
    MergedSlices,
    SliceValues,
    merge_slices,
    sliced_linear_token_logprobs,
)

__all__ = [
    "LinearTokenLogprobs",
    "MergedSlices",
    "SliceValues",
    "gated_silu",
    "linear_logits",
    "linear_token_logprobs",
    "log_probabilities",
    "merge_slices",
    "packed_attention",
    "precondition_accumulate",
    "rms_norm",
    "sliced_linear_token_logprobs",
    "token_logprobs",
    "token_logprobs_backward",
    "unit_products",
]
