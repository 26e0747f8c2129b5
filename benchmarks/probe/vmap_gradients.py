"""Per-sample gradients by ``torch.func.vmap(grad_and_value(...))``, a prompt's responses at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.probe.padded import Padded
from benchmarks.probe.per_sample import kernel_sums
from benchmarks.probe.plain_step import selected_logprobs
from benchmarks.probe.setting import Setting
from benchmarks.probe.sums import Sums


def vmap_sums(setting: Setting) -> Sums:
    """Kernel sums; see `benchmarks.probe.per_sample`."""
    trained = {name: p.detach() for name, p in setting.trained.items()}

    def sequence_logprob(
        parameters: dict[str, Tensor], ids: Tensor, mask: Tensor, positions: Tensor, scored: Tensor
    ) -> Tensor:
        width = scored.shape[-1]
        arguments = {
            "input_ids": ids[None],
            "attention_mask": mask[None, None],
            "position_ids": positions[None],
            "use_cache": False,
            "logits_to_keep": width + 1,
        }
        logits = functional_call(setting.model, parameters, (), arguments).logits[:, :-1]
        return (selected_logprobs(logits, ids[None, -width:])[0] * scored).sum()

    mapped = vmap(grad_and_value(sequence_logprob), in_dims=(None, 0, 0, 0, 0))

    def per_sample(part: Padded) -> tuple[Tensor, dict[str, Tensor]]:
        gradients, S = mapped(trained, part.ids[0], _may_look_at(part.attention[0]), part.positions[0], part.scored[0])
        return S, gradients

    # Fused attention kernels have no batching rule. The backward is inside, so that it too sees autocast.
    with sdpa_kernel(SDPBackend.MATH), setting.autocast():
        return kernel_sums(setting, per_sample)


def _may_look_at(attention: Tensor) -> Tensor:
    """[G, T, T] causal mask, made here because transformers looks at values to make its own. Padding sees itself."""
    columns = attention.shape[-1]
    causal = torch.ones(columns, columns, dtype=torch.bool).tril()
    return (causal & (attention[:, None, :] == 1)) | torch.eye(columns, dtype=torch.bool)
