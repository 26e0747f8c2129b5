"""One of several processes that probe a DistributedDataParallel model; started by tests/test_distributed.py.

Usage: python distributed_probe.py RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from probe_models.architectures import add_lora, build_model
from probe_models.batches import make_rollouts
from probe_models.cases import case_of
from probe_options import options_of
from torch.nn.parallel import DistributedDataParallel

from entropy_fast import OfflineEntropyProbe


def numbers(probe: OfflineEntropyProbe, rank: int) -> list[float]:
    own = make_rollouts(
        (2, 3, 2) if rank == 0 else (3, 2, 2, 2), seed=40 + rank
    )  # not even the number of passes agrees
    other = make_rollouts((2, 2), seed=50 + rank)
    results = [probe.run_mixed_probe(entropy_rollouts=other, update_rollouts=own)]
    if probe.context.run.conditional_variance != "alpha":  # which is about two batches
        results.insert(0, probe.compute_delta_h1(own))
    return [number for found in results for number in (found.delta_h1, found.std_error)]


def main(rank: int, world: int, rendezvous: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    case = case_of(add_lora(build_model()))
    found: dict[str, object] = {}
    found["unwrapped"] = numbers(case.probe(), rank)
    found["one_pass_unwrapped"] = numbers(
        OfflineEntropyProbe(case.model, case.optimizer, **options_of(engine="one_pass")), rank
    )

    reductions = 0

    def count(state, bucket):  # no annotations: torch compares them, and here they would be strings
        nonlocal reductions
        reductions += 1
        whole = bucket.buffer() / world
        return dist.all_reduce(whole, async_op=True).get_future().then(lambda done: done.value()[0])

    wrapped = DistributedDataParallel(case.model)
    wrapped.register_comm_hook(None, count)
    during: set[bool] = set()

    def look(stage: str, done: int, total: int) -> None:
        if stage in ("entropy", "update", "entropy and update"):  # reported from inside the pass
            during.add(wrapped.require_backward_grad_sync)

    probe = OfflineEntropyProbe(wrapped, case.optimizer, on_progress=look, **options_of(engine="two_pass"))
    found["wrapped"] = numbers(probe, rank)
    alpha = OfflineEntropyProbe(wrapped, case.optimizer, **options_of(conditional_variance="alpha"))
    found["alpha"] = numbers(alpha, rank)
    one_pass = OfflineEntropyProbe(wrapped, case.optimizer, on_progress=look, **options_of(engine="one_pass"))
    found["one_pass"] = numbers(one_pass, rank)
    found["reductions_in_probe"] = reductions
    if rank == 0:  # a probe by one rank alone must not wait for the others
        numbers(probe, rank)
        numbers(one_pass, rank)

    found["sync_flags_in_probe"] = sorted(during)
    found["sync_flag"] = wrapped.require_backward_grad_sync
    batch = make_rollouts(seed=60 + rank)
    logits = wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.log_softmax(logits, -1)[..., 3].sum().backward()
    found["reductions_in_training"] = reductions
    gradient = next(p.grad for n, p in case.model.named_parameters() if "lora_B" in n)
    assert gradient is not None
    everyone = [torch.empty_like(gradient) for _ in range(world)]
    dist.all_gather(everyone, gradient)
    found["gradients_agree"] = all(bool(torch.equal(everyone[0], g)) for g in everyone)
    # And between a training step and the next: still no reduction by the probe.
    found["wrapped_after_training"] = numbers(probe, rank)
    found["one_pass_after_training"] = numbers(one_pass, rank)
    found["reductions_at_the_end"] = reductions
    Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
