"""The probe works on the parameters it was built with, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_rollouts
from probe_models.cases import case_of, estimate_of, lora_case, mute_adapters
from probe_options import options_of
from torch import nn

from entropy_fast import OfflineEntropyProbe
from entropy_fast.checks.parameter_registry import ParameterRegistry, unwrap_model
from entropy_fast.errors import GraphDetachedError, ModelStateError, ParameterRegistryError

QUERY_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


def new_config() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def switch_adapter(model: peft.PeftModel) -> None:
    model.add_adapter("second", new_config())
    model.set_adapter("second")


def replace_adapter(model: peft.PeftModel) -> None:
    model.add_adapter("second", new_config())
    model.set_adapter("second")
    model.delete_adapter("default")
    model.add_adapter("default", new_config())
    model.set_adapter("default")


def reassign_parameter(model: nn.Module) -> None:
    layer = model.get_submodule(QUERY_A.rpartition(".")[0])
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def freeze_parameter(model: nn.Module) -> None:
    model.get_parameter(QUERY_A).requires_grad_(False)


def merge_adapter(model: peft.PeftModel) -> None:
    model.merge_and_unload()


CHANGES: list[tuple[Callable[[nn.Module], None], str]] = [
    (switch_adapter, f"'{QUERY_A}' is gone or no longer trainable"),
    (replace_adapter, f"'{QUERY_A}' was replaced"),
    (reassign_parameter, f"'{QUERY_A}' was replaced"),
    (freeze_parameter, f"'{QUERY_A}' is gone or no longer trainable"),
    (merge_adapter, f"'{QUERY_A}' is gone or no longer trainable"),
    (lambda model: model.get_input_embeddings().weight.requires_grad_(True), "embed_tokens.weight' became trainable"),
    (lambda model: model.register_parameter("extra", nn.Parameter(torch.ones(2))), "'extra' became trainable"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda v: getattr(v, "__name__", None))
@pytest.mark.parametrize("batches", [1, 2])
def test_a_model_changed_after_building_is_refused(
    change: Callable[[nn.Module], None], message: str, batches: int
) -> None:
    case = lora_case()
    probe = case.probe()
    probe.compute_delta_h1(case.rollouts)
    change(case.model)
    other = [make_rollouts((2, 2), seed=9)] if batches == 2 else []
    with pytest.raises(ParameterRegistryError) as caught:
        estimate_of(probe, *other, case.rollouts)
    assert message in str(caught.value)
    assert "build the probe again" in caught.value.fix


def test_wrapping_the_base_model_in_lora_after_building_is_refused() -> None:
    case = case_of(build_model())
    probe = case.probe()
    add_lora(case.model)  # replaces the linear maps inside the very module the probe holds
    with pytest.raises(ParameterRegistryError, match="no longer trainable"):
        probe.compute_delta_h1(case.rollouts)


def test_a_change_in_the_middle_of_a_probe_is_refused() -> None:
    case = lora_case()
    probe = OfflineEntropyProbe(
        case.model,
        case.optimizer,
        on_progress=lambda stage, done, total: reassign_parameter(case.model),
        **options_of(prompts_per_microbatch=1),
    )
    with pytest.raises(ParameterRegistryError, match="was replaced"):
        probe.compute_delta_h1(case.rollouts)


def test_an_unused_second_adapter_changes_nothing() -> None:
    case = lora_case()
    probe = case.probe()
    before = probe.compute_delta_h1(case.rollouts).delta_h1
    case.model.add_adapter("second", new_config())
    assert probe.compute_delta_h1(case.rollouts).delta_h1 == before


def test_a_disabled_adapter_is_refused_by_name_of_the_context() -> None:
    case = lora_case()
    probe = case.probe()
    with case.model.disable_adapter(), pytest.raises(ParameterRegistryError, match=r"disable_adapter\(\)"):
        probe.compute_delta_h1(case.rollouts)
    with case.model.disable_adapter(), pytest.raises(ModelStateError, match="no trainable parameter"):
        case.probe()
    assert probe.compute_delta_h1(case.rollouts).delta_h1 != 0  # and outside the context all is well again


def test_muted_adapters_leave_a_model_without_graph() -> None:
    case = lora_case()
    probe = case.probe()
    mute_adapters(case.model)
    with pytest.raises(GraphDetachedError, match=r"disable_adapter\(\)"):
        probe.compute_delta_h1(case.rollouts)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = build_model()
    optimizer = stepped_adamw(model)
    model.requires_grad_(False)
    with pytest.raises(ModelStateError, match="no trainable parameter"):
        OfflineEntropyProbe(model, optimizer)


def test_post_accumulate_grad_hooks_are_refused() -> None:
    case = lora_case()
    steps = []
    handle = case.model.get_parameter(QUERY_A).register_post_accumulate_grad_hook(steps.append)
    with pytest.raises(ModelStateError, match="post-accumulate-grad hook") as caught:
        case.probe()
    assert f"'{QUERY_A}'" in str(caught.value)
    handle.remove()
    case.probe().compute_delta_h1(case.rollouts)
    assert not steps


def test_post_accumulate_grad_hooks_added_after_building_are_refused_too() -> None:
    case = lora_case()
    probe = case.probe()
    steps = []
    case.model.get_parameter(QUERY_A).register_post_accumulate_grad_hook(steps.append)
    with pytest.raises(ModelStateError, match="post-accumulate-grad hook"):
        probe.compute_delta_h1(case.rollouts)
    assert not steps


class Compiled(nn.Module):
    """What torch.compile returns, as far as unwrapping goes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        raise AssertionError("the compiled forward must not run: it would compile for every batch shape")


def test_a_compiled_wrapper_is_taken_off() -> None:
    case = lora_case()
    expected = case.probe().compute_delta_h1(case.rollouts)
    wrapped = Compiled(case.model)
    assert unwrap_model(wrapped) is case.model
    assert unwrap_model(Compiled(wrapped)) is case.model
    found = OfflineEntropyProbe(wrapped, case.optimizer, **options_of(engine="two_pass")).compute_delta_h1(
        case.rollouts
    )
    assert found.delta_h1 == expected.delta_h1
    assert found.std_error == expected.std_error


def test_the_registry_lists_tied_parameters_once_and_in_order() -> None:
    model = build_model("gpt2")  # its head is its embedding
    registry = ParameterRegistry.build(model, {"transformer.wte.weight": 0})
    assert registry.names == [name for name, _ in model.named_parameters()]
    assert registry.numel == sum(p.numel() for p in model.parameters())
    assert [p.group for p in registry.parameters if p.name == "transformer.wte.weight"] == [0]
    assert [p.group for p in registry.parameters if p.name == "transformer.wpe.weight"] == [None]
