"""What a trainer says of how it trains: refused with the remedy, rounded as it rounds, sampled as it samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_trl import tiny_model, tiny_trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from entropy_fast.errors import ConfigError, EntropyFastError, ModelStateError
from entropy_fast.integrations.trl import EntropyForecastCallback
from entropy_fast.integrations.trl.setting import (
    Sampling,
    autocast_of,
    refuse_setting,
    sampling_of,
    scaler_of,
    sharded_by_fsdp2,
)


@pytest.fixture(scope="module")
def one_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def trainer(one_trainer: Any) -> Any:
    """A trainer of the test's own attributes; the arguments and the model are those of one that is built once."""
    own = copy.copy(one_trainer)
    own.args = copy.copy(one_trainer.args)
    return own


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("is_deepspeed_enabled", True, "DeepSpeed steps inside the backward"),
        ("is_fsdp_enabled", True, "FSDP1 keeps parameters as flattened shards"),
        ("accelerator.distributed_type", "DistributedType.DEEPSPEED", "DeepSpeed steps inside the backward"),
        ("accelerator.distributed_type", "DistributedType.FSDP", "FSDP1 keeps parameters as flattened shards"),
        ("accelerator.distributed_type", "DistributedType.MEGATRON_LM", "Megatron-LM splits"),
        ("accelerator.num_processes", 2, "2 processes"),
    ],
)
def test_ways_of_training_that_are_refused(trainer: Any, name: str, value: object, message: str) -> None:
    outer, _, inner = name.rpartition(".")
    if outer:
        own = {"distributed_type": "DistributedType.NO", "num_processes": 1, inner: value}
        trainer.accelerator = SimpleNamespace(**own)
    else:
        setattr(trainer, inner, value)
    with pytest.raises(ConfigError, match=message) as caught:
        EntropyForecastCallback(trainer)
    assert "in one process" in caught.value.fix


def test_accelerates_names_are_those_that_are_looked_for() -> None:
    from accelerate.utils import DistributedType

    assert {str(kind).rpartition(".")[2] for kind in DistributedType} >= {"DEEPSPEED", "FSDP", "MEGATRON_LM"}


@pytest.mark.parametrize("where", ["model", "model_wrapped"])
def test_fsdp1_is_refused_by_its_type_wherever_the_trainer_has_it(one_process: None, trainer: Any, where: str) -> None:
    setattr(trainer, where, FullyShardedDataParallel(tiny_model(), device_id=torch.device("cpu")))
    with pytest.raises(ModelStateError, match="FullyShardedDataParallel: FSDP1") as caught:
        EntropyForecastCallback(trainer)
    assert "full_state_dict=True" in caught.value.fix


def test_of_fsdp2_only_what_needs_all_ranks_at_a_time_that_they_choose_is_refused(
    one_process: None, trainer: Any, tmp_path: Path
) -> None:
    assert not sharded_by_fsdp2(trainer)
    trainer.model = fully_shard(tiny_model(), mesh=init_device_mesh("cpu", (1,)))
    assert sharded_by_fsdp2(trainer)
    assert EntropyForecastCallback(trainer).forecaster.ranks.together
    with pytest.raises(ConfigError, match="bundle: FSDP2 shards the model"):
        EntropyForecastCallback(trainer, bundle=tmp_path)
    with pytest.raises(ConfigError, match="verify='held_out': FSDP2 shards the model"):
        EntropyForecastCallback(trainer, verify="held_out")
    # A function of one's own is the same on all ranks.
    EntropyForecastCallback(trainer, verify="held_out", held_out=lambda window, prompts: window.rollouts)


