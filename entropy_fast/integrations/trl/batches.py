"""A TRL trainer's micro-batches as a `StepWindow`.

Legend: P and C padded lengths of prompts and completions of the whole window, T = P + C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropy_fast.columns import TokenScores
from entropy_fast.errors import ConfigError, ModelStateError, RolloutsError
from entropy_fast.integrations.step_window import StepWindow
from entropy_fast.integrations.trl.hooks import BORN, GROUP, REWARD, Clipped, MicroBatch
from entropy_fast.integrations.trl.setting import sampling_of, scaler_of
from entropy_fast.rollouts import Rollouts

__all__ = ["window_of"]

IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "spatial_shapes", "image_position_ids",
    "num_tiles", "pixel_values_videos", "input_features",
)  # fmt: skip
# Who sampled, as near as the batch says it: an engine of its own, else the policy before the rows were used a first time.
SAMPLED = ("sampling_per_token_logps", "old_per_token_logps")
InPlace = Callable[[Sequence[Tensor]], Tensor]
NUMBERS = ("reward", "length")


def window_of(trainer: Any, batches: Sequence[MicroBatch], functionals: Sequence[str], clipped: Clipped) -> StepWindow:
    """All micro-batches of a step as one window, whatever their widths.

    Args:
        trainer: whose step it is.
        batches: at least one, after their backward.
        functionals: of ``reward`` and ``length``.
        clipped: what clipping has done to the gradient.

    Raises:
        ConfigError: the batches are of images, the gradient is still scaled, or nothing was captured.
        ModelStateError: the gradient is not finite, and the step is taken all the same.
        RolloutsError: a row cannot be used.
    """
    _check(trainer, batches, clipped)
    width_p = max(batch.inputs["prompt_ids"].shape[1] for batch in batches)
    width_c = max(batch.inputs["completion_ids"].shape[1] for batch in batches)

    def joined(name: str) -> Tensor:
        return torch.cat([batch.inputs[name] for batch in batches])

    def prompts(name: str) -> Tensor:
        return torch.cat([F.pad(b.inputs[name], (width_p - b.inputs[name].shape[1], 0)) for b in batches])

    def completions(tables: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.pad(table, (0, width_c - table.shape[1])) for table in tables])

    def in_place(tables: Sequence[Tensor]) -> Tensor:
        """[N, T] numbers of completion tokens in the tokens' own columns, fp64 on the CPU."""
        return F.pad(completions(tables).double(), (width_p, 0)).cpu()

    attended = completions([b.inputs["completion_mask"] for b in batches])
    counted = completions([_counted(b) for b in batches])
    prompt_mask = prompts("prompt_mask")
    drawn = sampling_of(trainer)
    rollouts = Rollouts(
        input_ids=torch.cat([prompts("prompt_ids"), completions([b.inputs["completion_ids"] for b in batches])], 1),
        attention_mask=torch.cat([prompt_mask, attended], 1),
        loss_mask=torch.cat([torch.zeros_like(prompt_mask), counted], 1),
        group_ids=joined(GROUP),
        advantages=_advantages(batches),
        max_lengths=trainer.max_completion_length,
        old_logprobs=_old_logprobs(trainer, batches, in_place),
        temperature=drawn.temperature,
        top_p=drawn.top_p,
        top_k=drawn.top_k,
        min_p=drawn.min_p,
        prompts=_texts(trainer, batches),
    )
    skipped = _skipped(trainer, clipped)
    scale = 1.0 if skipped is not None else _scale(trainer) / clipped.factor
    a, e = (_coefficients(batches, name, scale, in_place) for name in ("by_logprob", "by_entropy"))
    if a is None:
        raise ConfigError("no micro-batch of the step has a gradient by log-probs.", fix="look at the trainer's loss.")
    return StepWindow(
        rollouts,
        a,
        e,
        _scores(trainer, batches, in_place),
        _functionals(functionals, batches, rollouts),
        joined(BORN).cpu() == trainer.state.global_step,
        skipped,
    )


def _check(trainer: Any, batches: Sequence[MicroBatch], clipped: Clipped) -> None:
    if not batches:
        raise ConfigError(
            "no micro-batch was seen before the optimizer's step.",
            fix="register the callback before training, on the trainer that trains.",
        )
    images = [name for name in IMAGES if any(batch.inputs.get(name) is not None for batch in batches)]
    if images:
        raise ConfigError(f"the batch holds images ({', '.join(images)}).", fix="forecast text models alone.")
    if any(batch.logprobs is None for batch in batches):
        raise ConfigError(
            "the trainer's loss did not go through _get_per_token_logps_and_entropies (a fused loss kernel does not).",
            fix="train without it (use_liger_kernel=False) to have forecasts.",
        )
    if any(GROUP not in batch.inputs for batch in batches):
        raise ConfigError(
            "the responses of this step were made before the callback was there.",
            fix="nothing: forecasts begin with the next generation.",
        )
    scaled = scaler_of(trainer) is not None
    if scaled and clipped.norm is None:
        raise ConfigError(
            "the gradient is still multiplied by the fp16 scaler's factor before the step.",
            fix="set max_grad_norm, with which the trainer takes the factor out first, or train in bf16.",
        )
    if not scaled and clipped.norm is not None and not math.isfinite(clipped.norm):
        raise ModelStateError(
            f"the gradient has norm {clipped.norm}, and the optimizer steps with it.",
            fix="look for what is not finite in the loss (rewards, log-probs); the policy may be lost after this step.",
        )


