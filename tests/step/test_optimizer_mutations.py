"""Damaged optimizer files: a refusal of our own or the undamaged state, never a foreign exception and never another number."""

from __future__ import annotations

import copy
import functools
import io
import math
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from entropy_fast.checks.parameter_registry import ParameterRegistry
from entropy_fast.errors import EntropyFastError, LearningRateError, OptimizerStateError
from entropy_fast.step import AdamPreconditioner, AdamState, adam_state_from_file, optimizer_from_file
from entropy_fast.step.dry_run import DryRun

FORMS = ("numbers", "numbers and names", "names", "flat", "8-bit codes")
OTHERS = ("adafactor", "transformers' adafactor", "muon beside adamw")
MANY = (pytest.mark.exhaustive, pytest.mark.timeout(1500))
CASES = [pytest.param(300, id="some"), pytest.param(10_000, id="many", marks=MANY)]


@functools.cache
def healthy(form: str) -> tuple[nn.Module, dict[str, Any], bytes]:
    """A model, the state of its optimizer in one of the forms files have, and that as a file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    first, second = (list(layer.named_parameters(prefix=str(i))) for i, layer in enumerate(model))
    if form == "numbers":
        first, second = ([p for _, p in named] for named in (first, second))  # type: ignore[assignment]
    groups = [{"params": first}, {"params": second, "lr": 5e-4}]
    optimizers = _optimizers(form, groups, dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    if form in ("names", *OTHERS):
        content = get_optimizer_state_dict(model, optimizers)
    elif form == "flat":
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        content = get_optimizer_state_dict(model, optimizers, options=flat)
    else:
        content = optimizers[0].state_dict()
    return model, content, as_file(content)


def _optimizers(form: str, groups: list[Any], named: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    if form == "8-bit codes":
        return [pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, lr=1e-3, min_8bit_size=1)]
    if form == "adafactor":
        return [torch.optim.Adafactor(groups, lr=1e-3)]
    if form == "transformers' adafactor":
        from transformers import Adafactor

        return [Adafactor(groups, lr=1e-3, beta1=0.9, relative_step=False)]
    if form == "muon beside adamw":
        matrices = [(name, p) for name, p in named.items() if p.dim() == 2]
        return [torch.optim.Muon(matrices), torch.optim.AdamW([(name, p) for name, p in named.items() if p.dim() == 1])]
    return [torch.optim.AdamW(groups, lr=1e-3)]


def as_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def same(one: AdamState, two: AdamState) -> bool:
    return (
        (one.groups, one.group_of, one.notes) == (two.groups, two.group_of, two.notes)
        and one.moments.keys() == two.moments.keys()
        and all(
            one.moments[name].step == two.moments[name].step
            and torch.equal(one.moments[name].second_moment, two.moments[name].second_moment)
            for name in one.moments
        )
    )


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flipped bits, other bytes, a block lost, doubled, blanked or exchanged, an end cut off."""
    data = bytearray(content)
    start, length = draw.randrange(len(data)), draw.randint(1, 64)
    kind = draw.choice(["bit", "byte", "bytes", "lost", "doubled", "blank", "exchanged", "cut"])
    if kind == "bit":
        data[start] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[start] = draw.randrange(256)
    elif kind == "bytes":
        for _ in range(draw.randint(2, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif kind == "lost":
        del data[start : start + length]
    elif kind == "doubled":
        data[start:start] = data[start : start + length]
    elif kind == "blank":
        data[start : start + length] = bytes(len(data[start : start + length]))
    elif kind == "exchanged":
        other = draw.randrange(len(data) - length)
        start = min(start, len(data) - length)
        data[start : start + length], data[other : other + length] = (
            data[other : other + length],
            data[start : start + length],
        )
    else:
        del data[start:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", CASES)
def test_damaged_bytes_are_refused_or_change_nothing(tmp_path: Path, cases: int) -> None:
    path, draw, refused, expected = tmp_path / "optimizer.pt", random.Random(0), 0, dict[str, AdamState]()
    for case in range(cases):
        model, _, file = healthy(form := FORMS[case % len(FORMS)])
        if form not in expected:
            path.write_bytes(file)
            expected[form] = adam_state_from_file(path, model)
        path.write_bytes(changed_bytes(file, draw))
        try:
            found = adam_state_from_file(path, model)
        except OptimizerStateError:
            refused += 1
            continue
        assert same(found, expected[form]), f"case {case}"
    assert refused > cases / 2


def nested(depth: int) -> list[Any]:
    inside: list[Any] = []
    for _ in range(depth):
        inside = [inside]
    return inside


ODD_VALUES: tuple[Callable[[], Any], ...] = (
    *[
        functools.partial(copy.copy, value)
        for value in (None, True, False, 0, 1, -1, 2**63, 10**400, -(10**500), 5e-324)
    ],
    *[functools.partial(float, text) for text in ("nan", "inf", "-inf", "1.5", "-0.0", "1e308", "-1e-3", "1e300")],
    *[functools.partial(copy.copy, value) for value in ("", "params", "0", "\x1b[31mred", "x" * 5000, 1j, b"bytes")],
    *(list, dict, tuple, set, OrderedDict, functools.partial(nested, 100), functools.partial(torch.Size, (3, 4))),
    *[functools.partial(list, value) for value in ([0, 0], [None], [[1]], [{}], range(6), "abcd", [2**80])],
    lambda: {(1, 2): 3},
    lambda: {"exp_avg_sq": torch.ones(2), "step": 1},
    lambda: torch.tensor(math.nan),
    lambda: torch.tensor(10**15),
    lambda: torch.tensor(True),
    lambda: torch.tensor(1j),
    lambda: torch.zeros(0),
    lambda: torch.ones(4, 3),
    lambda: -torch.ones(4, 3),
    lambda: torch.full((4, 3), math.inf),
    lambda: torch.full((4, 3), 3e38),
    lambda: torch.ones(4, 3, dtype=torch.int8),
    lambda: torch.ones(4, 3, dtype=torch.float16),
    lambda: torch.ones(4, 3, dtype=torch.complex64),
    lambda: torch.ones(4, 3).to_sparse(),
    lambda: torch.ones(4, 3, device="meta"),
    lambda: torch.ones((), device="meta"),
    lambda: torch.ones(1).expand(4, 3),
    lambda: nn.Parameter(torch.ones(4, 3)),
)


def changed_structure(content: Any, draw: random.Random) -> Any:
    """One to three places of the tree with something else in them, gone, under another key, or taken from another place."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(containers(content))
        if not places:
            return content
        place = draw.choice(places)
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        kind = draw.choice(["odd", "odd", "odd", "gone", "renamed", "copied"])
        if kind == "odd":
            place[key] = draw.choice(ODD_VALUES)()
        elif kind == "gone":
            del place[key]
        elif kind == "renamed" and isinstance(place, dict):
            place[draw.choice([None, 7, -1, 1.0, True, "exp_avg_sq", "state2", "step", "\x1b]0;x\x07", (1,)])] = (
                place.pop(key)
            )
        else:
            other = draw.choice(places)
            place[key] = copy.deepcopy(draw.choice(list(other.values()) if isinstance(other, dict) else other))
    return content


def containers(node: Any, depth: int = 0) -> Any:
    if isinstance(node, (dict, list)) and node and depth < 5:
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from containers(child, depth + 1)


@pytest.mark.parametrize("cases", CASES)
def test_odd_content_is_refused_or_gives_numbers_that_can_be_used(tmp_path: Path, cases: int) -> None:
    path, draw, refused = tmp_path / "optimizer.pt", random.Random(1), 0
    for case in range(cases):
        model, content, _ = healthy(FORMS[case % len(FORMS)])
        path.write_bytes(as_file(changed_structure(content, draw)))
        try:
            state = adam_state_from_file(path, model)
            check_numbers(state)
            preconditioner = AdamPreconditioner(state, ParameterRegistry.build(model, state.group_of))
            ones = [torch.ones_like(p) for p in model.parameters()]
            assert all(bool(torch.isfinite(piece).all()) for piece in preconditioner.apply_preconditioner(ones)), case
            assert 0 <= preconditioner.excluded(ones).share <= 1
        except EntropyFastError as error:
            refusal = error
        else:
            continue
        refused += 1
        assert isinstance(refusal, (OptimizerStateError, LearningRateError)), f"case {case}: {refusal}"
        assert refusal.problem.isprintable(), f"case {case}: {refusal!r}"
        assert "not understood" not in refusal.problem, f"case {case}: {refusal}, from {refusal.__cause__!r}"
    assert cases / 4 < refused < cases  # both ways out are taken


@pytest.mark.parametrize("cases", [pytest.param(100, id="some"), pytest.param(5_000, id="many", marks=MANY)])
def test_odd_content_of_other_optimizers_is_refused_or_steps(tmp_path: Path, cases: int) -> None:
    path, draw, refused = tmp_path / "optimizer.pt", random.Random(2), 0
    for case in range(cases):
        model, content, _ = healthy(OTHERS[case % len(OTHERS)])
        path.write_bytes(as_file(changed_structure(content, draw)))
        try:
            found = optimizer_from_file(path, model)
            if found.live is not None:
                ones = [torch.ones_like(p) for p in model.parameters()]
                list(DryRun(found.live, list(model.parameters())).steps(ones))
            continue
        except EntropyFastError as error:
            refusal = error
        refused += 1
        assert isinstance(refusal, (OptimizerStateError, LearningRateError)), f"case {case}: {refusal}"
        assert refusal.problem.isprintable(), f"case {case}: {refusal!r}"
        assert "not understood" not in refusal.problem, f"case {case}: {refusal}, from {refusal.__cause__!r}"
    assert cases / 4 < refused < cases


def check_numbers(state: AdamState) -> None:
    for group in state.groups:
        assert 0 <= group.learning_rate < math.inf
        assert 0 <= group.beta2 < 1
        assert 0 <= group.eps < math.inf
    for moments in state.moments.values():
        assert 1 <= moments.step < math.inf
        assert bool((torch.isfinite(moments.second_moment) & (moments.second_moment >= 0)).all())


def rebuilt(file: bytes, change: Callable[[str, bytes], list[tuple[str, bytes]]], **options: Any) -> bytes:
    """The archive written again by another program, with sound checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as source, zipfile.ZipFile(buffer, "w", **options) as target:
        for name in source.namelist():
            for new_name, content in change(name, source.read(name)):
                target.writestr(new_name, content)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda name, content: [(name, content)], {"compression": zipfile.ZIP_DEFLATED}, "compressed or overlap"),
        (lambda name, content: [(name, content)] * (1 + name.endswith("data/1")), {}, "two records have one name"),
        (lambda name, content: [(name, content), (name.upper(), content)], {}, "two records have one name"),
    ],
)
def test_archives_that_two_readers_could_read_differently_are_refused(
    tmp_path: Path, change: Any, options: dict[str, Any], message: str
) -> None:
    model, _, file = healthy("numbers")
    (tmp_path / "optimizer.pt").write_bytes(rebuilt(file, change, **options))
    with pytest.raises(OptimizerStateError, match=message):
        adam_state_from_file(tmp_path / "optimizer.pt", model)
    (tmp_path / "optimizer.pt").write_bytes(rebuilt(file, lambda name, content: [(name, content)]))
    adam_state_from_file(tmp_path / "optimizer.pt", model)  # it was what is refused, and nothing else