def test_a_wrapper_that_shards_what_the_trainer_has_whole_is_refused(one_process: None, trainer: Any) -> None:
    trainer.model_wrapped = fully_shard(tiny_model(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ModelStateError, match="is a DTensor, sharded by FSDP2"):
        EntropyForecastCallback(trainer)


def test_accelerates_fsdp2_is_taken_before_it_has_sharded_anything(trainer: Any) -> None:
    trainer.is_fsdp_enabled = True
    own = {
        "distributed_type": "DistributedType.FSDP",
        "num_processes": 2,
        "native_amp": True,
        "mixed_precision": "bf16",
    }
    trainer.accelerator = SimpleNamespace(is_fsdp2=True, **own)
    refuse_setting(trainer)
    assert sharded_by_fsdp2(trainer)
    assert autocast_of(trainer) is None  # it casts instead
    trainer.accelerator.is_fsdp2 = False
    with pytest.raises(ConfigError, match="FSDP1 keeps"):
        refuse_setting(trainer)
    assert autocast_of(trainer) == "bfloat16"


def test_a_deepspeed_engine_is_refused_by_its_type(trainer: Any) -> None:
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = trainer.model
    trainer.model_wrapped = engine
    with pytest.raises(ModelStateError, match=r"is a deepspeed\.runtime\.engine\.DeepSpeedEngine"):
        EntropyForecastCallback(trainer)


def test_a_fused_loss_is_refused_by_what_the_trainer_holds(trainer: Any) -> None:
    """As trainers of TRL before 1.x hold it, whatever the attribute is called."""
    kind = type("LigerFusedLinearGRPOLoss", (nn.Module,), {"__module__": "liger_kernel.chunked_loss.grpo_loss"})
    trainer.liger_grpo_loss = kind()
    with pytest.raises(ConfigError, match="the trainer's liger_grpo_loss is a LigerFusedLinearGRPOLoss") as caught:
        EntropyForecastCallback(trainer)
    assert "use_liger_kernel=False" in caught.value.fix


def test_what_the_training_computes_in(trainer: Any, tmp_path: Path) -> None:
    assert autocast_of(trainer) is None
    # accelerate leaves fp16 out on a CPU, whatever the arguments say.
    silent = tiny_trainer(tmp_path, fp16=True)
    assert silent.args.fp16 and autocast_of(silent) is None and scaler_of(silent) is None
    silent.accelerator.native_amp = True
    assert autocast_of(silent) == "float16"
    silent.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert scaler_of(silent) is None
    silent.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert scaler_of(silent) is silent.accelerator.scaler
    assert autocast_of(tiny_trainer(tmp_path, bf16=True)) == "bfloat16"


@pytest.mark.parametrize(
    ("options", "expected", "truncates"),
    [
        ({}, (1.0, 1.0, 0, None, ()), False),
        ({"top_p": 0.9}, (1.0, 0.9, 0, None, ()), True),
        ({"repetition_penalty": 1.1}, (1.0, 1.0, 0, None, ("repetition_penalty",)), True),
        ({"generation_kwargs": {"max_new_tokens": 4, "top_k": None}}, (1.0, 1.0, 0, None, ()), False),
        ({"top_k": None}, (1.0, 1.0, 50, None, ()), True),
        ({"temperature": 0.7, "generation_kwargs": {"temperature": 0.5}}, (0.5, 1.0, 0, None, ()), False),
        ({"generation_kwargs": {"top_k": 5, "min_p": 0.1}}, (1.0, 1.0, 5, 0.1, ()), True),
        ({"generation_kwargs": {"do_sample": False}}, (1.0, 1.0, 0, None, ("do_sample",)), True),
        ({"generation_kwargs": {"typical_p": 0.9, "mine": 3}}, (1.0, 1.0, 0, None, ("mine", "typical_p")), True),
    ],
)  # fmt: skip
def test_what_responses_are_drawn_from(
    tmp_path: Path, options: dict[str, Any], expected: tuple[Any, ...], truncates: bool
) -> None:
    found = sampling_of(tiny_trainer(tmp_path, **options))
    assert (found.temperature, found.top_p, found.top_k, found.min_p, found.others) == expected
    assert found.truncates == truncates


def test_what_is_not_said_is_the_models_own(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, top_k=None)
    config = trainer.model.generation_config
    assert sampling_of(trainer).top_k == 50  # generate()'s own
    config.top_k, config.min_p, config.typical_p, config.min_new_tokens = 7, 0.05, 0.9, 3
    assert sampling_of(trainer) == Sampling(1.0, 1.0, 7, 0.05, ("min_new_tokens", "typical_p"))
    trainer.use_vllm = True  # which knows nothing of it
    assert sampling_of(trainer) == Sampling(1.0, 1.0, None, None, ())


@pytest.mark.exhaustive
def test_generate_draws_from_the_fifty_likeliest_where_top_k_is_none(tmp_path: Path) -> None:
    """Why None is not "off": TRL hands it on, and transformers puts its default there."""
    trainer = tiny_trainer(tmp_path, top_k=None, max_steps=1)
    config, _ = trainer.model._prepare_generation_config(trainer.generation_config)
    assert config.top_k == sampling_of(trainer).top_k == 50


def test_a_grammar_of_the_engine_is_no_policy(trainer: Any) -> None:
    trainer.use_vllm, trainer.args.vllm_structured_outputs_regex = True, "[0-9]+"
    assert sampling_of(trainer).others == ("vllm_structured_outputs_regex",)
    assert sampling_of(trainer).truncates


def test_a_refusal_is_no_traceback_of_somebody_elses(trainer: Any) -> None:
    trainer.accelerator = None
    with pytest.raises(EntropyFastError, match="is no trainer"):
        EntropyForecastCallback(trainer)