def _skipped(trainer: Any, clipped: Clipped) -> str | None:
    """Why the optimizer will not take the step."""
    if scaler_of(trainer) is None or clipped.norm is None or math.isfinite(clipped.norm):
        return None
    return "the fp16 scaler has found gradients that overflow, so that the optimizer skips the step"


def _counted(batch: MicroBatch) -> Tensor:
    """[n, C] the tokens that the loss is of."""
    mask: Tensor = batch.inputs["completion_mask"]
    tools = batch.inputs.get("tool_mask")
    return mask if tools is None else mask * tools


def _advantages(batches: Sequence[MicroBatch]) -> Tensor:
    """[N]; where they differ by token, their means over a response: what they are used for here is a report."""
    found = []
    for batch in batches:
        own: Tensor = batch.inputs["advantages"].double()
        if own.dim() == 2:
            mask = _counted(batch)
            own = (own * mask).sum(1) / mask.sum(1).clamp(min=1)
        found.append(own)
    return torch.cat(found)


def _scale(trainer: Any) -> float:
    """What an fp16 scaler multiplies the loss by before its backward."""
    scaler = scaler_of(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _sampled_logprobs(batches: Sequence[MicroBatch], in_place: InPlace) -> Tensor | None:
    """[N, T] log-probs of the policy that sampled; None where the batch says nothing of it."""
    for name in SAMPLED:
        tables = [batch.inputs.get(name) for batch in batches]
        if all(table is not None for table in tables):
            # An engine gives NaN where it has none: taken for the policy's own, as the trainer's ratios take it.
            return in_place([
                torch.where(_counted(b).bool(), torch.where(table.isnan(), b.logprobs, table), 0.0)
                for table, b in zip(tables, batches, strict=True)
                if table is not None and b.logprobs is not None
            ])  # fmt: skip
    return None


def _old_logprobs(trainer: Any, batches: Sequence[MicroBatch], in_place: InPlace) -> Tensor | None:
    """[N, T] log-probs of the policy that sampled: where the trainer keeps none, those of now; None where those are random."""
    found = _sampled_logprobs(batches, in_place)
    now = [b.logprobs for b in batches if b.logprobs is not None]
    if found is None and len(now) == len(batches) and not _drops_out(trainer.model):
        found = in_place([torch.where(_counted(b).bool(), own, 0.0) for b, own in zip(batches, now, strict=True)])
    return None if found is None else found.to(batches[0].inputs["prompt_ids"].device)


def _coefficients(batches: Sequence[MicroBatch], name: str, scale: float, in_place: InPlace) -> Tensor | None:
    """[N, T] -∂L/∂s_t or -∂L/∂H_t, 0 at tokens that the loss does not count; None where no micro-batch has any."""
    tables = [getattr(batch, name) for batch in batches]
    if all(table is None for table in tables):
        return None
    filled = []
    for table, batch in zip(tables, batches, strict=True):
        counted = _counted(batch)
        own = torch.zeros(counted.shape, dtype=torch.float64, device=counted.device) if table is None else table
        # Where nothing counts, a loss that divides by zero tokens may leave anything.
        filled.append(torch.where(counted.bool(), -own / scale, 0.0))
    found: Tensor = in_place(filled)
    if name == "by_entropy" and not bool(found.any()):
        return None
    return found


def _scores(trainer: Any, batches: Sequence[MicroBatch], in_place: InPlace) -> TokenScores | None:
    """What the training forward said, where it is what the policy says."""
    if any(batch.entropies is None for batch in batches) or _drops_out(trainer.model):
        return None
    return TokenScores(
        in_place([torch.where(_counted(b).bool(), b.logprobs, 0.0) for b in batches if b.logprobs is not None]),
        in_place([torch.where(_counted(b).bool(), b.entropies, 0.0) for b in batches if b.entropies is not None]),
    )


def _drops_out(model: nn.Module) -> bool:
    """Whether training forwards are random."""
    config = getattr(model, "config", None)
    settings = ("attention_dropout", "dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")
    of_config = any(isinstance(p := getattr(config, name, 0.0), (int, float)) and p > 0 for name in settings)
    return of_config or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


def _functionals(names: Sequence[str], batches: Sequence[MicroBatch], rollouts: Rollouts) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "length":
            found[name] = rollouts.response_lengths.double()
        elif name == "reward" and all(REWARD in batch.inputs for batch in batches):
            rewards = torch.cat([batch.inputs[REWARD] for batch in batches]).double().cpu()
            if bool(torch.isfinite(rewards).all()):
                found[name] = rewards
        elif name not in NUMBERS:
            raise RolloutsError(f"functionals: {name!r} is not known.", fix=f"use some of {', '.join(NUMBERS)}.")
    return found


def _texts(trainer: Any, batches: Sequence[MicroBatch]) -> list[str] | None:
    """One text for every prompt, in order of first appearance."""
    decode = getattr(trainer.processing_class, "decode", None)
    if decode is None:
        return None
    found: dict[int, str] = {}
    for batch in batches:
        ids, mask, groups = batch.inputs["prompt_ids"], batch.inputs["prompt_mask"], batch.inputs[GROUP].tolist()
        for row, group in enumerate(groups):
            if group not in found:
                found[group] = str(decode(ids[row][mask[row].bool()].tolist(), skip_special_tokens=True))
    return list(found.values())
