"""Packed layouts read back: what a layout says of a batch is decoded token by token and held against the unpadded sequences."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from entropy_fast import Rollouts
from entropy_fast.ways.packed.layout import PackedLayout, pack_microbatch, shared_length

PADDING = 1000  # ids from here on stand in masked places, each once, and never in a sequence


@dataclasses.dataclass
class Sequence:
    """One sequence without padding, and which of its tokens are scored."""

    tokens: list[int]
    scored: list[bool]


@dataclasses.dataclass
class Batch:
    """Sequences by group, and where padding goes in every row of the table: tokens keep these columns."""

    groups: list[list[Sequence]]
    columns: list[list[int]]
    width: int

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for group in self.groups for sequence in group]

    @property
    def prompt_of_row(self) -> list[int]:
        return [number for number, group in enumerate(self.groups) for _ in group]


TOKENS = st.integers(1, 3)  # few ids, so that sequences share more than they were given to share


@st.composite
def batches(draw: st.DrawFn, *, shared_prompts: bool) -> Batch:
    """Ragged groups; with ``shared_prompts`` rows have their group's tokens before the first scored one, as `Rollouts` asks."""
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(TOKENS, min_size=1, max_size=5))
        group = []
        for _ in range(draw(st.integers(1, 4))):
            own = prompt if shared_prompts else draw(st.just(prompt) | st.lists(TOKENS, min_size=1, max_size=5))
            response = draw(st.lists(TOKENS, min_size=1, max_size=6))
            flags = draw(st.lists(st.booleans(), min_size=len(response), max_size=len(response)))
            first = True if shared_prompts or not any(flags) else flags[0]
            group.append(Sequence([*own, *response], [False] * len(own) + [first, *flags[1:]]))
        groups.append(group)
    lengths = [len(sequence.tokens) for group in groups for sequence in group]
    width = max(lengths) + draw(st.integers(0, 4))
    columns = [
        sorted(draw(st.permutations(range(width)))[:length])
        if draw(st.booleans())
        else list(range(start := draw(st.integers(0, width - length)), start + length))
        for length in lengths
    ]
    return Batch(groups, columns, width)


def table_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and loss mask [N, T]."""
    shape = (len(batch.sequences), batch.width)
    ids = PADDING + torch.arange(shape[0] * shape[1]).view(shape)
    attention, loss = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, (sequence, columns) in enumerate(zip(batch.sequences, batch.columns, strict=True)):
        ids[row, columns] = torch.tensor(sequence.tokens)
        attention[row, columns] = 1
        loss[row, columns] = torch.tensor(sequence.scored).long()
    return ids, attention, loss


def rollouts_of(batch: Batch) -> Rollouts:
    ids, attention, loss = table_of(batch)
    group = torch.tensor(batch.prompt_of_row)
    return Rollouts(ids, attention, loss, group, advantages=torch.zeros(len(group)))


def unchecked(batch: Batch) -> Rollouts:
    """Only what packing reads, for groups whose rows differ before their first scored token."""
    ids, attention, loss = table_of(batch)
    return SimpleNamespace(  # type: ignore[return-value]
        input_ids=ids, attention_mask=attention, loss_mask=loss, prompt_index=torch.tensor(batch.prompt_of_row)
    )


def assert_describes(layout: PackedLayout, batch: Batch, prompts: list[int], *, share: bool) -> None:
    """The layout of whole ``prompts``, in that order, says what the unpadded sequences say."""
    groups = [batch.groups[prompt] for prompt in prompts]
    sequences = [sequence for group in groups for sequence in group]
    of_group = [number for number, group in enumerate(groups) for _ in group]
    prefix, tail = layout.prefix_ids[0].tolist(), layout.tail_ids[0].tolist()
    prefix_at, tail_at = layout.prefix_positions[0].tolist(), layout.tail_positions[0].tolist()
    assert len(layout.groups) == len(groups)
    tail_row = [-1] * len(tail)
    row = 0
    for number, (described, group) in enumerate(zip(layout.groups, groups, strict=True)):
        assert described.rows == (row, row + len(group))
        assert described.unit == 100 + prompts[number]
        assert described.tail_span == (described.tails[0][0], described.tails[-1][1])
        begin, end = described.prefix
        assert end - begin == (common_beginning(group) if share else 0)
        assert prefix_at[begin:end] == list(range(end - begin))
        for sequence, (first, last) in zip(group, described.tails, strict=True):
            inputs = sequence.tokens[: max(t for t, scored in enumerate(sequence.scored) if scored)]
            assert prefix[begin:end] + tail[first:last] == inputs
            assert tail_at[first:last] == list(range(end - begin, len(inputs)))
            assert all(token == -1 for token in tail_row[first:last])
            tail_row[first:last] = [row] * (last - first)
            row += 1
    # Every token stands in one place, and no other does.
    assert layout.tail_row.tolist() == tail_row and -1 not in tail_row
    assert sum(g.prefix[1] - g.prefix[0] for g in layout.groups) == len(prefix)
    assert max(prefix + tail, default=0) < PADDING
    found = []
    for source, target, row in zip(
        layout.source.tolist(), layout.targets.tolist(), layout.scored_row.tolist(), strict=True
    ):
        assert target == sequences[row].tokens[predecessor(layout, source, row, of_group) + 1]
        found.append((row, predecessor(layout, source, row, of_group) + 1))
    expected = [
        (row, t) for row, sequence in enumerate(sequences) for t, scored in enumerate(sequence.scored) if scored
    ]
    assert found == expected
    ends = [sum(sum(s.scored) for group in groups[: number + 1] for s in group) for number in range(len(groups))]
    assert list(layout.scored_ends) == ends
    values = torch.arange(1.0, 1 + len(expected), dtype=torch.float64).square()
    sums = [sum(float(v) for v, (own, _) in zip(values, expected, strict=True) if own == r) for r in range(row + 1)]
    assert layout.by_sequence(values).tolist() == sums


def predecessor(layout: PackedLayout, source: int, row: int, of_group: list[int]) -> int:
    """Position of the token whose hidden state is ``source``, which must be one of ``row``'s own."""
    n_tail = layout.tail_ids.shape[1]
    if source < n_tail:
        assert int(layout.tail_row[source]) == row
        return int(layout.tail_positions[0, source])
    assert source - n_tail == of_group[row]
    begin, end = layout.groups[source - n_tail].prefix
    assert end > begin
    return int(layout.prefix_positions[0, end - 1])


