"""Several processes that share a vocabulary; started by tests/ops/test_sliced_linear_token_logprobs.py.

Usage: python sliced_ranks.py WORLD_SIZE FOLDER CHECK...

Libraries are imported once: the ranks are forked from the process that imported them.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from linear_cases import LinearCase, assert_right, certain_case, make_linear_case
from logprob_cases import IGNORE
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from entropy_fast import ops
from entropy_fast.errors import EntropyFastError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cut(vocabulary: int) -> range:
    """This rank's rows, as a DTensor is split."""
    size = -(-vocabulary // dist.get_world_size())
    first = min(dist.get_rank() * size, vocabulary)
    return range(first, min(first + size, vocabulary))


def slice_of(case: LinearCase, rows: range | None = None) -> ops.VocabularySlice:
    own = cut(len(case.weight)) if rows is None else rows
    bias = None if case.bias is None else case.bias[own.start : own.stop]
    return ops.VocabularySlice(case.weight[own.start : own.stop], own.start, len(case.weight), bias)


def options_of(case: LinearCase) -> dict[str, Any]:
    return {"softcap": case.softcap, "want_entropy": True, "ignore_index": IGNORE}


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest of what is expected."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    scale = float(expected.detach().double().abs().max())
    return float((found.detach().double() - expected.detach().double()).abs().max()) / max(scale, 1e-300)


def derivatives(call: Callable[..., Any], inputs: Sequence[Tensor], order: int) -> list[list[Tensor]]:
    """Of sums of sines, one after the other; of weight and bias the sum runs over all ranks' rows."""
    result = call(*inputs)
    total = (result.logprob.sin() + result.lse.square() / 50 + result.entropy.square()).sum()
    found = []
    for number in range(order):
        found.append(list(torch.autograd.grad(total, list(inputs), create_graph=number < order - 1)))
        total = torch.stack([part.sin().sum() for part in found[-1]]).sum()
    return found


def against_the_whole(case: LinearCase, order: int, rows: range | None = None) -> dict[str, float]:
    """Differences of results and of gradients, up to an order, from those of the unsharded op."""
    rows, options = cut(len(case.weight)) if rows is None else rows, options_of(case)
    whole = ops.linear_token_logprobs_with_units(case.hidden, case.weight, case.targets, bias=case.bias, **options)
    parts = ops.sliced_linear_token_logprobs_with_units(case.hidden, slice_of(case, rows), case.targets, **options)
    found = {name: difference(getattr(parts, name), getattr(whole, name)) for name in ops.LinearTokenLogprobs._fields}
    assert case.bias is not None
    leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    own = [
        t.clone().requires_grad_()
        for t in (case.hidden, case.weight[rows.start : rows.stop], case.bias[rows.start : rows.stop])
    ]

    def sliced(hidden: Tensor, weight: Tensor, bias: Tensor) -> ops.TokenLogprobs:
        held = ops.VocabularySlice(weight, rows.start, len(case.weight), bias)
        return ops.sliced_linear_token_logprobs(hidden, held, case.targets, **options)

    def unsliced(hidden: Tensor, weight: Tensor, bias: Tensor) -> ops.TokenLogprobs:
        return ops.linear_token_logprobs(hidden, weight, case.targets, bias=bias, **options)

    of_whole, of_parts = derivatives(unsliced, leaves, order), derivatives(sliced, own, order)
    for number, (expected, got) in enumerate(zip(of_whole, of_parts, strict=True), 1):
        expected[1:] = [t[rows.start : rows.stop] for t in expected[1:]]
        for name, one, two in zip(("hidden", "weight", "bias"), got, expected, strict=True):
            found[f"derivative {number} of {name}"] = difference(one, two)
    return found


def float64(order: int = 2) -> dict[str, float]:
    """Uneven slices, with and without softcap."""
    worst: dict[str, float] = {}
    for softcap in (None, 3.0):
        case = make_linear_case(11, 9, 31, torch.float64, bias=True, softcap=softcap)
        for name, value in against_the_whole(case, order).items():
            worst[name] = max(value, worst.get(name, 0.0))
    return worst


def third_derivatives() -> dict[str, float]:
    return float64(order=3)


def no_rows_on_the_last_rank() -> dict[str, float]:
    """Which takes part in all that the others do, and has the gradient of the hidden states too."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    case = make_linear_case(6, 5, 7, torch.float64, bias=True)
    rows = range(7, 7) if rank == last else range(rank * 3, 7 if rank == last - 1 else rank * 3 + 3)
    return against_the_whole(case, 2, rows)


def impossible_tokens() -> dict[str, float]:
    """Whole slices of -inf in some rows' bias do not exist: the bias is the rows'. So the last rank's tokens never come."""
    case = make_linear_case(9, 5, 31, torch.float64, bias=True, masked=0)
    size = -(-31 // dist.get_world_size())
    last = size * (dist.get_world_size() - 1)
    bias = case.bias.clone()
    bias[last:] = -torch.inf
    bias[1] = -torch.inf
    targets = case.targets % last
    targets[targets == 1] = 2
    return against_the_whole(dataclasses.replace(case, bias=bias, targets=targets), 2)


def an_impossible_target() -> dict[str, Any]:
    """Its log-prob is -inf, the rest of the row as it was."""
    case = make_linear_case(3, 5, 31, torch.float64, bias=True, masked=0)
    size = -(-31 // dist.get_world_size())
    bias = case.bias.clone()
    bias[31 - (31 % size or size) :] = -torch.inf
    case = dataclasses.replace(case, bias=bias, targets=torch.tensor([0, 30, 30]))
    found = ops.sliced_linear_token_logprobs_with_units(case.hidden, slice_of(case), case.targets, **options_of(case))
    whole = ops.linear_token_logprobs_with_units(
        case.hidden, case.weight, case.targets, bias=case.bias, **options_of(case)
    )
    assert found.logprob[1:].eq(-torch.inf).all() and whole.logprob[1:].eq(-torch.inf).all()
    return {name: difference(getattr(found, name), getattr(whole, name)) for name in found._fields[1:]}


def rows_that_are_not_finite() -> dict[str, float]:
    """They are NaN, on all ranks, wherever the cause is; the others are what they were."""
    case = make_linear_case(6, 5, 31, torch.float64, bias=True, masked=0)
    clean = ops.sliced_linear_token_logprobs_with_units(case.hidden, slice_of(case), case.targets, **options_of(case))
    hidden = case.hidden.clone()
    hidden[1], hidden[4, 2] = torch.nan, torch.inf
    broken = ops.sliced_linear_token_logprobs_with_units(hidden, slice_of(case), case.targets, **options_of(case))
    others = [0, 2, 3, 5]
    for part, before in zip(broken, clean, strict=True):
        assert part[[1, 4]].isnan().all() and torch.equal(part[others], before[others])
    bias = case.bias.clone()
    bias[-1] = torch.inf
    everything = ops.sliced_linear_token_logprobs_with_units(
        case.hidden, slice_of(dataclasses.replace(case, bias=bias)), case.targets, **options_of(case)
    )
    assert all(getattr(everything, name).isnan().all() for name in everything._fields if name != "lse")
    return {}


def every_dtype() -> dict[str, float]:
    """No worse than the unsharded op has to be; flat, peaked and nearly certain rows."""
    for dtype, softcap, bias, scale in itertools.product(DTYPES, (None, 4.0), (False, True), (0.3, 3.0)):
        case = make_linear_case(40, 24, 1003, dtype, bias=bias, softcap=softcap, scale=scale)
        assert_right(
            ops.sliced_linear_token_logprobs_with_units(case.hidden, slice_of(case), case.targets, **options_of(case)),
            case,
        )
    for dtype in DTYPES:
        case = certain_case(dtype)
        found = ops.sliced_linear_token_logprobs_with_units(
            case.hidden, slice_of(case), case.targets, **options_of(case)
        )
        assert_right(found, case)
    return {}


def narrow_dtypes() -> dict[str, float]:
    """bfloat16, and gradients of it, as `every_dtype`; which bits they are."""
    digest = hashlib.sha256()
    case = make_linear_case(40, 24, 1003, torch.bfloat16, bias=True, scale=3.0)
    found = ops.sliced_linear_token_logprobs_with_units(case.hidden, slice_of(case), case.targets, **options_of(case))
    assert_right(found, case)
    errors = {}
    grads = {}
    for way, dtype in (("truth", torch.float64), ("whole", torch.bfloat16), ("sliced", torch.bfloat16)):
        own = case.to(dtype)
        hidden = own.hidden.clone().requires_grad_()
        options = options_of(case)
        if way == "sliced":
            result = ops.sliced_linear_token_logprobs(hidden, slice_of(own), own.targets, **options)
        else:
            result = ops.linear_token_logprobs(hidden, own.weight, own.targets, bias=own.bias, **options)
        (result.logprob.sum() + result.entropy.sum()).backward()
        grads[way] = hidden.grad
    for way in ("whole", "sliced"):
        errors[way] = float((grads[way].double() - grads["truth"]).norm())
    for part in (*found, grads["sliced"]):
        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return {**errors, "digest": digest.hexdigest()}


def subsets_of_results_and_gradients() -> dict[str, float]:
    """Without entropy; gradients of some inputs alone; under no_grad; under autocast."""
    case = make_linear_case(8, 6, 31, torch.float64, bias=True)
    rows, found = cut(31), {}
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        got = []
        for sliced in (True, False):
            part = rows if sliced else range(31)
            tensors = (case.hidden, case.weight[part.start : part.stop], case.bias[part.start : part.stop])
            hidden, weight, bias = (t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True))
            if sliced:
                held = ops.VocabularySlice(weight, rows.start, 31, bias)
                result = ops.sliced_linear_token_logprobs(hidden, held, case.targets)
            else:
                result = ops.linear_token_logprobs(hidden, weight, case.targets, bias=bias)
            assert result.entropy is None
            result.logprob.square().sum().backward()
            grads = [t.grad for t in (hidden, weight, bias)]
            assert [g is not None for g in grads] == list(wanted)
            got.append(next(g for g in grads if g is not None))
        expected = got[1] if wanted[0] else got[1][rows.start : rows.stop]
        found[str(wanted.index(True))] = difference(got[0], expected)
    assert not ops.sliced_linear_token_logprobs(case.hidden, slice_of(case), case.targets).logprob.requires_grad
    narrow = case.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.sliced_linear_token_logprobs(narrow.hidden, slice_of(narrow), case.targets).logprob
    plain = ops.sliced_linear_token_logprobs(narrow.hidden.bfloat16(), slice_of(narrow), case.targets).logprob
    assert torch.equal(cast, plain)
    return found


class Tied(nn.Module):
    """Embedding, a layer that mixes nothing, and an output layer of the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 11, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(2 * self.embedding(tokens))
        return hidden


def parallelized_modules() -> dict[str, float]:
    """Output layers as `parallelize_module` leaves them: with a bias, and tied to an embedding."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    found = {}
    torch.manual_seed(5)
    hidden, targets = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 11, (7,))
    whole = nn.Linear(6, 11, dtype=torch.float64)
    result = ops.linear_token_logprobs(hidden, whole.weight, targets, bias=whole.bias, want_entropy=True)
    (result.logprob.sin().sum() + result.entropy.sum()).backward()
    head = nn.Linear(6, 11, dtype=torch.float64)
    head.load_state_dict(whole.state_dict())
    head = parallelize_module(head, mesh, ColwiseParallel())
    held = ops.VocabularySlice.from_dtensor(head.weight, head.bias)
    assert (held.first, held.weight.shape[0], held.vocabulary) == (cut(11).start, len(cut(11)), 11)
    sliced = ops.sliced_linear_token_logprobs(hidden, held, targets, want_entropy=True)
    (sliced.logprob.sin().sum() + sliced.entropy.sum()).backward()
    found["logprob"] = difference(sliced.logprob, result.logprob)
    for name in ("weight", "bias"):
        found[name] = difference(getattr(head, name).grad.full_tensor(), getattr(whole, name).grad)

    model, twin = Tied(), Tied()
    twin.load_state_dict(model.state_dict())
    ops.linear_token_logprobs(model(targets), model.head.weight, targets).logprob.sum().backward()
    twin = parallelize_module(
        twin, mesh, {"embedding": RowwiseParallel(input_layouts=_replicated()), "head": ColwiseParallel()}
    )
    twin.head.weight = twin.embedding.weight
    held = ops.VocabularySlice.from_dtensor(twin.head.weight)
    ops.sliced_linear_token_logprobs(twin(targets), held, targets).logprob.sum().backward()
    found["tied"] = difference(twin.embedding.weight.grad.full_tensor(), model.embedding.weight.grad)
    return found


def _replicated() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def layouts_that_are_no_slices() -> dict[str, str]:
    """Messages of `VocabularySlice.from_dtensor`, by what it was given; and two on a mesh of two dimensions that are."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    weight = torch.arange(44.0).view(11, 4)
    held = ops.VocabularySlice.from_dtensor(distribute_tensor(weight, mesh, [Replicate(), Shard(0)]))
    assert torch.equal(held.weight, weight[cut(11).start : cut(11).stop]) and held.first == cut(11).start
    layer = parallelize_module(nn.Linear(4, 11), mesh["tp"], ColwiseParallel())
    fully_shard(layer, mesh=mesh["dp"])
    layer.unshard()
    held = ops.VocabularySlice.from_dtensor(layer.weight, layer.bias)
    assert (held.first, held.weight.shape[0], held.vocabulary) == (cut(11).start, len(cut(11)), 11)
    layer.reshard()
    calls = {
        "plain": (weight,),
        "whole": (distribute_tensor(weight, mesh["tp"], [Replicate()]),),
        "hidden units": (distribute_tensor(weight, mesh["tp"], [Shard(1)]),),
        "fsdp": (layer.weight,),
        "bias": (distribute_tensor(weight, mesh["tp"], [Shard(0)]), torch.zeros(11)),
    }
    return {
        name: _message(lambda given=given: ops.VocabularySlice.from_dtensor(*given)) for name, given in calls.items()
    }


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except EntropyFastError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def disagreements() -> dict[str, str]:
    """What each rank is told where one differs; and that all can go on afterwards."""
    case = make_linear_case(5, 6, 31, torch.float64, masked=0)
    last = dist.get_rank() == dist.get_world_size() - 1
    own = slice_of(case)
    hidden, targets = case.hidden, case.targets

    def call(
        hidden: Tensor = hidden, held: ops.VocabularySlice = own, targets: Tensor = targets, **options: Any
    ) -> Any:
        return lambda: ops.sliced_linear_token_logprobs(hidden, held, targets, **options)

    swapped = targets.flip(0)
    assert not torch.equal(swapped, targets)
    calls = {
        "rows": call(hidden[:4], targets=targets[:4]),
        "targets": call(targets=swapped),
        "softcap": call(softcap=2.0),
        "entropy": call(want_entropy=True),
        "gradient": call(hidden.clone().requires_grad_()),
        "a target": call(targets=torch.full_like(targets, 31)),
        "a backend": call(backend="cuda"),
        "a dtype": call(hidden.to(torch.int64)),
        "lost rows": call(held=ops.VocabularySlice(own.weight[:-1], own.first, 31)),
        "doubled rows": call(held=ops.VocabularySlice(own.weight, max(own.first - 1, 0), 31)),
        "vocabulary": call(held=ops.VocabularySlice(own.weight, own.first, 32)),
    }
    found = {name: _message(different if last else call()) for name, different in calls.items()}
    assert call()().logprob.isfinite().all()
    return found


def bytes_sent() -> dict[str, Any]:
    """Counted by the kernel: what this process wrote to its sockets; and what the formulas say. gloo alone writes here."""
    rows, hidden_size, vocabulary, world = 2000, 24, 1000, dist.get_world_size()
    case = make_linear_case(rows, hidden_size, vocabulary, torch.float32)
    own, share = slice_of(case), (world - 1) / world
    hidden = case.hidden.clone().requires_grad_()
    results: list[Any] = []
    in_call = (world - 1) * 96
    ring = 2 * share * 4 * hidden_size * rows
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "values": (
            lambda: results.append(ops.sliced_linear_token_logprobs(hidden, own, case.targets)),
            in_call + (world - 1) * 16 * rows,
        ),
        "values and entropy": (
            lambda: results.append(ops.sliced_linear_token_logprobs(hidden, own, case.targets, want_entropy=True)),
            in_call + (world - 1) * 24 * rows,
        ),
        "backward": (lambda: (results[1].logprob.sum() + results[1].entropy.sum()).backward(), ring),
        "units": (
            lambda: ops.sliced_linear_token_logprobs_with_units(hidden, own, case.targets, want_entropy=True),
            in_call + (world - 1) * 24 * rows + 2 * ring,
        ),
    }
    found = {}
    for name, (call, expected) in calls.items():
        dist.barrier()
        before = _written()
        call()
        found[name] = (_written() - before, expected)
    return found


def _written() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


def transformers_models() -> dict[str, float]:
    """A model that transformers made tensor-parallel, tied and untied: log-probs, and gradients down to its first layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.distributed import DistributedConfig

    for name, value in (
        ("RANK", dist.get_rank()),
        ("LOCAL_RANK", dist.get_rank()),
        ("WORLD_SIZE", dist.get_world_size()),
    ):
        os.environ[name] = str(value)  # transformers asks the launcher

    found = {}
    for tied in (False, True):
        torch.manual_seed(1)
        config = Qwen2Config(
            vocab_size=53,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2 if dist.get_world_size() == 2 else 4,
            tie_word_embeddings=tied,
        )
        whole = Qwen2ForCausalLM(config)
        folder = Path(sys.argv[2]) / f"tied {tied}"
        if dist.get_rank() == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        parallel = DistributedConfig(tp_size=dist.get_world_size())
        model = Qwen2ForCausalLM.from_pretrained(folder, distributed_config=parallel, dtype=torch.float32)
        tokens = torch.arange(12).view(1, 12) % 53
        targets = (tokens[0] * 7 + 3) % 53
        expected = ops.linear_token_logprobs(
            whole.model(input_ids=tokens).last_hidden_state[0], whole.lm_head.weight, targets
        )
        held = ops.VocabularySlice.from_dtensor(model.lm_head.weight)
        got = ops.sliced_linear_token_logprobs(model.model(input_ids=tokens).last_hidden_state[0], held, targets)
        found[f"logprob, tied {tied}"] = difference(got.logprob, expected.logprob)
        expected.logprob.sum().backward()
        got.logprob.sum().backward()
        names = [name for name, _ in whole.named_parameters()]
        for name in names:
            grad, other = (m.get_parameter(name).grad for m in (model, whole))
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[f"{name}, tied {tied}"] = difference(grad, other)
    return found


def work(rank: int, world: int, folder: Path, checks: Sequence[str]) -> None:
    """One rank: its own results go to a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {check: globals()[check]() for check in checks}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(world: int, folder: Path, checks: Sequence[str]) -> int:
    torch.set_num_threads(1)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(rank, world, folder, checks)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
