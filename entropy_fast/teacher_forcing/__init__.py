"""The model's forward over given sequences, always at temperature 1."""

from entropy_fast.teacher_forcing.batch import PackedBatch, pack_rows
from entropy_fast.teacher_forcing.forward import ForwardResult, align_logprobs, model_logits
from entropy_fast.teacher_forcing.output_layer import (
    OutputHead,
    OutputLayer,
    find_output_head,
    find_output_layer,
    hidden_logprobs,
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
    "model_logits",
    "pack_rows",
    "same_logits",
]
