"""Models whose parameters are not whole in this process are refused by their types, at once, whatever engine and optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_rollouts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from entropy_fast import EstimateOptions, RunOptions, fast_delta_h1
from entropy_fast.checks.sharding import refuse_sharded
from entropy_fast.engines import engine_kinds
from entropy_fast.errors import ModelStateError
from entropy_fast.step import AdamState
from entropy_fast.truth import measure_delta_h

CPU = torch.device("cpu")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP1 says that it is deprecated, and that one process shards nothing
            yield
    finally:
        dist.destroy_process_group()


def under_fsdp1(model: nn.Module, *, original: bool = True) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=original, device_id=CPU)


def one_layer_under_fsdp1(model: Any) -> nn.Module:
    model.model.layers[0] = under_fsdp1(model.model.layers[0])
    return model


def inside_of_fsdp1(model: nn.Module, *, original: bool = True) -> nn.Module:
    """What a trainer calls its model, where the wrapper is another attribute."""
    model.wrapper_of_test = [under_fsdp1(model, original=original)]  # in a list: no submodule, and alive
    return model


def under_fsdp2(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gathered_by_fsdp2(model: Any) -> nn.Module:
    """After a forward without a backward its parameters are whole, until the next."""
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]))
    assert not any("DTensor" in type(p).__name__ for p in model.parameters())
    return model


def by_deepspeed(model: nn.Module, name: str = "DeepSpeedEngine") -> nn.Module:
    kind = type(name, (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    engine = type("Mine", (kind,), {})()  # somebody's own, made from it
    engine.module = model
    return engine


def partitioned_by_zero(model: nn.Module) -> nn.Module:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    return model


WRAPPED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "FSDP1": (under_fsdp1, r"model is a torch\.distributed\.fsdp\..*FullyShardedDataParallel: FSDP1"),
    "FSDP1, flat": (lambda model: under_fsdp1(model, original=False), "FullyShardedDataParallel: FSDP1"),
    "FSDP1 around a layer": (
        one_layer_under_fsdp1,
        r"model holds, as 'model\.layers\.0', a .*FullyShardedDataParallel",
    ),
    "inside of FSDP1": (inside_of_fsdp1, r"parameter 'model\.embed_tokens\.weight' belongs to FSDP1"),
    "inside of FSDP1, flat": (
        lambda model: inside_of_fsdp1(model, original=False),
        "parameter '_flat_param' belongs to FSDP1",
    ),
    "FSDP2": (under_fsdp2, "is a DTensor, sharded by FSDP2"),
    "FSDP2, gathered": (gathered_by_fsdp2, "of FSDP2, whose parameters are whole for the moment"),
    "DeepSpeed": (by_deepspeed, r"model is a deepspeed\.runtime\.engine\.DeepSpeedEngine"),
    "DeepSpeed's pipeline": (lambda model: by_deepspeed(model, "PipelineEngine"), "a deepspeed.*PipelineEngine"),
    "ZeRO stage 3": (partitioned_by_zero, "partitioned by DeepSpeed's ZeRO stage 3"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_every_engine_refuses_it_with_every_kind_of_optimizer(one_process: None, name: str) -> None:
    wrap, message = WRAPPED[name]
    model = wrap(build_model())
    rollouts, other = make_rollouts((2, 2, 2)), make_rollouts((2, 2), seed=9)
    parameters = list(model.parameters())
    optimizers: list[Any] = [
        torch.optim.AdamW(parameters), torch.optim.SGD(parameters, lr=0.1), AdamState((), {}, {}), "optimizer.pt",
    ]  # fmt: skip
    for kind in engine_kinds():
        for optimizer in optimizers:
            with pytest.raises(ModelStateError, match=message) as caught:
                fast_delta_h1(model, optimizer, rollouts, entropy_rollouts=other, run=RunOptions(engine=kind.name))
            assert "checkpoint" in caught.value.fix
    with pytest.raises(ModelStateError, match=message):
        measure_delta_h(model, optimizers[0], rollouts)


@pytest.mark.exhaustive
def test_frozen_layers_may_be_sharded_where_what_is_trained_is_whole(one_process: None) -> None:
    rollouts, options = make_rollouts((2, 2, 2)), EstimateOptions(entropy_estimator="score_function")

    def forecast(model: Any) -> float:
        return fast_delta_h1(
            model, stepped_adamw(model), rollouts, estimate=options, run=RunOptions(engine="two_pass")
        ).delta_h1

    whole = forecast(add_lora(build_model()))
    sharded = add_lora(build_model())
    trained = {parameter for parameter in sharded.parameters() if parameter.requires_grad}
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    assert any("DTensor" in type(p).__name__ for p in sharded.parameters())
    assert forecast(sharded) == pytest.approx(whole, rel=1e-6)


def test_a_plain_model_is_none_of_these() -> None:
    refuse_sharded(build_model())
    # A class that only sounds like it: nothing of it is DeepSpeed's.
    refuse_sharded(type("SearchEngine", (nn.Linear,), {})(2, 2))
