"""Every element of a trained parameter is kept by one rank, and rows of matrices by the rank that FSDP2 gives them to."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_fast.sharded.forms import Form, all_have_some, dealt_forms

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(torch.Size), min_size=1, max_size=6)


@given(SHAPES, st.integers(1, 7))
def test_pieces_make_up_the_whole(shapes: list[torch.Size], ranks: int) -> None:
    forms = dealt_forms([Form(str(place), shape, torch.float32, 0) for place, shape in enumerate(shapes)], ranks)
    for form in forms:
        whole = torch.arange(form.shape.numel()).view(form.shape)
        cut = [form.cut(whole, rank) for rank in range(ranks)]
        assert [own.shape for own in cut] == [form.piece(rank) for rank in range(ranks)]
        assert [own.numel() for own in cut] == [form.elements(rank) for rank in range(ranks)]
        assert torch.cat([own.reshape(-1) for own in cut]).tolist() == whole.reshape(-1).tolist()
        units = torch.stack([whole, whole + 100])
        for rank, own in enumerate(cut):
            found = form.cut_units(units, rank)
            assert found.shape[1:] == own.shape
            assert torch.equal(found, torch.stack([own, own + 100]))
        if form.divided:
            chunks = list(torch.chunk(whole, ranks))
            assert all(torch.equal(own, chunk) for own, chunk in zip(cut, chunks, strict=False))
            assert not any(own.numel() for own in cut[len(chunks) :])
        else:
            assert sum(bool(own.numel()) for own in cut) == 1


def test_whether_every_rank_has_something() -> None:
    vector = Form("vector", torch.Size([4]), torch.float32, 0)
    matrix = Form("matrix", torch.Size([3, 2]), torch.float32, 0)
    assert all_have_some(dealt_forms([vector], 1)) and not all_have_some(dealt_forms([vector], 2))
    assert all_have_some(dealt_forms([matrix], 3)) and not all_have_some(dealt_forms([matrix], 4))
    assert not all_have_some(dealt_forms([vector, matrix], 4))


def test_vectors_are_dealt_by_their_sizes() -> None:
    shapes = [torch.Size([n]) for n in (5, 4, 3, 2)]
    forms = dealt_forms([Form(str(n), shape, torch.float32, 0) for n, shape in enumerate(shapes)], 2)
    assert [[form.elements(rank) for rank in range(2)] for form in forms] == [[5, 0], [0, 4], [0, 3], [2, 0]]
