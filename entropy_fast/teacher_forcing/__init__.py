"""The model's forward over given sequences, always at temperature 1."""

from entropy_fast.teacher_forcing.batch import PackedBatch, pack_rows
from entropy_fast.teacher_forcing.forward import ForwardResult, align_logprobs, model_logits

__all__ = ["ForwardResult", "PackedBatch", "align_logprobs", "model_logits", "pack_rows"]
