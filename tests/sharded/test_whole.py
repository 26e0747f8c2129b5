"""Forecasts of models that FSDP2 shards, by real processes: a whole model's numbers, and training as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsdp2_ranks
import pytest
import torch
import torch.distributed as dist
from fsdp2_cases import CASES, layers_of
from probe_models.architectures import add_lora, build_model, quantize_nf4
from probe_models.batches import make_rollouts
from process_groups import assert_one_process, job, run_jobs
from torch.distributed.fsdp import fully_shard

from entropy_fast import RunOptions, fast_delta_h1
from entropy_fast.errors import ModelStateError

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch's gloo backend"
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_case_at_every_world_size(tmp_path: Path, world: int) -> None:
    (done,) = run_jobs(tmp_path, [job(world, "fsdp2_ranks:sharded", names=list(CASES))], timeout=900)
    for name, case in CASES.items():
        assert_one_process(done, name, narrow=case.dtype == torch.float32)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["mixed precision"])
def test_training_goes_on_as_if_there_had_been_no_probe(one_process: None, name: str) -> None:
    found = fsdp2_ranks.training(0, name)
    assert found["tensors"] > 100 and found["as it was"] and found["same training"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["lora", "all of a tied model", "a head by itself", "many layers, mixed"])
def test_so_does_that_of_several_ranks(tmp_path: Path, name: str) -> None:
    (done,) = run_jobs(tmp_path, [job(3, "fsdp2_ranks:training", name=name)])
    for found in done.ranks:
        assert found is not None and found["as it was"] and found["same training"]


@pytest.mark.exhaustive
def test_two_layers_are_whole_at_the_most(tmp_path: Path) -> None:
    names = ["many layers", "many layers, checkpointing", "many layers, prompts apart", "many layers, all of them"]
    for done in run_jobs(tmp_path, [job(2, "fsdp2_ranks:held", name=name) for name in names]):
        for found in done.ranks:
            assert found is not None and len(found["layers"]) in (4, 6)
            markers = 1000  # bytes: what stands in the other layers' places
            assert max(found["layers"]) < found["most"] < 2 * max(found["layers"]) + markers


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_rank_keeps_its_share_of_what_is_trained_and_finds_a_layer_at_a_time(tmp_path: Path, world: int) -> None:
    """Gradients of a single prompt, found and arrived; sums, units' gradients and second moments, over all ranks."""
    names = ["all, a prompt at a time", "all, blocks"]
    jobs = [job(world, "fsdp2_ranks:shares", name=name) for name in names]
    jobs += [job(world, "fsdp2_ranks:sharded", names=names[:1])]
    *measured, done = run_jobs(tmp_path, jobs)
    for name, own in zip(names, measured, strict=True):
        kept = [rank["moments"][0] for rank in own.ranks if rank is not None]
        for rank, elements in zip(own.ranks, kept, strict=True):
            assert rank is not None
            assert rank["sums"] and set(rank["sums"]) == set(rank["moments"]) == {elements}
            assert rank["units"] == ([[elements, 2]] if name == "all, blocks" else [])
            assert elements <= rank["whole"] / world + rank["slack"] < rank["whole"] * 0.7
            # Of the column of one backward; the output layer's are of all columns at once.
            at_once = max(rank["columns"] * rank["rest"], rank["layer"] + rank["rest"])
            assert rank["found"] <= at_once < rank["whole"]  # and of each of several columns
            assert 0 < rank["arrived"] <= at_once / world + rank["columns"] * rank["slack"]
        assert own.ranks[0] is not None and own.ranks[0]["found"] > 0 and sum(kept) == own.ranks[0]["whole"]
    assert_one_process(done, names[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_who_fails_within_a_layer_ends_all_where_they_need_the_next(tmp_path: Path, how: str) -> None:
    (done,) = run_jobs(tmp_path, [job(3, "fsdp2_ranks:half_way", name="many layers", who=1, how=how)])
    for rank, found in enumerate(done.ranks):
        if how == "kill" and rank == 1:
            assert done.statuses[rank] == -9 and found is None
            continue
        assert found is not None and found["error"]["error"] == "DistributedError"
        assert found["error"]["ranks"] == [1] and found["error"]["seconds"] < 30  # no timeout was waited for


@pytest.mark.exhaustive
def test_a_rank_that_raises_ends_all_at_every_phase_and_the_next_probe_succeeds(tmp_path: Path) -> None:
    (done,) = run_jobs(tmp_path, [job(2, "fsdp2_ranks:failing", name="many layers", who=1)])
    for written in done.ranks:
        assert written is not None
        found = dict(written["found"])
        assert found.pop("good")["error"] is None and found.pop("good again")["error"] is None
        assert set(found) == set(written["phases"]) >= {"sharded parameters", "agreement", "gradient sums", "result"}
        for phase, said in found.items():
            assert said["error"] == "DistributedError" and said["ranks"] == [1]
            assert f"rank 1 failed at '{phase}': ValueError: made up." in said["text"]


REFUSED = {
    "replicas of shards": (
        "ModelStateError",
        "(Replicate(), Shard(dim=0)) on a mesh of (1, ",
    ),
    "some of the ranks": ("DistributedError", "of ranks [1]; the default process group has ranks [0, 1]"),
    "sharded by others": ("ModelStateError", "is a DTensor that fully_shard has not made"),
    "offloaded": ("ModelStateError", "'the whole' keeps its shards on the CPU (CPUOffloadPolicy)"),
    "another optimizer": ("OptimizerStateError", "the optimizer is a torch.optim.adagrad.Adagrad, whose step"),
    "several optimizers": ("OptimizerStateError", "the optimizer is several optimizers"),
    "each by itself": ("ModelStateError", "call fast_delta_h1 on every rank with RunOptions(ranks='all')"),
    "a checkpoint": ("ConfigError", "checkpoint='folder': FSDP2 shards the model"),
    "a hook": ("ModelStateError", "lora_A.default.weight' has a hook on its gradient"),
    "no gradient": ("ConfigError", "gradient='live' and no trainable parameter has a .grad"),
    "unreduced gradients": ("ConfigError", "were not added up over ranks yet"),
    "another rate": ("DistributedError", "rank 1 has other learning rate than rank 0"),
}


BY_SEVERAL = {"some of the ranks", "another rate"}  # a rank by itself has all of them, and agrees with all


def assert_refused(found: dict[str, Any] | None, name: str) -> None:
    kind, words = REFUSED[name]
    assert found is not None and found.keys() == REFUSED.keys()
    assert found[name]["error"] == kind, found[name]
    assert words in found[name]["text"] and "What to do: " in found[name]["text"]
    assert found[name]["seconds"] < 30  # no timeout was waited for


def test_what_is_not_taken_is_refused(one_process: None) -> None:
    found = fsdp2_ranks.refused(0)
    for name in REFUSED.keys() - BY_SEVERAL:
        assert_refused(found, name)


@pytest.mark.exhaustive
def test_what_is_not_taken_is_refused_by_all_ranks_alike(tmp_path: Path) -> None:
    (done,) = run_jobs(tmp_path, [job(2, "fsdp2_ranks:refused")])
    for name in REFUSED:
        for found in done.ranks:
            assert_refused(found, name)


def test_a_quantised_base_is_refused(one_process: None) -> None:
    model = add_lora(quantize_nf4(build_model("qwen2")))
    for layer in layers_of(model.get_base_model()):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ModelStateError, match="base_layer' is quantised by bitsandbytes, and its codes are sharded"):
        fast_delta_h1(model, optimizer, make_rollouts(), run=RunOptions(ranks="all"))
