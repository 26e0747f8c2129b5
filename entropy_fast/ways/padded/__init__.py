"""The model's forward over given sequences, always at temperature 1."""

from entropy_fast.ways.padded.batch import PackedBatch, pack_rows
from entropy_fast.ways.padded.forward import ForwardResult, align_logprobs, model_logits, result_of_values
from entropy_fast.ways.padded.output_layer import (
    OutputHead,
    OutputLayer,
    find_output_head,
    find_output_layer,
    hidden_logprobs,
    hidden_states,
    same_logits,
)

__all__ = [
    "ForwardResult",
    "OutputHead",
    "OutputLayer",
    "PackedBatch",
    "align_logprobs",
    "find_output_head",
    "find_output_layer",
    "hidden_logprobs",
    "hidden_states",
    "model_logits",
    "pack_rows",
    "result_of_values",
    "same_logits",
]
