"""The model, its optimizer and the process are given back as they were, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_models.architectures import add_lora, build_model, enable_checkpointing, quantize_nf4
from probe_models.batches import make_rollouts
from probe_models.cases import Case, case_of
from probe_models.snapshot import assert_unchanged, take_snapshot
from probe_options import options_of
from torch import nn

from entropy_fast import OfflineEntropyProbe
from entropy_fast.engines import engine_kinds

ENGINES = [kind.name for kind in engine_kinds()]
ROUTES: dict[str, tuple[int, dict[str, Any]]] = {
    "same_batch": (1, {}),
    "autograd_grad": (1, {"y_pass": "autograd_grad"}),
    "two_batch": (2, {}),
    "alpha": (2, {"conditional_variance": "alpha"}),
}


def lived_in_case(family: str, *, checkpointing: bool, quantized: bool = False) -> Case:
    """A model in the middle of training: dropout on, some blocks in eval(), gradients lying about."""
    base = build_model(family, dropout=0.3)
    model = add_lora(quantize_nf4(base) if quantized else base, dropout=0.3)
    if checkpointing:
        enable_checkpointing(model, reentrant=False)
    case = case_of(model)
    layers = [m for n, m in model.named_modules() if n.endswith((".layers.1", ".h.1"))]
    assert len(layers) == 1
    layers[0].eval()
    if quantized:
        # On CPUs with AVX-512 BF16 bitsandbytes re-packs weights for inference on the first call in eval(); have it do so
        # here too. The model itself has not been called in eval() yet.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True
        model.eval()
    model.register_buffer("statistic", torch.arange(3.0))
    # Forwards that draw random numbers exist (noise on embeddings, say): the process's stream must not notice.
    model.get_input_embeddings().register_forward_pre_hook(lambda module, arguments: torch.rand(1) and None)
    for index, parameter in enumerate(model.parameters()):
        if parameter.is_floating_point() and index % 3:  # frozen ones too, and some without
            parameter.grad = torch.full_like(parameter, 0.5 + index)
    return case


def run(case: Case, route: str, on_progress: Callable[[str, int, int], None] | None = None) -> None:
    batches, options = ROUTES.get(route, (2, {}))
    probe = OfflineEntropyProbe(
        case.model,
        case.optimizer,
        on_progress=on_progress,
        **options_of(engine=route if route in ENGINES else "two_pass", **options),
    )
    if batches == 1:
        probe.compute_delta_h1(case.rollouts)
    else:
        probe.run_mixed_probe(entropy_rollouts=make_rollouts((2, 2, 2), seed=9), update_rollouts=case.rollouts)


@pytest.mark.parametrize("route", [*ROUTES, "jvp"])
@pytest.mark.parametrize(
    ("family", "checkpointing", "quantized"),
    [
        ("qwen2", False, False),
        ("qwen2", True, False),
        ("gpt2", True, False),
        ("opt", True, False),
        ("qwen2", False, True),
    ],
)
def test_after_success(route: str, family: str, checkpointing: bool, quantized: bool) -> None:
    case = lived_in_case(family, checkpointing=checkpointing, quantized=quantized)
    before = take_snapshot(case.model, case.optimizer)
    run(case, route)
    assert_unchanged(before, case.model, case.optimizer)


@pytest.mark.parametrize(("route", "k"), [(route, k) for route in ROUTES for k in (1, 9)] + [("jvp", 5), ("jvp", 7)])
def test_after_the_forward_raises_at_the_kth_call(route: str, k: int) -> None:
    case = lived_in_case("qwen2", checkpointing=True)
    calls = 0

    def fail(module: nn.Module, arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == k:
            raise RuntimeError("out of memory, say")

    case.model.get_output_embeddings().register_forward_pre_hook(fail)
    before = take_snapshot(case.model, case.optimizer)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        run(case, route)
    assert calls == k
    assert_unchanged(before, case.model, case.optimizer)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("k", [1, 7])
def test_after_the_callback_raises(route: str, error: type[BaseException], k: int) -> None:
    case = lived_in_case("qwen2", checkpointing=False)
    before = take_snapshot(case.model, case.optimizer)
    calls = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == k:
            raise error

    with pytest.raises(error):
        run(case, route, stop)
    assert calls == k
    assert_unchanged(before, case.model, case.optimizer)


def test_after_an_interrupt_inside_backward() -> None:
    case = lived_in_case("qwen2", checkpointing=False)
    parameter = next(p for n, p in case.model.named_parameters() if "lora_B" in n)

    def interrupt(gradient: torch.Tensor) -> None:
        raise KeyboardInterrupt

    parameter.register_hook(interrupt)
    before = take_snapshot(case.model, case.optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(case, "same_batch")
    assert_unchanged(before, case.model, case.optimizer)


def test_attention_switches_of_the_process_are_put_back() -> None:
    case = lived_in_case("qwen2", checkpointing=False)
    cuda = torch.backends.cuda

    def switches() -> tuple[bool, ...]:
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    before = switches()
    seen = []
    case.model.get_output_embeddings().register_forward_pre_hook(lambda module, arguments: seen.append(switches()))
    run(case, "alpha")
    assert (False, False, True) in seen
    assert switches() == before


def test_the_probe_result_does_not_depend_on_what_the_model_was_left_in() -> None:
    """Flags, gradients and dropout of the user's model: the number is the same."""
    expected = case_of(add_lora(build_model("gpt2")))
    reference = expected.probe().compute_delta_h1(expected.rollouts)
    case = lived_in_case("gpt2", checkpointing=False)
    assert case.probe().compute_delta_h1(case.rollouts).delta_h1 == reference.delta_h1
    case.model.eval()
    assert case.probe().compute_delta_h1(case.rollouts).delta_h1 == reference.delta_h1
