"""Options of a probe, in two objects: what is estimated, and how it is run. They are data: nothing here touches a model.

An option is written down once, as a field: its type, its default, and what `option` says of it (`entropy_fast.schema`).
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Literal

from entropy_fast.errors import ConfigError
from entropy_fast.schema import OptionField, Options, bytes_of, default_of, option, option_fields

if TYPE_CHECKING:
    import torch

    AutocastDtype = Literal["bfloat16", "float16"] | torch.dtype | None
    FolderPath = str | os.PathLike[str] | None
else:
    # torch is not imported for a command's help; a torch.dtype is taken by its name.
    AutocastDtype = Literal["bfloat16", "float16"] | None
    FolderPath = str | None  # a path object is taken by its name too

__all__ = ["EstimateOptions", "OptionField", "RunOptions", "default_of", "option_fields"]

Weighting = Literal["dr_grpo", "per_token", "sequence", "pooled"]
Part = Literal["direct", "visitation"]
EntropyEstimator = Literal["score_function", "rao_blackwell"]
ImportanceRatio = Literal["none", "token", "sequence"]
Baseline = Literal["prompts", "responses"]
StepKind = Literal["next", "adam_static"]
GradientSource = Literal["rollouts", "live"]
KlEstimator = Literal["k1", "k2", "k3"]
AccumulateOn = Literal["device", "cpu"]
YPass = Literal["backward", "autograd_grad"]
ConditionalVariance = Literal["per_prompt", "alpha"]
WhenBusy = Literal["wait", "refuse"]
Ranks = Literal["own", "all"]


@dataclasses.dataclass(frozen=True)
class EstimateOptions(Options):
    """What is estimated: which entropy, which update, with which estimator.

    Attributes:
        weighting: length weight w_i of a sequence, in the entropy and in the update: ``dr_grpo`` 1/L_max; ``per_token`` 1/L_i,
            as GRPO has it; ``sequence`` 1; ``pooled`` one over the mean length of the whole batch, as DAPO and BNPO have it.
        entropy_weighting: another one for the entropy alone: what is forecast is the entropy per token of generation budget,
            the mean of responses' means, the entropy of a whole response, or the mean over all tokens that trainers log. None
            takes ``weighting``.
        update_weighting: another one for the update alone: how its loss weighs sequences. None takes ``weighting``.
        entropy_estimator: how the entropy gradient is estimated: ``rao_blackwell`` from the entropy of the model's distribution
            at every token; ``score_function`` from log-probs, with a leave-one-out baseline, which costs fewer backwards and
            usually varies more from sample to sample.
        parts: which parts of the entropy change are wanted, each with its own error bar: ``direct``, how the distributions
            change at the prefixes that were visited, and ``visitation``, how often prefixes are visited, which holds most of
            the noise. ``("direct",)`` takes that one alone, which saves a backward, and then the total is not known. None is
            both; with ``entropy_estimator="score_function"`` there are none.
        baseline: what the visitation part compares the entropy to come with: ``prompts``, a ridge regression on the token's
            entropy and position over the batch's other prompts, which takes a sweep without gradients where the batch does not
            go through in one forward; ``responses``, the mean over the prompt's other responses at the same position.
        policy_temperature: T where the policy itself is softmax(logits/T), because its loss and its metrics are of log-probs of
            logits/T. Log-probs, entropies and gradients are those of that policy. Never taken from how rollouts were sampled.
        importance_ratio: ``token`` multiplies the update's gradient at every token by r_t = πθ/π_old, from the rollouts'
            ``old_logprobs``, as the clipped surrogate of PPO and GRPO does once θ has moved on from what sampled, and costs
            another backward; ``sequence`` has one ratio a response, the geometric mean of its tokens' (GSPO); ``none`` takes
            the ratio to be 1.
        clip_range: ε_low and ε_high, or one number for both: with ratios, tokens (or responses) whose ratio is above 1 + ε_high
            under a positive advantage, or below 1 - ε_low under a negative one, send nothing back; None clips nothing.
        dual_clip: c > 1: with ratios, those above c under a negative advantage send nothing back either; None for no limit.
        kl_coefficient: β of a penalty on the divergence from a reference policy, β · w_i · KL_t a token; needs the rollouts'
            ``ref_logprobs``, and costs another backward.
        kl_estimator: with d_t = log πθ - log π_ref: ``k1`` d_t, ``k2`` d_t²/2, ``k3`` exp(-d_t) - 1 + d_t.
        entropy_bonus: β of a bonus for entropy in the update's loss, β · w_i · H_t a token; costs another backward.
        blocks: number of blocks of prompts that are the units of the same-batch estimate (fewer backward passes, a coarser
            error bar); None takes every prompt by itself.
        learning_rate: the step's; all groups of the optimizer are rescaled alike. None takes the optimizer's.
        step: ``next``, the whole step that the optimizer will take: momentum, weight decay, the fresh gradient, and what that
            does to the optimizer's scale, each apart in ``result.step_parts``; ``adam_static``, lr · P g with Adam's stored
            second moments and nothing else. None is ``next`` where a live optimizer (of any kind) is given and the engine can,
            and ``adam_static`` elsewhere.
        max_grad_norm: limit of the gradient's norm over all parameters that the trainer clips to before the step; with
            ``step="next"``. None clips nothing.
        gradient: ``rollouts``, the gradient of the described update on the batch; ``live``, what stands in the parameters'
            ``.grad`` just before ``optimizer.step()``, whatever loss it is of; with ``step="next"``.
        sample: with ``gradient="live"``, how many prompts of the batch the entropy side is estimated from; None takes all.
        relative_error: with ``gradient="live"``, go on in chunks of prompts until the direct part's standard error is at most
            this share of it, or the batch (or ``sample``) is used up; None does not.

    Raises:
        ConfigError: an option has a value outside what is listed.
    """

    weighting: Weighting = option("dr_grpo", "length weight of a sequence: 1/L_max, 1/L_i, 1, or 1/mean L")
    entropy_weighting: Weighting | None = option(None, "another length weight for the entropy")
    update_weighting: Weighting | None = option(None, "another length weight for the update")
    entropy_estimator: EntropyEstimator = option(
        "rao_blackwell", "entropy gradient from token entropies, or from log-probs"
    )
    parts: tuple[Part, ...] | None = option(
        None, "direct, or direct,visitation: which parts are wanted (rao_blackwell)"
    )
    baseline: Baseline = option("prompts", "of the visitation part: from other prompts, or from other responses")
    policy_temperature: float = option(1.0, "T of a policy that is softmax(logits/T)")
    importance_ratio: ImportanceRatio = option(
        "none", "ratios in the update, from old_logprobs: none, by token, by sequence"
    )
    clip_range: tuple[float, float] | None = option(None, "clip range of ratios: E, or LOW,HIGH where they differ")
    dual_clip: float | None = option(None, "largest ratio under a negative advantage")
    kl_coefficient: float = option(0.0, "penalty on the divergence from ref_logprobs", least=0)
    kl_estimator: KlEstimator = option("k3", "how that divergence is estimated")
    entropy_bonus: float = option(0.0, "bonus for entropy in the update's loss")
    blocks: int | None = option(None, "blocks of prompts as units: less work, a coarser error", least=2)
    learning_rate: float | None = option(None, "instead of the optimizer's")
    step: StepKind | None = option(None, "the optimizer's whole next step, or Adam's static geometry")
    max_grad_norm: float | None = option(None, "the trainer clips the gradient's norm to this (step next)")
    gradient: GradientSource = option(
        "rollouts", "of the described update, or the one that stands in .grad (step next)"
    )
    sample: int | None = option(None, "prompts that the entropy side is estimated from (gradient live)", least=2)
    relative_error: float | None = option(None, "of the direct part, at which to stop (gradient live)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts is not None and self.entropy_estimator != "rao_blackwell":
            raise ConfigError(
                f"EstimateOptions: parts={self.parts!r} with entropy_estimator={self.entropy_estimator!r}, which has none.",
                fix="pass entropy_estimator='rao_blackwell' (--entropy-estimator rao_blackwell), or no parts.",
            )
        for name in ("clip_range", "dual_clip"):
            if getattr(self, name) is not None and self.importance_ratio == "none":
                raise ConfigError(
                    f"EstimateOptions: {name}={getattr(self, name)!r} with importance_ratio='none', whose ratios are all 1.",
                    fix=f"pass importance_ratio='token' (--importance-ratio token), or no {name} "
                    f"(--{name.replace('_', '-')} none).",
                )
        if not 0 < self.policy_temperature < math.inf:
            raise ConfigError(
                f"EstimateOptions: `policy_temperature` is {self.policy_temperature!r}.",
                fix="use a number above 0; 1 for a policy whose loss is of the model's own log-probs.",
            )
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise ConfigError(
                f"EstimateOptions: `dual_clip` is {self.dual_clip!r}.", fix="use a number above 1, such as 3."
            )
        self._check_step()
        for name in ("kl_coefficient", "entropy_bonus"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(
                    f"EstimateOptions: `{name}` is {getattr(self, name)!r}.", fix="use a finite number, such as 0.01."
                )

    def _check_step(self) -> None:
        for name in ("max_grad_norm", "relative_error"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"EstimateOptions: `{name}` is {value!r}.", fix="use a finite number above 0, or None."
                )
        live = self.gradient == "live"
        for name, wants, reason in (
            ("max_grad_norm", self.step != "adam_static", "step='adam_static', which has no clipping"),
            ("gradient", self.step != "adam_static", "step='adam_static', which is of a described update"),
            ("sample", live, "gradient='rollouts', which takes every prompt of the batch"),
            ("relative_error", live, "gradient='rollouts', which takes every prompt of the batch"),
            ("blocks", not live, "gradient='live', which takes single prompts' parts out of .grad"),
        ):
            if name in self.changed() and not wants:
                raise ConfigError(
                    f"EstimateOptions: {name}={getattr(self, name)!r} with {reason}.", fix="leave one of the two out."
                )
        if self.relative_error is not None and "pooled" in (self.of_entropy, self.of_update):
            raise ConfigError(
                "EstimateOptions: relative_error goes on in chunks of prompts, and weighting 'pooled' is over the whole batch.",
                fix="pass sample, which takes one chunk, or another weighting.",
            )
        if self.relative_error is not None and not self.wanted_parts:
            raise ConfigError(
                "EstimateOptions: relative_error is about the direct part, and entropy_estimator='score_function' has none.",
                fix="use entropy_estimator='rao_blackwell'.",
            )

    @property
    def samples(self) -> bool:
        """Whether the entropy side may be from a part of the batch."""
        return self.sample is not None or self.relative_error is not None

    @property
    def of_entropy(self) -> Weighting:
        """The length weight of the entropy."""
        return self.entropy_weighting or self.weighting

    @property
    def of_update(self) -> Weighting:
        """The length weight of the update."""
        return self.update_weighting or self.weighting

    @property
    def wanted_parts(self) -> tuple[Part, ...]:
        """The parts of the entropy change that are taken; none with the score function."""
        if self.entropy_estimator != "rao_blackwell":
            return ()
        return ("direct", "visitation") if self.parts is None else self.parts


@dataclasses.dataclass(frozen=True)
class RunOptions(Options):
    """How it is run: by which engine, within which memory, in which precision, and what is kept.

    Attributes:
        engine: name of an engine (`entropy_fast.engines`); ``auto`` is ``one_pass``, or ``two_pass`` where an option asks for
            what it alone has.
        memory_budget: bytes, as a number or like "8GiB", that may be spent on keeping every unit's gradients, which gives the
            whole influence kernel; above it the kernel's diagonal, row and column sums come from a second sweep over the batch.
            A microbatch's activations are held to it too.
        prompts_per_microbatch: prompts in one forward; None leaves that to the engine: one for the two-pass engine, and as
            many tokens as matrix products need to run at full rate for the one-pass engine.
        autocast_dtype: run forwards under autocast with this dtype (a torch.dtype is taken too); None leaves the caller's
            autocast state alone.
        accumulate_on: where X_sum and Y_sum are kept; ``cpu`` costs a copy per microbatch and frees device memory.
        full_kernel: the whole influence kernel K [units, units] is wanted, which also gives the unbiased variance of U. The
            one-pass engine keeps it wherever ``memory_budget`` allows; with this it is an error where that does not.
        by_sequence: give every sequence's share of δH₁ too, by one more sweep a batch. With one batch, every unit's gradients
            have to fit ``memory_budget``.
        by_token: give every response token's share of δH₁ and of its parts too, as one whose log-prob and entropy change, by a
            forward with tangents for every unit. With one batch, every unit's gradients have to fit ``memory_budget``. The jvp
            engine knows them without being asked.
        max_excluded_share: largest share of ‖g‖² that may sit in elements the optimizer has no second moment for
            (v = 0, no state, not in the optimizer) before the probe refuses to answer.
        strict: an untouched trainable parameter is an error instead of a count.
        ranks: whose forecast it is under torch.distributed: ``own``, each process makes one from the rollouts that it is given
            and waits for nobody; ``all``, the processes of the default group make one together, each from its own share of the
            prompts. All of them have to make the call, with replicas (or FSDP2's shards) of one model and the same, whole
            rollouts (`entropy_fast.distributed.gather_rows` brings rows together that are spread over them), and all get the
            same numbers.
        rank_timeout: seconds that ranks wait for one another before who is missing ends the probe on all of them.
        checkpoint: folder in which the probe keeps what it has added up so far, and from which the same call goes on after it
            was ended before its time: to the same number, bit by bit where the machine and its threads are the same. A finished
            probe removes what it has kept there. None keeps nothing.
        checkpoint_seconds: between two of them; 0 for one after every microbatch. None is a minute, or as much longer as keeps
            the writing of sums to a fiftieth of the time. There is one at the end of every sweep and after Ctrl-C in any case.
        when_busy: what to do while another probe runs in this process, of whatever model: they cannot run at once.
        y_pass: how the two-pass engine takes the update gradient; ``autograd_grad`` is the route some scripts use, kept to
            compare with.
        conditional_variance: how the two-pass engine obtains the per-prompt projections of the entropy batch in the two-batch
            estimate: one backward a prompt, or the double backward of the alpha trick.

    Raises:
        ConfigError: an option has a value outside what is listed.
    """

    engine: str = option("auto", "auto, one_pass, two_pass, or jvp (two batches)")
    memory_budget: int | str = option("4GiB", "for every unit's gradients, and for a microbatch's activations")
    prompts_per_microbatch: int | None = option(None, "prompts in one forward", least=1)
    autocast_dtype: AutocastDtype = option(None, "forwards under autocast")
    accumulate_on: AccumulateOn = option("device", "where gradient sums are kept")
    full_kernel: bool = option(False, "the whole influence kernel K is wanted")
    by_sequence: bool = option(False, "shares of sequences (one_pass)")
    by_token: bool = option(False, "shares of response tokens (one_pass)")
    max_excluded_share: float = option(
        0.01, "largest share of the squared gradient without second moment", least=0, most=1
    )
    strict: bool = option(False, "a parameter without a gradient is an error")
    ranks: Ranks = option("own", "of torch.distributed: a forecast each, or one by all")
    rank_timeout: float = option(600.0, "seconds that ranks wait for one another (ranks all)", least=1)
    checkpoint: FolderPath = option(None, "folder that an ended probe goes on from")
    checkpoint_seconds: float | None = option(None, "seconds between two checkpoints", least=0)
    when_busy: WhenBusy = option("wait", "while another probe runs in this process")
    y_pass: YPass = option("backward", "two_pass: route of the update gradient")
    conditional_variance: ConditionalVariance = option("per_prompt", "two_pass, two batches: or the double backward")

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, os.PathLike):
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        super().__post_init__()
        if self.checkpoint == "":
            raise ConfigError("RunOptions: `checkpoint` is empty.", fix="use the path of a folder, or None.")
        if self.checkpoint_seconds is not None and not math.isfinite(self.checkpoint_seconds):
            raise ConfigError(
                f"RunOptions: `checkpoint_seconds` is {self.checkpoint_seconds!r}.", fix="use a finite number from 0."
            )
        if self.checkpoint is None and self.checkpoint_seconds is not None:
            raise ConfigError(
                f"RunOptions: checkpoint_seconds={self.checkpoint_seconds!r} without a checkpoint.",
                fix="pass checkpoint=FOLDER (--checkpoint FOLDER) too.",
            )

    def refuse_checkpoint(self, reason: str) -> None:
        """Raise where there is nothing that a checkpoint could be gone on from.

        Args:
            reason: why not.

        Raises:
            ConfigError: one is asked for.
        """
        if self.checkpoint is not None:
            raise ConfigError(f"checkpoint={self.checkpoint!r}: {reason}.", fix="leave checkpoint out.")

    @property
    def memory_bytes(self) -> int:
        """``memory_budget`` as a number of bytes."""
        found = bytes_of(self.memory_budget)
        assert found is not None
        return found

    @property
    def torch_autocast_dtype(self) -> torch.dtype | None:
        """``autocast_dtype`` as torch names it."""
        import torch

        dtype: torch.dtype | None = None if self.autocast_dtype is None else getattr(torch, str(self.autocast_dtype))
        return dtype
