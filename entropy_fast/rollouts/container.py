"""The `Rollouts` container: N sampled sequences in B prompt groups.

Sequences are stored flat, one row each, so that ragged groups (a different number of responses per prompt) need no padding
rows. Everything later stages need about grouping is derived here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import RolloutsError
from entropy_fast.rollouts import validation
from entropy_fast.rollouts.padded import unpack_padded_batch

__all__ = ["EmptyResponseReport", "Rollouts"]


@dataclasses.dataclass(frozen=True)
class EmptyResponseReport:
    """What was left out because it had no response tokens.

    Attributes:
        sequences: row indices (into the original rollouts) of sequences whose loss mask is zero everywhere.
        groups: group ids that had no sequence left and were dropped with them.
    """

    sequences: tuple[int, ...]
    groups: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Rollouts:
    """N sampled sequences of B prompts, with what a policy-gradient update would do with them.

    Whatever is given is copied on the way in: what its owner does to it later does not change the rollouts.

    Args:
        input_ids: [N, T] integer token ids, prompt and response together; padding on either side.
        attention_mask: [N, T] 0/1, 1 at real tokens.
        loss_mask: [N, T] 0/1, 1 at response tokens (the tokens the policy is scored on). Must lie inside
            ``attention_mask``, and never on the first real token of a row, which nothing predicts. A row of zeros is
            allowed here; the probe leaves it out, counts it and reports it.
        group_ids: [N] integers; rows with the same id answer the same prompt: they begin with the same tokens, up to the
            earliest response token of the group. Groups may be ragged and interleaved.
        advantages: [N] advantage of each response, 0 or between 1e-37 and 1e38 in size. Omit it to have it made from
            ``rewards``. Given by token, [N, T], it is kept as the largest |advantage| of each response times
            ``token_weights``.
        rewards: [N] reward of each response. Without ``advantages`` the advantage is the reward minus its group's mean
            (not divided by the standard deviation).
        max_lengths: generation budget L_max in tokens, one number or [B] (prompts in order of first appearance). Omitted,
            the longest sampled response of each prompt stands in and the result says so: that choice makes the estimate
            slightly biased because the length weight then depends on the samples.
        old_logprobs: [N, T] log-probs in nats at temperature 1 under the policy that sampled (or whatever policy importance
            ratios refer to): in column t that of the token in column t. Read at response tokens alone. Of the probed
            temperature, where the policy has another one (`EstimateOptions.policy_temperature`).
        ref_logprobs: [N, T] likewise those of a reference policy, which a KL term refers to.
        token_weights: [N, T] what the update's coefficient of every response token is multiplied by: corrections for the engine
            that sampled, or shares of an advantage by token.
        temperature, top_p, top_k, min_p: how the responses were sampled; None means unknown. They are recorded, never used for
            scoring. Of ``top_k`` 0 and -1, which samplers take for "off", are kept as None, and None of ``top_k`` and ``min_p``
            counts as off: most samplers have neither.
        prompts: B prompt texts, for reports only.
        responses: N response texts, for reports only.

    Raises:
        RolloutsError: a field has the wrong shape, dtype or values; the message names field, finding and fix.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    group_ids: Tensor
    advantages: Tensor | None = None
    rewards: Tensor | None = None
    max_lengths: Tensor | int | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    token_weights: Tensor | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    prompts: Sequence[str] | None = None
    responses: Sequence[str] | None = None

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        put("input_ids", validation.token_matrix("input_ids", self.input_ids))
        shape = self.input_ids.shape
        put("attention_mask", validation.mask_matrix("attention_mask", self.attention_mask, shape))
        put("loss_mask", validation.mask_matrix("loss_mask", self.loss_mask, shape))
        validation.check_masks(self.attention_mask, self.loss_mask)
        put("group_ids", validation.integer_vector("group_ids", self.group_ids, shape[0], "one id per sequence"))
        if self.token_weights is not None:
            put("token_weights", validation.token_numbers("token_weights", self.token_weights, self.loss_mask))
        if self.advantages is not None and getattr(self.advantages, "shape", None) == shape:
            largest, shares = validation.by_token("advantages", self.advantages, self.loss_mask)
            put("advantages", largest)
            put(
                "token_weights", shares if self.token_weights is None else shares * self.token_weights.to(shares.device)
            )
        for field in ("advantages", "rewards"):
            if getattr(self, field) is not None:
                put(field, validation.float_vector(field, getattr(self, field), shape[0], "one number per sequence"))
        if self.rewards is not None:
            validation.check_magnitudes("rewards", self.rewards, self.group_ids)
        advantages_given = self.advantages is not None
        if self.advantages is None:
            if self.rewards is None:
                raise RolloutsError(
                    "Rollouts: neither `advantages` nor `rewards` was given.",
                    fix="pass advantages [N], or rewards [N] from which group-centred advantages are made.",
                )
            put("advantages", self._centre_by_group(self.rewards))
        made_from = "" if advantages_given else "rewards"
        smallest = validation.SMALLEST_ADVANTAGE
        assert self.advantages is not None
        validation.check_magnitudes(
            "advantages", self.advantages, self.group_ids, smallest=smallest, made_from=made_from
        )
        if self.max_lengths is not None:
            put("max_lengths", validation.max_lengths(self.max_lengths, self._longest_response(), self.group_order))
        for field in ("old_logprobs", "ref_logprobs"):
            if getattr(self, field) is not None:
                put(field, validation.token_logprobs(field, getattr(self, field), self.loss_mask))
        put("temperature", validation.temperature(self.temperature))
        put("top_p", validation.top_p(self.top_p))
        put("top_k", validation.top_k(self.top_k))
        put("min_p", validation.min_p(self.min_p))
        for field, count, unit in (("prompts", self.n_prompts, "prompt"), ("responses", shape[0], "sequence")):
            if getattr(self, field) is not None:
                put(field, validation.texts(field, getattr(self, field), count, unit))
        self._check_shared_prompts()

    @classmethod
    def from_dict(cls, batch: Mapping[str, Any]) -> Rollouts:
        """Rollouts from the padded form that probe scripts keep.

        Args:
            batch: ``sequences`` [B, G, T] token ids, ``attention_masks`` [B, G, T], ``prompt_lens`` [B] (the *column* at
                which responses start, that is the padded prompt width, not the number of prompt tokens), ``advantages``
                [B, G] (or [B, G, T]) or ``rewards`` [B, G]; optional ``max_lengths`` [B], ``old_logprobs``,
                ``ref_logprobs`` and ``token_weights`` [B, G, T], ``temperature``, ``top_p``, ``top_k``, ``min_p``,
                ``prompts`` (B texts) and ``responses`` (B·G texts, prompt by prompt).

        Raises:
            RolloutsError: a key is missing or unknown, or a field does not fit.
        """
        return cls(**unpack_padded_batch(batch))

    @property
    def n_sequences(self) -> int:
        """N, the number of sequences."""
        return int(self.input_ids.shape[0])

    @property
    def n_prompts(self) -> int:
        """B, the number of prompt groups."""
        return len(self.group_order)

    @cached_property
    def group_order(self) -> tuple[int, ...]:
        """Group ids in order of first appearance; position in this tuple is a prompt's index."""
        return tuple(dict.fromkeys(self.group_ids.tolist()))

    @cached_property
    def prompt_index(self) -> Tensor:
        """[N] int64 (on the CPU): the prompt index 0..B-1 of every sequence."""
        position = {group: index for index, group in enumerate(self.group_order)}
        with torch.inference_mode(False):  # cached: later passes index with it under autograd
            return torch.tensor([position[group] for group in self.group_ids.tolist()], dtype=torch.int64)

    @cached_property
    def response_lengths(self) -> Tensor:
        """[N] int64 (on the CPU): L_i, the number of response tokens of every sequence."""
        with torch.inference_mode(False):  # cached: later passes multiply by it under autograd
            return self.loss_mask.sum(-1).cpu()

    @property
    def max_lengths_given(self) -> bool:
        """Whether L_max is data (a generation budget) rather than the longest sampled response."""
        return self.max_lengths is not None

    @property
    def length_budgets(self) -> Tensor:
        """[B] int64 (on the CPU): L_max of every prompt, given or the longest sampled response."""
        if self.max_lengths is None:
            return self._longest_response()
        assert isinstance(self.max_lengths, Tensor)
        return self.max_lengths.cpu()

    @property
    def truncated_by(self) -> tuple[str, ...]:
        """What is known to have cut the policy that sampled, in words: "top-p 0.9", "top-k 50", "min-p 0.1"."""
        found = []
        if self.top_p not in (None, 1.0):
            found.append(f"top-p {self.top_p}")
        if self.top_k is not None:
            found.append(f"top-k {self.top_k}")
        if self.min_p not in (None, 0.0):
            found.append(f"min-p {self.min_p}")
        return tuple(found)

    def rows_of_prompt(self, prompt: int) -> Tensor:
        """[G] int64: the rows that answer prompt ``prompt`` (an index 0..B-1)."""
        return (self.prompt_index == prompt).nonzero().squeeze(-1)

    def select_rows(self, rows: Tensor) -> Rollouts:
        """The rollouts of the given rows (indices or boolean mask); advantages and a given L_max stay as they were."""
        rows = rows.nonzero().squeeze(-1) if rows.dtype == torch.bool else rows
        index = self.prompt_index[rows.cpu()].tolist()
        kept = list(dict.fromkeys(index))

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows.to(tensor.device)]

        return dataclasses.replace(
            self,
            input_ids=self.input_ids[rows.to(self.input_ids.device)],
            attention_mask=self.attention_mask[rows.to(self.attention_mask.device)],
            loss_mask=self.loss_mask[rows.to(self.loss_mask.device)],
            group_ids=self.group_ids[rows.to(self.group_ids.device)],
            advantages=pick(self.advantages),
            rewards=pick(self.rewards),
            old_logprobs=pick(self.old_logprobs),
            ref_logprobs=pick(self.ref_logprobs),
            token_weights=pick(self.token_weights),
            max_lengths=self.length_budgets[kept] if self.max_lengths_given else None,
            prompts=None if self.prompts is None else [self.prompts[k] for k in kept],
            responses=None if self.responses is None else [self.responses[r] for r in rows.tolist()],
        )

    def of_response_tokens(self, field: str, rows: Tensor) -> Tensor | None:
        """[M] a field [N, T] at the response tokens of the given rows, row by row; fp64 on the CPU. None where it is."""
        table: Tensor | None = getattr(self, field)
        if table is None:
            return None
        values, mask = (t[rows.to(t.device)].cpu() for t in (table, self.loss_mask))
        return values[mask == 1].to(torch.float64)

    def without_empty_responses(self) -> tuple[Rollouts, EmptyResponseReport]:
        """Leave out sequences with no response token, as if they had never been in the batch.

        Groups shrink; advantages are not re-centred.

        Raises:
            RolloutsError: nothing is left.
        """
        empty = self.response_lengths == 0
        if not bool(empty.any()):
            return self, EmptyResponseReport((), ())
        if bool(empty.all()):
            raise RolloutsError(
                f"Rollouts: all {self.n_sequences} sequences have an empty response region (loss_mask is 0 everywhere, or "
                "the responses have length 0).",
                fix="set loss_mask to 1 at response tokens; for the padded form check that `prompt_lens` is the column "
                "at which responses start.",
            )
        kept = self.select_rows((~empty).nonzero().squeeze(-1))
        remaining = set(kept.group_order)
        dropped = tuple(group for group in self.group_order if group not in remaining)
        return kept, EmptyResponseReport(tuple(empty.nonzero().squeeze(-1).tolist()), dropped)

    def without_groups(self, group_ids: Collection[int]) -> Rollouts:
        """The rollouts without the groups of these ids (of prompts with one response, say); advantages stay as they were.

        Raises:
            RolloutsError: there is no group of such an id, or nothing is left.
        """
        left_out = set(group_ids)
        unknown = sorted(left_out.difference(self.group_order))
        if unknown or left_out.issuperset(self.group_order):
            found = f"there is no group {unknown[0]}" if unknown else "all groups are to be left out"
            raise RolloutsError(
                f"Rollouts.without_groups: {found}.", fix="name groups of these rollouts, not all of them."
            )
        keep = [row for row, group in enumerate(self.group_ids.tolist()) if group not in left_out]
        return self.select_rows(torch.tensor(keep))

    def notes(self) -> tuple[str, ...]:
        """What is allowed but should be known, one sentence each; for whoever shows a result."""
        notes = []
        if self._advantages_of_one_sign():
            notes.append(
                "The advantages of every prompt are of one sign, as raw rewards are: a group-relative update centres them "
                "within the prompt first. Pass raw rewards as `rewards`."
            )
        uneven = [self.group_order[prompt] for prompt in self._check_shared_prompts()]
        if uneven:
            shown = ", ".join(map(str, uneven[:5])) + (", ..." if len(uneven) > 5 else "")
            notes.append(
                f"In {len(uneven)} groups ({shown}) the loss mask begins at different tokens; what all rows of the group begin "
                "with was taken for the prompt."
            )
        return tuple(notes)

    def _check_shared_prompts(self) -> tuple[int, ...]:
        return validation.check_shared_prompts(self.input_ids, self.attention_mask, self.loss_mask, self.prompt_index)

    def _advantages_of_one_sign(self) -> bool:
        """Whether no group of two or more has advantages of both signs (or 0), and some has any."""
        assert self.advantages is not None
        if self.token_weights is not None and bool((self.token_weights < 0).any()):
            return False
        index = self.prompt_index
        above, below = (
            torch.zeros(self.n_prompts, dtype=torch.int64).index_add(0, index, found.cpu().long())
            for found in (self.advantages > 0, self.advantages < 0)
        )
        several = torch.bincount(index, minlength=self.n_prompts) > 1
        return bool((several & (above + below > 0)).any()) and not bool((several & (above > 0) & (below > 0)).any())

    def shares_all_sequences_with(self, other: Rollouts) -> bool:
        """Whether every sequence of one of the two batches (tokens and loss mask, padding aside) stands in the other."""
        mine, theirs = self._distinct_sequences(), other._distinct_sequences()
        return mine <= theirs or theirs <= mine

    def _distinct_sequences(self) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        found = set()
        for ids, attention, loss in zip(self.input_ids, self.attention_mask, self.loss_mask, strict=True):
            real = attention == 1
            found.add((tuple(ids[real].tolist()), tuple(loss[real].tolist())))
        return found

    def for_autograd(self) -> Rollouts:
        """The same rollouts with every inference-mode tensor cloned (a no-op when there is none)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        stale: dict[str, Any] = {k: v.clone() for k, v in fields.items() if isinstance(v, Tensor) and v.is_inference()}
        return dataclasses.replace(self, **stale) if stale else self

    def _longest_response(self) -> Tensor:
        longest = torch.zeros(self.n_prompts, dtype=torch.int64)
        return longest.scatter_reduce(0, self.prompt_index, self.response_lengths, "amax")

    def _centre_by_group(self, rewards: Tensor) -> Tensor:
        # In fp64: sums of large fp32 rewards would overflow.
        index, wide = self.prompt_index.to(rewards.device), rewards.double()
        total = wide.new_zeros(self.n_prompts).index_add(0, index, wide)
        size = wide.new_zeros(self.n_prompts).index_add(0, index, torch.ones_like(wide))
        return (wide - (total / size)[index]).to(rewards.dtype)
