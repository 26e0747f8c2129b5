"""Everything the one-pass engine has to be exact for, by name, and the models and batches that go with the names."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import bitsandbytes
import pytest
import torch
from probe_models.architectures import (
    BUILDERS,
    VOCABULARY,
    add_lora,
    build_model,
    disable_checkpointing,
    enable_checkpointing,
    quantize_nf4,
)
from probe_models.batches import PAD, Sample, make_samples, pack
from torch import nn

from entropy_fast import Rollouts

BUDGET = 24  # tokens a response may have

FAMILIES = tuple(BUILDERS)
ADAPTERS = ("lora", "nf4 lora", "full, tied")
CHECKPOINTING = ("plain", "checkpointing", "reentrant checkpointing")
IMPOSSIBLE = {("gpt2", "nf4 lora")}  # its maps are no nn.Linear, so it has no 4-bit form


def model_of(family: str, adapter: str) -> nn.Module:
    """A model in fp32; over an NF4 base it computes in fp32 too."""
    if adapter == "full, tied":
        return build_model(family, tied=True)
    base = build_model(family)
    return add_lora(quantize_nf4(base) if adapter == "nf4 lora" else base)


def widened(model: nn.Module) -> nn.Module:
    """A copy in fp64 with the very weights; 4-bit layers become linear maps with the numbers that the 4 bits stand for."""
    wide = copy.deepcopy(model)
    for path, layer in list(wide.named_modules()):
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        parent, _, name = path.rpartition(".")
        setattr(wide.get_submodule(parent), name, plain)
    return wide.double()


@contextlib.contextmanager
def checkpointed(model: nn.Module, how: str) -> Iterator[None]:
    """One of `CHECKPOINTING`, switched off again at the end."""
    if how == "plain":
        yield
        return
    enable_checkpointing(model, reentrant=how.startswith("reentrant"))
    try:
        yield
    finally:
        disable_checkpointing(model)


def _ragged(seed: int) -> list[Sample]:
    return make_samples((2, 3, 2, 2), seed=seed)


def _uneven_groups(seed: int) -> list[Sample]:
    return make_samples((2, 7, 2, 4), seed=seed)


def _same_prompt_twice(seed: int) -> list[Sample]:
    """Two groups with the same text, which are two prompts all the same."""
    samples = make_samples((3, 2, 2, 2), seed=seed)
    first = next(s.prompt for s in samples if s.group == 10)
    return [dataclasses.replace(s, prompt=first) if s.group == 12 else s for s in samples]


def _uneven_lengths(seed: int) -> list[Sample]:
    """Prompts of 1 to 19 tokens; beside responses of one token such as fill the budget, one with the padding token inside."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist())

    samples = []
    for group, (prompt_length, lengths) in enumerate(((1, (1, BUDGET)), (19, (2, 1, 17)), (3, (1, 1)), (8, (5, 11)))):
        prompt = draw(prompt_length)
        samples += [
            Sample(group, prompt, draw(length), float(torch.randn((), generator=generator))) for length in lengths
        ]
    longest = samples[1].response
    samples[1] = dataclasses.replace(samples[1], response=(*longest[:3], PAD, *longest[4:]))
    return samples


BATCHES: dict[str, Callable[[int], list[Sample]]] = {
    "left-padded": _ragged,
    "uneven groups": _uneven_groups,
    "same prompt twice": _same_prompt_twice,
    "uneven lengths": _uneven_lengths,
}


def batch_of(kind: str, seed: int = 5) -> Rollouts:
    """Four prompts of one of `BATCHES`."""
    samples = BATCHES[kind](seed)
    return padded(samples, 5, 3) if kind == "left-padded" else pack(samples, max_lengths=BUDGET)


def batch_of_every_kind(seed: int) -> Rollouts:
    """Sixteen prompts, four of each kind in turn: enough for a standard error that is not small by luck."""
    return pack(
        [
            dataclasses.replace(sample, group=100 * kind + sample.group)
            for kind, make in enumerate(BATCHES.values())
            for sample in make(seed)
        ],
        max_lengths=BUDGET,
    )


def padded(samples: list[Sample], left: int, right: int) -> Rollouts:
    """Rollouts with columns on both sides that no row needs, filled with a token that is no padding elsewhere."""
    plain = pack(samples, max_lengths=BUDGET)
    fields = {
        name: nn.functional.pad(getattr(plain, name), (left, right), value=fill)
        for name, fill in (("input_ids", 7), ("attention_mask", 0), ("loss_mask", 0))
    }
    return pack(samples, max_lengths=BUDGET, **fields)


def combinations(*dimensions: tuple[str, ...], paired: tuple[int, ...]) -> list[object]:
    """All combinations of names as pytest parameters; a few run by default, the rest are marked exhaustive.

    By default every name occurs, and in the ``paired`` dimensions every two names together: a fault in how two things go
    together shows without the whole matrix.
    """
    every = [names for names in itertools.product(*dimensions) if names[:2] not in IMPOSSIBLE]

    def parts(names: tuple[str, ...]) -> set[object]:
        pairs = itertools.combinations([names[index] for index in paired], 2)
        return {*enumerate(names), *pairs}

    wanted = set().union(*(parts(names) for names in every))
    chosen = set()
    while wanted:
        best = max(every, key=lambda names: len(parts(names) & wanted))
        chosen.add(best)
        wanted -= parts(best)
    return [pytest.param(*names, marks=[] if names in chosen else [pytest.mark.exhaustive]) for names in every]
