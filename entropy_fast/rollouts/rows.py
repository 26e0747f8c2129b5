"""Between the rows of a rollouts file and `Rollouts`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from entropy_fast.errors import MissingTokenizerError, RolloutsError
from entropy_fast.rollouts.container import Rollouts
from entropy_fast.rollouts.fields import (
    LARGEST_ARRAY_BYTES,
    SAMPLING_FIELDS,
    TOKEN_FIELDS,
    Floats,
    Integers,
    RowSource,
    check_keys,
    convert,
)
from entropy_fast.rollouts.tokenizing import LONE_SURROGATE, prompt_token_ids, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RolloutsTable", "rollouts_from_rows", "table_from_rollouts"]


@dataclasses.dataclass(frozen=True)
class RolloutsTable:
    """Rollouts column by column, padding stripped, ready to be written.

    Attributes:
        offsets: [N + 1] int64; the tokens of row i are ``offsets[i]:offsets[i + 1]`` of the two arrays below.
        input_ids: [total tokens] int64.
        loss_mask: [total tokens] int64, 0 or 1.
        scalars: the other columns by key, N values each, only those the rollouts have.
        by_token: by key [total response tokens] float64, row by row, of those that the rollouts have.
        response_offsets: [N + 1] int64; those of row i are ``response_offsets[i]:response_offsets[i + 1]``.
    """

    offsets: Integers
    input_ids: Integers
    loss_mask: Integers
    scalars: Mapping[str, Sequence[int | float | str]]
    by_token: Mapping[str, Floats]
    response_offsets: Integers


def table_from_rollouts(rollouts: Rollouts) -> RolloutsTable:
    """The columns of a rollouts file. Floats become float64, which holds every float32 exactly."""
    attended = rollouts.attention_mask.bool().cpu()
    offsets = np.zeros(rollouts.n_sequences + 1, dtype=np.int64)
    np.cumsum(attended.sum(-1).numpy(), out=offsets[1:])
    response_offsets = np.zeros_like(offsets)
    np.cumsum(rollouts.response_lengths.numpy(), out=response_offsets[1:])
    everything = torch.arange(rollouts.n_sequences)
    by_token = {
        key: values.numpy()
        for key in TOKEN_FIELDS
        if (values := rollouts.of_response_tokens(key, everything)) is not None
    }
    prompt_index = rollouts.prompt_index.tolist()
    assert rollouts.advantages is not None
    scalars: dict[str, Sequence[int | float | str]] = {
        "group_id": rollouts.group_ids.tolist(),
        "advantage": rollouts.advantages.double().tolist(),
    }
    if rollouts.rewards is not None:
        scalars["reward"] = rollouts.rewards.double().tolist()
    if rollouts.max_lengths_given:
        budgets = rollouts.length_budgets.tolist()
        scalars["max_length"] = [budgets[prompt] for prompt in prompt_index]
    for key in SAMPLING_FIELDS:
        number: float | int | None = getattr(rollouts, key)
        if number is not None:
            scalars[key] = [number] * rollouts.n_sequences
    if rollouts.prompts is not None:
        scalars["prompt"] = [rollouts.prompts[prompt] for prompt in prompt_index]
    if rollouts.responses is not None:
        scalars["response"] = list(rollouts.responses)
    return RolloutsTable(
        offsets,
        rollouts.input_ids.cpu()[attended].numpy(),
        rollouts.loss_mask.cpu()[attended].numpy(),
        scalars,
        by_token,
        response_offsets,
    )


def rollouts_from_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]], source: RowSource, tokenizer: PreTrainedTokenizerBase | None
) -> Rollouts:
    """Rollouts from (position, row) pairs; a row maps keys to plain values, or to integer arrays for token lists.

    Raises:
        RolloutsFileError: a row is bad, rows do not fit together, or there is none.
    """
    return _Columns(rows, source).rollouts(tokenizer)


class _Columns:
    """All rows, each value checked by itself; `rollouts` checks what must hold between values."""

    def __init__(self, rows: Iterable[tuple[int, Mapping[str, Any]]], source: RowSource) -> None:
        self.source = source
        self.positions: list[int] = []
        self.values: dict[str, list[Any]] = {}
        self.form: tuple[str, str] = ("", "")
        for position, row in rows:
            if not self.positions:
                self.form = check_keys(row.keys(), source, position)
                self.values = {key: [] for key in row}
            elif row.keys() != self.values.keys():
                check_keys(row.keys(), source, position)
                self._fail_keys(row, position)
            self.positions.append(position)
            for key, value in row.items():
                self.values[key].append(convert(key, value, source, position))
        if not self.positions:
            source.fail_file("the file holds no rollouts.", fix="write one response per row; was the writer cut off?")

    def rollouts(self, tokenizer: PreTrainedTokenizerBase | None) -> Rollouts:
        tokens, masks = self._tokens(tokenizer)
        groups = self._groups()
        max_lengths = self._per_group("max_length", groups)
        if max_lengths is not None:
            self._check_budgets(masks)
        self._check_size(tokens)
        ids, attention_mask, loss_mask = _rectangle(tokens, masks)
        fields: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "loss_mask": loss_mask,
            "group_ids": torch.tensor(groups, dtype=torch.int64),
            **{key: self._by_token(key, loss_mask) for key in TOKEN_FIELDS},
            "max_lengths": None if max_lengths is None else torch.tensor(max_lengths, dtype=torch.int64),
            **{key: self._constant(key) for key in SAMPLING_FIELDS},
            "prompts": self._per_group("prompt", groups),
            "responses": self.values.get("response"),
        }
        for field, key in (("advantages", "advantage"), ("rewards", "reward")):
            if key in self.values:
                fields[field] = torch.tensor(self.values[key], dtype=torch.float64)
        try:
            return Rollouts(**fields)
        except RolloutsError as error:
            # Rows and prompts in the container's message are its own: counted from 0, blank lines left out.
            counted = "rows in this message are counted from 0, in file order"
            self.source.fail_file(f"{error.problem} ({counted})", fix=error.fix, cause=error)

    def _tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[Integers], list[Integers]]:
        """Token ids and loss mask of every row, [tokens] each."""
        first, second = (self.values[key] for key in self.form)
        if self.form == ("input_ids", "loss_mask"):
            tokens, masks = first, second
            for row, (ids, mask) in enumerate(zip(tokens, masks, strict=True)):
                if len(ids) != len(mask):
                    self._fail(
                        row, f"`input_ids` has {len(ids)} entries and `loss_mask` {len(mask)}.",
                        fix="write one 0 or 1 per token, over prompt and response.",
                    )  # fmt: skip
        else:
            if self.form == ("prompt", "response"):
                first, second = self._tokenise(tokenizer)
            pairs = list(zip(first, second, strict=True))
            self._check_same_prompts(first)
            tokens = [np.concatenate(pair) for pair in pairs]
            masks = [np.repeat(np.array([0, 1]), [len(prompt), len(response)]) for prompt, response in pairs]
        for row, mask in enumerate(masks):
            if not mask.size:
                self._fail(row, "there is no token at all.", fix="leave the row out.")
            if mask[0]:
                self._fail(
                    row, "the first token is a response token (no prompt token comes before it); no token predicts it.",
                    fix="start the prompt with at least one token, such as the BOS token.",
                )  # fmt: skip
        return tokens, masks

    def _check_size(self, tokens: list[Integers]) -> None:
        longest = max(range(len(tokens)), key=lambda row: len(tokens[row]))
        size = 8 * len(tokens) * len(tokens[longest])
        if size > LARGEST_ARRAY_BYTES:
            self._fail(
                longest, f"it has {len(tokens[longest])} tokens; {len(tokens)} rows padded to that length ask for "
                f"{size / 2**30:.1f} GiB an array, at most {LARGEST_ARRAY_BYTES / 2**30:.0f} GiB are made.",
                fix="put the longest rows into a file of their own, or split the file.",
            )  # fmt: skip

    def _by_token(self, key: str, loss_mask: torch.Tensor) -> torch.Tensor | None:
        """[N, T] in the columns of the response tokens."""
        if key not in self.values:
            return None
        given: list[Floats] = self.values[key]
        for row, (values, count) in enumerate(zip(given, loss_mask.sum(1).tolist(), strict=True)):
            if len(values) != count:
                self._fail(
                    row, f"`{key}` has {len(values)} entries, and the response has {count} tokens.",
                    fix="write one number per response token, none for the prompt.",
                )  # fmt: skip
        table = torch.zeros(loss_mask.shape, dtype=torch.float64)
        table[loss_mask == 1] = torch.from_numpy(np.concatenate(given))
        return table

    def _tokenise(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[list[Integers], list[Integers]]:
        if tokenizer is None:
            self.source.fail(
                self.positions[0],
                "tokens are given as texts (`prompt` + `response`), and no tokenizer was passed.",
                fix="pass read_rollouts(..., tokenizer=...), or write token ids, which are what the sampler produced.",
                kind=MissingTokenizerError,
            )
        for key in self.form:
            for row, text in enumerate(self.values[key]):
                if LONE_SURROGATE.search(text):
                    self._fail(
                        row, f"`{key}` cannot be tokenised: it holds half of a surrogate pair, which is no character.",
                        fix="write the text as UTF-8.",
                    )  # fmt: skip
        texts, answers = self.values["prompt"], self.values["response"]
        # Every prompt comes once per response: tokenise the distinct ones.
        distinct = list(dict.fromkeys(texts))
        encoded = dict(zip(distinct, map(_int64, prompt_token_ids(tokenizer, distinct)), strict=True))
        prompts = [encoded[text] for text in texts]
        responses = [_int64(ids) for ids in token_ids(tokenizer, answers)]
        knows_no_answer = any(map(str.strip, answers)) and not any(ids.size for ids in responses)
        for row, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
            if text.strip() and (knows_no_answer or not ids.size):
                self._fail(
                    row, "the tokenizer makes no token of a text that is not empty (its vocabulary has "
                    f"{len(tokenizer)} entries).",
                    fix="pass the tokenizer of the model that sampled; a folder without tokenizer files gives an empty one.",
                )  # fmt: skip
        return prompts, responses

    def _groups(self) -> list[int]:
        """[N] integer group ids; names become 0, 1, ... in order of appearance."""
        given = self.values["group_id"]
        for row, group in enumerate(given):
            if type(group) is not type(given[0]):
                self._fail(
                    row, f"`group_id` is {group!r}, but in {self.source.unit} {self.positions[0]} it is {given[0]!r}.",
                    fix="use integers in every row or strings in every row.",
                )  # fmt: skip
        if type(given[0]) is int:
            return given
        number = {name: index for index, name in enumerate(dict.fromkeys(given))}
        return [number[name] for name in given]

    def _check_same_prompts(self, prompts: Sequence[Integers]) -> None:
        """Where a row says which tokens are its prompt, those of a group must be the same."""
        first: dict[int | str, int] = {}
        for row, (group, prompt) in enumerate(zip(self.values["group_id"], prompts, strict=True)):
            other = first.setdefault(group, row)
            if not np.array_equal(prompt, prompts[other]):
                self._fail(
                    row, f"its prompt has other tokens than that of {self.source.unit} {self.positions[other]}, which has "
                    f"the same `group_id` ({group!r}).",
                    fix="give every prompt its own id; what a response is forced to begin with goes into `input_ids` under a "
                    "`loss_mask` of 0.",
                )  # fmt: skip

    def _per_group(self, key: str, groups: list[int]) -> list[Any] | None:
        """One value per group, in order of first appearance."""
        if key not in self.values:
            return None
        first: dict[int, int] = {}
        for row, (group, value) in enumerate(zip(groups, self.values[key], strict=True)):
            other = first.setdefault(group, row)
            if value != self.values[key][other]:
                self._fail(
                    row, f"`{key}` differs from the one in {self.source.unit} {self.positions[other]}, which has the "
                    f"same `group_id` ({self.values['group_id'][row]!r}).",
                    fix=f"rows of one group answer one prompt and share its `{key}`; give other prompts another id.",
                )  # fmt: skip
        return [self.values[key][row] for row in first.values()]

    def _constant(self, key: str) -> float | int | None:
        values: list[float | int] | None = self.values.get(key)
        if values is None:
            return None
        for row, value in enumerate(values):
            if value != values[0]:
                self._fail(
                    row, f"`{key}` is {value!r}, but in {self.source.unit} {self.positions[0]} it is {values[0]!r}; "
                    "Rollouts hold one number for all rows.",
                    fix="put rows that were sampled differently into separate files.",
                )  # fmt: skip
        return values[0]

    def _check_budgets(self, masks: list[Integers]) -> None:
        for row, (budget, mask) in enumerate(zip(self.values["max_length"], masks, strict=True)):
            if mask.sum() > budget:
                self._fail(
                    row, f"`max_length` is {budget}, but the response has {int(mask.sum())} tokens.",
                    fix="write the generation budget (max new tokens), which no response can exceed.",
                )  # fmt: skip

    def _fail_keys(self, row: Mapping[str, Any], position: int) -> NoReturn:
        lacking = [key for key in self.values if key not in row]
        verb, keys = ("misses", lacking) if lacking else ("has", [key for key in row if key not in self.values])
        other = "has" if lacking else "has not"
        self.source.fail(
            position,
            f"it {verb} {', '.join(f'`{key}`' for key in keys)}, which {self.source.unit} {self.positions[0]} {other}.",
            fix="give every row the same keys.",
        )

    def _fail(self, row: int, problem: str, *, fix: str) -> NoReturn:
        self.source.fail(self.positions[row], problem, fix=fix)


def _int64(ids: Sequence[int]) -> Integers:
    return np.array(ids, dtype=np.int64)


def _rectangle(tokens: list[Integers], masks: list[Integers]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and loss_mask, [N, T] int64 each, rows padded on the right with zeros."""
    lengths = np.array([len(ids) for ids in tokens])
    attended: npt.NDArray[np.bool_] = np.arange(lengths.max()) < lengths[:, None]
    filled = []
    for flat in (np.concatenate(tokens), np.concatenate(masks)):
        matrix = np.zeros(attended.shape, dtype=np.int64)
        matrix[attended] = flat
        filled.append(torch.from_numpy(matrix))
    return filled[0], torch.from_numpy(attended.astype(np.int64)), filled[1]