def test_a_record_that_calls_itself_a_folder_is_refused(tmp_path: Path) -> None:
    """One bit of the archive's table, which no checksum covers: torch would leave the tensor as it found the memory."""
    model, _, file = healthy("numbers")
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        name = next(record.filename for record in archive.infolist() if record.filename.endswith("data/2")).encode()
    data = bytearray(file)
    data[file.rindex(name) - 46 + 38] |= 0x10  # the attributes, in the last of two places that name the record
    (tmp_path / "optimizer.pt").write_bytes(bytes(data))
    with pytest.raises(OptimizerStateError, match="a record calls itself a folder"):
        adam_state_from_file(tmp_path / "optimizer.pt", model)


@pytest.mark.parametrize("record", range(1, 6))
def test_one_flipped_bit_in_a_second_moment_is_seen_which_torch_does_not_see(tmp_path: Path, record: int) -> None:
    model, content, file = healthy("numbers")
    moment = content["state"][0]["exp_avg_sq"]
    position = file.index(moment.numpy().tobytes()) + 4 * record + 2
    data = bytearray(file)
    data[position] ^= 1
    path = tmp_path / "optimizer.pt"
    path.write_bytes(bytes(data))
    read = torch.load(path, weights_only=True)["state"][0]["exp_avg_sq"]
    assert bool(torch.isfinite(read).all())
    assert not torch.equal(read, moment)
    with pytest.raises(OptimizerStateError, match=r"checksum of record '.*/data/2' does not fit"):
        adam_state_from_file(path, model)


def test_a_file_without_checksums_is_told_why(tmp_path: Path) -> None:
    model, content, _ = healthy("numbers")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "optimizer.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(OptimizerStateError, match=r"set_crc32_options\(False\)"):
        adam_state_from_file(tmp_path / "optimizer.pt", model)


@pytest.mark.timeout(30)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match="it is a pipe or a device"):
        adam_state_from_file(tmp_path / "optimizer.pt", nn.Linear(1, 1))