def common_beginning(group: list[Sequence]) -> int:
    """Tokens that all sequences begin with and none of which is scored."""
    length = 0
    while all(
        length < len(s.tokens) and not s.scored[length] and s.tokens[length] == group[0].tokens[length] for s in group
    ):
        length += 1
    return length


def pack_prompts(rollouts: Rollouts, batch: Batch, prompts: list[int], *, share: bool) -> PackedLayout:
    rows = [row for prompt in prompts for row, own in enumerate(batch.prompt_of_row) if own == prompt]
    unit = [100 + batch.prompt_of_row[row] for row in rows]
    return pack_microbatch(rollouts, torch.tensor(rows), unit, torch.device("cpu"), share=share)


@given(st.data(), st.booleans())
def test_a_layout_says_what_the_sequences_say(data: st.DataObject, share: bool) -> None:
    batch = data.draw(batches(shared_prompts=True))
    prompts = data.draw(st.permutations(range(len(batch.groups))))[: data.draw(st.integers(1, len(batch.groups)))]
    assert_describes(pack_prompts(rollouts_of(batch), batch, prompts, share=share), batch, prompts, share=share)


@given(st.data())
def test_prompts_that_are_shared_in_part_or_not_at_all(data: st.DataObject) -> None:
    """`Rollouts` has no such groups; a layout of them shares no more than is the same."""
    batch = data.draw(batches(shared_prompts=False))
    prompts = list(range(len(batch.groups)))
    assert_describes(pack_prompts(unchecked(batch), batch, prompts, share=True), batch, prompts, share=True)


def test_a_group_without_any_tail() -> None:
    """Responses of one token are predicted by the prompt alone, and add no token of their own."""
    group = [Sequence([7, 8, 9, answer], [False, False, False, True]) for answer in (1, 2, 1)]
    other = [Sequence([5, 6, 4], [False, True, True])]
    batch = Batch([group, other], [[0, 1, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3], [2, 3, 4]], 5)
    layout = pack_prompts(rollouts_of(batch), batch, [0, 1], share=True)
    assert_describes(layout, batch, [0, 1], share=True)
    assert layout.prefix_ids.tolist() == [[7, 8, 9, 5]]
    assert layout.tail_ids.tolist() == [[6]]
    assert layout.groups[0].tails == ((0, 0),) * 3
    assert layout.source.tolist() == [1, 1, 1, 2, 0]


def test_no_prefix_where_the_first_tokens_differ() -> None:
    tokens = [torch.tensor([1, 2, 3, 4]), torch.tensor([2, 2, 3, 4])]
    assert shared_length(tokens, [2, 2]) == 0
    assert shared_length([tokens[0], torch.tensor([1, 2, 9])], [3, 3]) == 2
    # Equal again after a difference is not a common beginning.
    assert shared_length([tokens[0], torch.tensor([1, 7, 3, 4])], [4, 4]) == 1
    assert shared_length([tokens[0]] * 3, [4, 2, 3]) == 2
