"""One probe at a time, and interrupts that leave nothing half done."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from probe_models.batches import make_rollouts
from probe_models.cases import Case, estimate_of, lora_case
from probe_models.snapshot import assert_unchanged, take_snapshot
from probe_options import options_of

from entropy_fast import OfflineEntropyProbe, fast_delta_h1
from entropy_fast.checks.exclusive import undivided
from entropy_fast.errors import ModelStateError


@pytest.fixture
def case() -> Case:
    return lora_case()


def logits(case: Case) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = case.model(input_ids=case.rollouts.input_ids[:2]).logits
    return found


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_a_second_probe_waits_and_the_model_stays_whole(case: Case, engine: str) -> None:
    expected = fast_delta_h1(case.model, case.optimizer, case.rollouts, **options_of(engine=engine)).delta_h1
    before = logits(case)
    found: list[float] = []
    inside, both = threading.Event(), threading.Event()

    def probe(first: bool) -> None:
        def look(*_: object) -> None:
            # The first is in the middle of a probe when the second begins.
            if first and not inside.is_set():
                inside.set()
                both.wait(10)

        result = fast_delta_h1(case.model, case.optimizer, case.rollouts, on_progress=look, **options_of(engine=engine))
        found.append(result.delta_h1)

    threads = [threading.Thread(target=probe, args=(first,)) for first in (True, False)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    both.set()
    for thread in threads:
        thread.join(60)
    assert found == [expected, expected]
    torch.testing.assert_close(logits(case), before, rtol=0, atol=0)


def test_a_second_probe_is_refused_where_that_is_asked_for(case: Case) -> None:
    inside, done = threading.Event(), threading.Event()

    def look(*_: object) -> None:
        inside.set()
        done.wait(10)

    first = threading.Thread(
        target=fast_delta_h1, args=(case.model, case.optimizer, case.rollouts), kwargs={"on_progress": look}
    )
    first.start()
    assert inside.wait(60)
    other = lora_case("gpt2")
    try:
        with pytest.raises(ModelStateError, match="another probe is running"):
            fast_delta_h1(other.model, other.optimizer, other.rollouts, **options_of(when_busy="refuse"))
    finally:
        done.set()
        first.join(60)
    fast_delta_h1(other.model, other.optimizer, other.rollouts, **options_of(when_busy="refuse"))


def test_a_probe_within_a_probe_is_refused(case: Case) -> None:
    other = lora_case("gpt2")

    def start_another(*_: object) -> None:
        fast_delta_h1(other.model, other.optimizer, other.rollouts)

    with pytest.raises(ModelStateError, match="from within a probe"):
        fast_delta_h1(case.model, case.optimizer, case.rollouts, on_progress=start_another)
    fast_delta_h1(case.model, case.optimizer, case.rollouts)


@pytest.mark.parametrize("engine", ["one_pass", "two_pass", "jvp"])
@pytest.mark.parametrize("calls", [0, 1, 7])
def test_an_interrupt_in_the_middle_of_a_forward_waits_for_a_safe_moment(case: Case, engine: str, calls: int) -> None:
    entropy = make_rollouts((2, 2, 3), seed=9) if engine == "jvp" else None
    probe = OfflineEntropyProbe(case.model, case.optimizer, **options_of(engine=engine, prompts_per_microbatch=1))
    norm = next(module for name, module in case.model.named_modules() if name.endswith("input_layernorm"))
    seen = []

    def interrupt(*_: object) -> None:
        seen.append(None)
        if len(seen) == calls + 1:
            signal.raise_signal(signal.SIGINT)

    handler, before = signal.getsignal(signal.SIGINT), take_snapshot(case.model, case.optimizer)
    handle = norm.register_forward_hook(interrupt)
    try:
        batches = [case.rollouts] if entropy is None else [entropy, case.rollouts]
        with pytest.raises(KeyboardInterrupt):
            estimate_of(probe, *batches)
    finally:
        handle.remove()
    assert len(seen) > calls
    assert signal.getsignal(signal.SIGINT) is handler
    assert_unchanged(before, case.model, case.optimizer)


def test_who_insists_is_heard_at_once(case: Case) -> None:
    norm = next(module for name, module in case.model.named_modules() if name.endswith("input_layernorm"))
    after = []

    def insist(*_: object) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        after.append(None)

    handle = norm.register_forward_hook(insist)
    with pytest.raises(KeyboardInterrupt):
        fast_delta_h1(case.model, case.optimizer, case.rollouts)
    handle.remove()
    assert not after


def test_an_interrupt_in_lines_that_belong_together_comes_after_them() -> None:
    done = []

    def interrupted() -> None:
        with undivided():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")
        done.append("and more")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["all of it"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with undivided():
        pass
