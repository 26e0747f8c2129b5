"""Models whose layers are split over ranks are refused by name; those that only FSDP2 shards are not its matter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from probe_models.architectures import add_lora, build_model
from probe_models.batches import make_rollouts
from probe_models.cases import Case, case_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from entropy_fast import fast_delta_h1
from entropy_fast.checks.tensor_parallel import refuse_tensor_parallel
from entropy_fast.errors import ModelStateError
from entropy_fast.truth import measure_delta_h


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One rank along two dimensions: types are those of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def case(mesh: DeviceMesh) -> Case:
    """The output layer alone is split, frozen, and gives whole logits."""
    case = case_of(add_lora(build_model()))
    head = case.model.get_base_model().get_output_embeddings()
    parallelize_module(head, mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
    return case


@pytest.mark.parametrize("call", [fast_delta_h1, measure_delta_h])
def test_a_split_output_layer_is_refused_before_anything_runs(case: Case, call: object) -> None:
    with pytest.raises(
        ModelStateError, match=r"tensor-parallel: parameter '.*lm_head\.weight' is a DTensor .*Shard\(dim=0\)"
    ):
        call(case.model, case.optimizer, make_rollouts())


def test_fsdp2_alone_is_not_its_matter(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    fully_shard(model[0], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    assert all(isinstance(p, DTensor) for p in model.parameters())
    refuse_tensor_parallel(model)


def test_fsdp2_over_tensor_parallelism_is(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    parallelize_module(model[1], mesh["tp"], ColwiseParallel())
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ModelStateError, match=r"'1\.weight' is a DTensor .*Shard\(dim=0\)\) on a mesh of \(1, 1\)"):
        refuse_tensor_parallel(model)


def test_what_transformers_says() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for size in (None, 1):
        model._tp_size = size
        refuse_tensor_parallel(model)
    model._tp_size = 4
    with pytest.raises(ModelStateError, match="split over 4 ranks; expected parameters that are whole"):
        refuse_tensor_parallel(model)


def test_plain_models_are_taken() -> None:
    refuse_tensor_parallel(nn.Linear(2, 2).to(torch.bfloat16))
