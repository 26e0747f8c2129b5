"""Operations a forecast cannot do without, on paper, for LoRA with a frozen output layer.

Legend: N_p prompt tokens (of every prompt once), N_r response tokens, one multiplication and one addition are two operations.
"""

from __future__ import annotations

import dataclasses
import time

import torch

from benchmarks.probe.setting import Setting


@dataclasses.dataclass(frozen=True)
class Operations:
    """By part of the work.

    Attributes:
        forward: linear maps with their LoRA, every token once.
        backward: gradients of their inputs: responses once, prompts for the entropy and for the update coefficients.
        attention: scores and weighted values, forward and backward alike.
        output_layer: logits of response tokens, and their unit gradients.
        captured: gradients of the LoRA factors, for both coefficients.
        kernel: X_n · Y_m of all pairs of prompts.
    """

    forward: float
    backward: float
    attention: float
    output_layer: float
    captured: float
    kernel: float

    @property
    def total(self) -> float:
        return float(sum(dataclasses.astuple(self)))


def necessary(setting: Setting) -> Operations:
    """Operations of one call on one batch. No padding counts, nor anything done twice."""
    w, batch = setting.workload, setting.padded
    assert w.rank is not None and w.pretrained is None and w.batches == 1
    head = w.hidden // w.heads
    key_value = head * w.key_value_heads
    into_attention = [(w.hidden, w.hidden), (w.hidden, key_value), (w.hidden, key_value)]
    maps = [*into_attention, (w.hidden, w.hidden), (w.hidden, w.intermediate), (w.hidden, w.intermediate)]
    maps.append((w.intermediate, w.hidden))
    base = sum(n_in * n_out for n_in, n_out in maps) * w.layers
    lora = sum(w.rank * (n_in + n_out) for n_in, n_out in maps) * w.layers
    # Embeddings are frozen: what enters the first layer needs no gradient.
    unneeded = sum(n_in * n_out + w.rank * n_in for n_in, n_out in into_attention)
    prompt = batch.attention[:, 0, : batch.prompt_width].sum(-1).double()
    response = batch.scored.sum(-1).double()
    N_p, N_r = float(prompt.sum()), float(response.sum())
    # Pairs of tokens of which one looks at the other.
    prompt_pairs = float((prompt * (prompt + 1) / 2).sum())
    response_pairs = float((response * prompt[:, None] + response * (response + 1) / 2).sum())
    per_pair = 4 * w.hidden * w.layers
    elements = sum(p.numel() for p in setting.trained.values())
    return Operations(
        forward=2 * (base + lora) * (N_p + N_r),
        backward=2 * (base + lora - unneeded) * (2 * N_p + N_r),
        attention=per_pair * (3 * response_pairs + 5 * prompt_pairs),
        output_layer=4 * w.hidden * w.vocabulary * N_r,
        captured=4 * lora * (N_p + N_r),
        kernel=2 * w.prompts**2 * elements,
    )


def matrix_product_rate(size: int = 2048, repeat: int = 5) -> float:
    """Operations per second of the best of a few float32 products of square matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
