"""What a probe costs, in units of one plain training forward and backward over the same rollouts.

Run from the repository root: ``python -m benchmarks.probe_cost`` (seconds on a CPU). The engines are timed interleaved in one
process; medians are printed. An engine whose kernel sums contradict each other gets no speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from entropy_fast import ProbeConfig, Rollouts, fast_delta_h1
from entropy_fast.probe.front_door import Engine
from entropy_fast.probe.result import DeltaH1Result
from entropy_fast.teacher_forcing import align_logprobs, model_logits, pack_rows

TOLERANCE = 1e-4  # relative, fp32: sums of K taken in different orders


def model_and_optimizer(vocabulary: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small Qwen2 with a stepped LoRA."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = get_peft_model(
        Qwen2ForCausalLM(config), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(3):
        ids = torch.randint(vocabulary, (2, 32))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def random_rollouts(vocabulary: int, prompts: int, responses: int, length: int) -> Rollouts:
    """Prompts and responses of ``length`` random tokens each."""
    shared = torch.randint(vocabulary, (prompts, 1, length)).expand(-1, responses, -1)
    ids = torch.cat([shared, torch.randint(vocabulary, (prompts, responses, length))], -1)
    return Rollouts.from_dict(
        {
            "sequences": ids,
            "attention_masks": torch.ones_like(ids),
            "prompt_lens": torch.full((prompts,), length),
            "advantages": torch.randn(prompts, responses),
            "max_lengths": torch.full((prompts,), length),
            "temperature": 1.0,
            "top_p": 1.0,
        }
    )


def plain_step(model: nn.Module, rollouts: Rollouts) -> None:
    """The forward and backward of the update itself, one prompt at a time."""
    for prompt in range(rollouts.n_prompts):
        batch = pack_rows(rollouts, rollouts.rows_of_prompt(prompt), torch.device("cpu"))
        align_logprobs(model_logits(model, batch), batch).sequence_logprobs.sum().backward()
    model.zero_grad(set_to_none=True)


def contradiction(result: DeltaH1Result) -> str | None:
    """What is wrong with the result, None when its sums agree."""
    scale = float(result.row_sums.abs().sum())
    for name, total in (("row", float(result.row_sums.sum())), ("column", float(result.column_sums.sum()))):
        if not abs(total - result.x_dot_y) <= TOLERANCE * scale:
            return f"{name} sums add up to {total}, X_sum·Y_sum is {result.x_dot_y}"
    return None


def disagreement(result: DeltaH1Result, expected: DeltaH1Result) -> str | None:
    """How far the result's sums are from those of the reference engine, None when they agree."""
    for name in ("diagonal", "row_sums", "column_sums"):
        found, truth = getattr(result, name), getattr(expected, name)
        if not float((found - truth).norm()) <= TOLERANCE * float(truth.norm()):
            return f"{name} are off by {float((found - truth).norm() / truth.norm()):.2g} relative"
    return None


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--responses", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    model, optimizer = model_and_optimizer(options.vocabulary)
    rollouts = random_rollouts(options.vocabulary, options.prompts, options.responses, options.length)
    config = ProbeConfig()
    engines: tuple[Engine, ...] = ("two_pass", "one_pass")

    def run(engine: Engine) -> DeltaH1Result:
        return fast_delta_h1(model, optimizer, rollouts, engine=engine, config=config)

    results = {engine: run(engine) for engine in engines}
    for engine, result in results.items():
        problem = contradiction(result) or disagreement(result, results["two_pass"])
        if problem is not None:
            print(f"{engine}: wrong result, no speed: {problem}", file=sys.stderr)
            return 1
    times: dict[str, list[float]] = {"plain step": [], **{engine: [] for engine in engines}}
    for _ in range(options.repeat):
        times["plain step"].append(seconds(lambda: plain_step(model, rollouts)))
        for engine in engines:
            times[engine].append(seconds(lambda engine=engine: run(engine)))  # type: ignore[misc]
    step = statistics.median(times["plain step"])
    print(f"{'':12}{'seconds':>10}{'plain steps':>14}")
    for name, measured in times.items():
        cost = statistics.median(measured)
        print(f"{name:12}{cost:10.3f}{cost / step:14.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
