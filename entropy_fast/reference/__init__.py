"""Every op in plain torch: the definition that the compiled kernels are held to, and their stand-in where none runs."""

from entropy_fast.reference.token_logprobs import probabilities, token_logprobs, token_logprobs_backward

__all__ = ["probabilities", "token_logprobs", "token_logprobs_backward"]
