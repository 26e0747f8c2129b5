"""Whole sequences, padded on the right: the model's own forward over given sequences."""

from entropy_fast.ways.teacher_forcing.batch import PaddedBatch, pad_rows
from entropy_fast.ways.teacher_forcing.forward import ForwardResult, align_logprobs, model_logits, result_of_values
from entropy_fast.ways.teacher_forcing.output_layer import (
    OutputHead,
    OutputLayer,
    find_output_head,
    hidden_logprobs,
    hidden_states,
)

__all__ = [
    "ForwardResult",
    "OutputHead",
    "OutputLayer",
    "PaddedBatch",
    "align_logprobs",
    "find_output_head",
    "hidden_logprobs",
    "hidden_states",
    "model_logits",
    "pad_rows",
    "result_of_values",
]
