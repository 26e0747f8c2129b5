"""Autograd must be on, and must have been on where it matters; every entry says so before it does anything else."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_models.architectures import add_lora, build_model, stepped_adamw
from probe_models.batches import make_rollouts
from probe_models.cases import Case, lora_case

from entropy_fast import OfflineEntropyProbe, ProbeComponents, Rollouts, fast_delta_h1
from entropy_fast.errors import GradContextError, ModelStateError

FUNCTIONS: dict[str, tuple[Callable[..., Any], type | None]] = {
    "_teacher_force_logprobs": (ProbeComponents._teacher_force_logprobs, ProbeComponents),
    "_compute_aligned_batch_logprobs": (ProbeComponents._compute_aligned_batch_logprobs, ProbeComponents),
    "accumulate_sum_X": (ProbeComponents.accumulate_sum_X, ProbeComponents),
    "accumulate_sum_Y": (ProbeComponents.accumulate_sum_Y, ProbeComponents),
    "same_batch": (ProbeComponents.same_batch, ProbeComponents),
    "two_batch": (ProbeComponents.two_batch, ProbeComponents),
    "compute_conditional_variance_over_E_alpha": (
        ProbeComponents.compute_conditional_variance_over_E_alpha,
        ProbeComponents,
    ),
    "compute_delta_h1": (OfflineEntropyProbe.compute_delta_h1, OfflineEntropyProbe),
    "run_mixed_probe": (OfflineEntropyProbe.run_mixed_probe, OfflineEntropyProbe),
    "fast_delta_h1": (fast_delta_h1, None),
}


def call_with_nonsense(name: str) -> None:
    """Call with arguments, and where there is one a ``self``, that fail as soon as anything is asked of them."""
    function, owner = FUNCTIONS[name]
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.name != "self"]
    arguments: list[object] = [object() for p in required if p.kind is not p.KEYWORD_ONLY]
    if owner is not None:
        arguments.insert(0, owner.__new__(owner))
    function(*arguments, **{p.name: object() for p in required if p.kind is p.KEYWORD_ONLY})


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("off", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("as_decorator", [False, True], ids=["context", "decorator"])
def test_every_entry_refuses_without_autograd_before_touching_an_argument(
    name: str, off: Callable[[], Any], as_decorator: bool
) -> None:
    if as_decorator:
        with pytest.raises(GradContextError, match=name) as caught:
            off()(call_with_nonsense)(name)
    else:
        with off(), pytest.raises(GradContextError, match=name) as caught:
            call_with_nonsense(name)
    assert isinstance(caught.value, RuntimeError)
    assert ("inference_mode" if off is torch.inference_mode else "no_grad") in str(caught.value)
    assert "What to do" in str(caught.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_with_autograd_nonsense_fails_for_another_reason(name: str) -> None:
    """Otherwise the test above would pass for functions that always raise."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever the nonsense runs into)
        call_with_nonsense(name)
    assert not isinstance(caught.value, GradContextError)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_check_is_the_first_statement(name: str) -> None:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(FUNCTIONS[name][0]))).body
    assert isinstance(definition, ast.FunctionDef)
    first = next(s for s in definition.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)))
    assert ast.unparse(first).lstrip("_").startswith(("assert_grad_context(", "self._assert_grad_context("))


@pytest.fixture(scope="module")
def case() -> Case:
    return lora_case()


def tensors_of(rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """Its fields that are tensors (not what it caches)."""
    fields = {field.name: getattr(rollouts, field.name) for field in dataclasses.fields(rollouts)}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def rollouts_from_inference_tensors() -> Rollouts:
    with torch.inference_mode():
        stale = {name: value.clone() for name, value in tensors_of(make_rollouts()).items()}
        assert all(value.is_inference() for value in stale.values())
    return Rollouts(**stale, temperature=1.0, top_p=1.0)


def rollouts_built_in_inference_mode() -> Rollouts:
    with torch.inference_mode():
        rollouts = make_rollouts()
        rollouts.prompt_index, rollouts.response_lengths  # noqa: B018 (both are cached on first use)
        return rollouts


@pytest.mark.parametrize("make", [rollouts_from_inference_tensors, rollouts_built_in_inference_mode])
@pytest.mark.parametrize("alpha", [False, True], ids=["per_prompt", "alpha"])
def test_inference_mode_rollouts_give_the_same_bits(case: Case, make: Callable[[], Rollouts], alpha: bool) -> None:
    probe = case.probe(conditional_variance="alpha" if alpha else "per_prompt")
    other = make_rollouts((2, 2), seed=8)
    expected = probe.run_mixed_probe(entropy_rollouts=other, update_rollouts=make_rollouts())
    found = probe.run_mixed_probe(entropy_rollouts=other, update_rollouts=make())
    assert found.delta_h1 == expected.delta_h1
    assert found.std_error == expected.std_error
    assert (
        probe.run_mixed_probe(entropy_rollouts=make(), update_rollouts=other).delta_h1
        == probe.run_mixed_probe(entropy_rollouts=make_rollouts(), update_rollouts=other).delta_h1
    )
    of_one = case.probe()  # the alpha trick is about two batches
    assert of_one.compute_delta_h1(make()).delta_h1 == of_one.compute_delta_h1(make_rollouts()).delta_h1


@pytest.mark.parametrize("make", [rollouts_from_inference_tensors, rollouts_built_in_inference_mode])
def test_no_inference_tensor_reaches_the_engine(
    case: Case, make: Callable[[], Rollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Rollouts] = []
    whole = ProbeComponents.same_batch

    def spy(self: ProbeComponents, rollouts: Rollouts) -> Any:
        seen.append(rollouts)
        return whole(self, rollouts)

    monkeypatch.setattr(ProbeComponents, "same_batch", spy)
    case.probe().compute_delta_h1(make())
    for name, tensor in tensors_of(seen[0]).items():
        assert not tensor.is_inference(), name


def test_what_rollouts_cache_can_be_saved_for_backward() -> None:
    rollouts = rollouts_built_in_inference_mode()
    assert not rollouts.prompt_index.is_inference()
    assert not rollouts.response_lengths.is_inference()


def test_parameters_made_in_inference_mode_are_named() -> None:
    with torch.inference_mode():
        base = build_model()
    adapted = add_lora(base)
    optimizer = stepped_adamw(adapted)
    with pytest.raises(ModelStateError, match="inference_mode") as caught:
        OfflineEntropyProbe(adapted, optimizer)
    stale = [name for name, p in adapted.named_parameters() if p.is_inference()]
    assert f"'{stale[0]}'" in str(caught.value)
