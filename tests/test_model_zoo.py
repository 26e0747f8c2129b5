"""The probe against the definition, model family by model family.

The oracle takes one unpadded sequence at a time; the probe gets the same sequences left-padded, in ragged and interleaved
groups. So padding, positions, masks, sliding windows, microbatches and wrappers are all in the comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_sums import median_error, ratio_of
from probe_models.architectures import (
    BUILDERS,
    add_lora,
    build_model,
    disable_checkpointing,
    enable_checkpointing,
    quantize_nf4,
    stepped_adamw,
)
from probe_models.batches import make_samples, pack
from probe_models.cases import Case, case_of
from probe_models.oracle import Kernel, kernel_by_definition
from probe_options import options_of
from torch import nn

from entropy_fast import fast_delta_h1

FAMILIES = tuple(BUILDERS)


def definition(case: Case, model: nn.Module | None = None, **options: Any) -> Kernel:
    """The oracle's kernel; ``model`` may be another precision of the case's own, with the same optimizer state."""
    if model is None:
        return kernel_by_definition(case.model, case.optimizer, case.samples, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.load_state_dict(case.optimizer.state_dict())
    return kernel_by_definition(model, optimizer, case.samples, **options)


def assert_matches(case: Case, expected: Kernel, tolerance: float, **options: Any) -> None:
    result = case.probe(full_kernel=True, **options).compute_delta_h1(case.rollouts)
    assert result.kernel is not None
    scale = float(expected.matrix.abs().max())
    torch.testing.assert_close(result.kernel, expected.matrix, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(result.row_sums, expected.matrix.sum(1), rtol=0, atol=3 * tolerance * scale)
    torch.testing.assert_close(result.column_sums, expected.matrix.sum(0), rtol=0, atol=3 * tolerance * scale)
    assert result.diagonal is not None
    torch.testing.assert_close(result.diagonal, expected.matrix.diagonal(), rtol=0, atol=tolerance * scale)
    assert result.delta_h1 == pytest.approx(expected.same_batch, abs=3 * tolerance * scale * expected.learning_rate)
    scored = result.sequences["entropy"].sequence_logprobs.tolist()
    assert scored == pytest.approx([expected.sequence_logprobs[s] for s in case.samples], rel=10 * tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(family: str) -> None:
    case = case_of(build_model(family))
    assert_matches(case, definition(case), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 3])
def test_lora(family: str, size: int) -> None:
    case = case_of(add_lora(build_model(family)))
    expected = definition(case)
    # LoRA's B away from zero: otherwise half of the gradients vanish and nothing below would notice their absence.
    for gradient, parameter in zip(expected.x_gradients[0], case.probe().context.registry.parameters, strict=True):
        assert bool((gradient != 0).any()), parameter.name
    assert_matches(case, expected, 1e-5, prompts_per_microbatch=size)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_batches(family: str) -> None:
    case = case_of(add_lora(build_model(family)))
    update = make_samples((2, 4), seed=31)
    expected = kernel_by_definition(case.model, case.optimizer, case.samples, update)
    result = fast_delta_h1(case.model, case.optimizer, pack(update), entropy_rollouts=case.rollouts, **options_of())
    scale = float(expected.matrix.abs().max())
    torch.testing.assert_close(result.row_sums, expected.matrix.sum(1), rtol=0, atol=3e-5 * scale)
    torch.testing.assert_close(result.column_sums, expected.matrix.sum(0), rtol=0, atol=3e-5 * scale)
    assert result.delta_h1 == pytest.approx(expected.two_batch, abs=3e-5 * scale * expected.learning_rate)
    projections = expected.matrix.mean(1)
    conditional = float((projections.var() / len(projections)).sqrt()) * expected.learning_rate
    assert result.std_error == pytest.approx(conditional, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_in_fp64(family: str) -> None:
    """A fully masked query row would be NaN here. Several families compute norms or rotations in fp32 all the same."""
    case = case_of(build_model(family, dtype=torch.float64, attention="eager"))
    result = case.probe().compute_delta_h1(case.rollouts)
    assert not result.sequences["entropy"].sequence_logprobs.isnan().any()
    assert_matches(case, definition(case), 1e-12 if family == "gpt2" else 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    case = case_of(add_lora(build_model(family)))
    expected = definition(case)
    enable_checkpointing(case.model, reentrant=reentrant)
    case.model.eval()  # where transformers itself would not checkpoint
    assert_matches(case, expected, 1e-5, prompts_per_microbatch=2)
    disable_checkpointing(case.model)


def errors_of(build: Callable[[str], nn.Module], options: dict[str, Any]) -> dict[str, list[float]]:
    """Of the probe and of the plain loop in the same precision, against fp32 with the same weights; twice eight prompts."""
    errors: dict[str, list[float]] = {"probe": [], "plain": []}
    for family in FAMILIES:
        model = build(family)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        optimizer = stepped_adamw(model)
        for seed in range(2):
            samples = make_samples((2, 3, 2, 2, 2, 2, 3, 2), seed=seed)
            case = Case(model, optimizer, samples, pack(samples))
            truth = definition(case, copy.deepcopy(model).float()).matrix
            plain = definition(case, autocast=options.get("autocast_dtype"))
            result = case.probe(full_kernel=True, **options).compute_delta_h1(case.rollouts)
            assert result.kernel is not None
            errors["probe"].append(median_error(result.kernel, truth))
            errors["plain"].append(median_error(plain.matrix, truth))
    # It really ran in 16 bits.
    assert min(errors["plain"]) > 1e-6 and max(errors["plain"]) < 0.1
    return errors


# Logarithms of such ratios spread by less than 0.25 over draws (0.17 and 0.24 in 18): 1.5 for two draws of nine families is
# more than six standard errors away.
@pytest.mark.exhaustive
def test_lora_over_a_bf16_base() -> None:
    errors = errors_of(lambda family: add_lora(build_model(family, dtype=torch.bfloat16)), {})
    assert ratio_of(errors) <= 1.5, errors


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [3, 1])
def test_bf16_autocast(size: int) -> None:
    options = {"autocast_dtype": torch.bfloat16, "prompts_per_microbatch": size}
    errors = errors_of(lambda family: add_lora(build_model(family)), options)
    assert ratio_of(errors) <= 1.5, errors


def test_the_caller_s_own_autocast_is_left_alone() -> None:
    case = case_of(add_lora(build_model()))
    by_option = case.probe(autocast_dtype=torch.bfloat16).compute_delta_h1(case.rollouts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_caller = case.probe().compute_delta_h1(case.rollouts)
    assert by_caller.delta_h1 == pytest.approx(by_option.delta_h1, rel=1e-2)
    assert by_caller.delta_h1 != case.probe().compute_delta_h1(case.rollouts).delta_h1


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "opt"])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
def test_lora_over_a_4_bit_base(family: str, reentrant: bool | None) -> None:
    case = case_of(add_lora(quantize_nf4(build_model(family))))
    kinds = {type(m).__name__ for m in case.model.modules()}
    assert "Linear4bit" in kinds
    expected = definition(case)
    if reentrant is not None:
        enable_checkpointing(case.model, reentrant=reentrant)
    assert_matches(case, expected, 1e-5, prompts_per_microbatch=2)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_padding_of_the_batch_does_not_matter(family: str) -> None:
    """Wider padding on either side: bit for bit the same."""
    case = case_of(add_lora(build_model(family)))
    expected = case.probe().compute_delta_h1(case.rollouts)
    fields = {}
    for name, fill in (("input_ids", 7), ("attention_mask", 0), ("loss_mask", 0)):
        fields[name] = nn.functional.pad(getattr(case.rollouts, name), (5, 3), value=fill)
    found = case.probe().compute_delta_h1(pack(case.samples, **fields))
    assert found.delta_h1 == expected.delta_h1
    assert torch.equal(found.row_sums, expected.row_sums)
