"""Bytes, memory and work of every rank of a probe by several processes, beside the formulas of docs/scaling.md.

    python -m benchmarks.scaling            # 1, 2 and 4 processes on this machine's CPU; minutes
    python -m benchmarks.scaling --json scaling.json

Legend: R ranks, f = (R - 1)/R, B prompts, n those of a rank, N rows of T columns, P trainable elements in t tensors, F
functional and U update columns, C = F + U, p parts of the step that are measured along it. Where FSDP2 shards the model: W its
elements, M those of the matrices of its L layers, m microbatches of a rank and b backwards of each.

What a rank sends is counted twice: by the sizes of the tensors that it gives to torch.distributed, times what the operation's
algorithm makes of them (a ring sums in 2 f times the size), and by what the kernel says that the process has written (``wchar``
in /proc/self/io, where everything gloo sends is in).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import OPTConfig, OPTForCausalLM

from entropy_fast import EstimateOptions, Rollouts, RunOptions, fast_delta_h1
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.sharded.forms import Form, dealt_forms

ALLOWED = 0.05  # relative difference of bytes from the formulas
VOCABULARY, TOKENS, RESPONSES = 512, 48, 4
TRIALS = 2  # forwards of a few sequences before the first sweep
NUMBER = 8  # bytes of a number that is not a gradient's element


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is probed.

    Attributes:
        name: in words.
        lora: rank of the adapters; None for full fine-tuning.
        prompts: B; None for 4 a rank (weak scaling).
        keeps: whether every unit's gradients are kept, and the kernel K with them.
        sharded: whether FSDP2 shards the model, layer by layer.
    """

    name: str
    lora: int | None
    prompts: int | None
    keeps: bool
    sharded: bool = False

    def model(self) -> nn.Module:
        """In fp32, the same on all ranks."""
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            word_embed_proj_dim=128,
            ffn_dim=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=1,
        )
        base = OPTForCausalLM(config)
        if self.lora is None:
            return base
        return get_peft_model(base, LoraConfig(r=self.lora, target_modules="all-linear", init_lora_weights=False))

    def layers(self, model: Any) -> Any:
        """Of such a model."""
        return (model if self.lora is None else model.get_base_model()).model.decoder.layers

    def shard(self, model: nn.Module) -> None:
        """As a training script would, where it is to be."""
        if self.sharded:
            for layer in self.layers(model):
                fully_shard(layer)
            fully_shard(model)

    def rollouts(self, ranks: int) -> Rollouts:
        """B prompts of as many tokens each, the same on all ranks."""
        prompts = self.prompts or 4 * ranks
        generator = torch.Generator().manual_seed(1)
        rows = prompts * RESPONSES
        ids = torch.randint(2, VOCABULARY, (prompts, 1, TOKENS), generator=generator).repeat(1, RESPONSES, 1)
        ids = ids.view(rows, TOKENS)
        ids[:, TOKENS // 2 :] = torch.randint(2, VOCABULARY, (rows, TOKENS - TOKENS // 2), generator=generator)
        mask = torch.ones_like(ids)
        loss = mask.clone()
        loss[:, : TOKENS // 2] = 0
        groups = torch.arange(prompts).repeat_interleave(RESPONSES)
        return Rollouts(ids, mask, loss, groups, advantages=torch.randn(rows, generator=generator), max_lengths=TOKENS)


WORKLOADS = (
    Workload("LoRA, kernel kept, 16 prompts", 16, 16, True),
    Workload("LoRA, second sweep, 16 prompts", 16, 16, False),
    Workload("full, kernel kept, 16 prompts", None, 16, True),
    Workload("LoRA, kernel kept, 4 prompts a rank", 16, None, True),
    Workload("full, sharded, kernel kept, 16 prompts", None, 16, True, sharded=True),
    Workload("full, sharded, second sweep, 16 prompts", None, 16, False, sharded=True),
    Workload("LoRA, sharded, kernel kept, 16 prompts", 16, 16, True, sharded=True),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the formulas are of; see the legend."""

    ranks: int
    prompts: int
    own: int
    rows: int
    columns: int
    elements: int
    tensors: int
    functionals: int
    updates: int
    parts: int
    width: int
    keeps: bool
    kept: int
    microbatches: int
    backwards: int
    layers: int
    in_layers: int
    elsewhere: int
    vectors: int
    tied: int
    sharded: bool


def predicted(sizes: Sizes) -> dict[str, float]:
    """Bytes that a rank sends, by what for (docs/scaling.md)."""
    f, pairs = (sizes.ranks - 1) / sizes.ranks, sizes.functionals * sizes.updates
    columns = sizes.functionals + sizes.updates
    found = {
        "scores": 2 * f * 2 * NUMBER * sizes.rows * sizes.columns,
        "tables of sequences": 2 * f * (2 + columns) * NUMBER * sizes.rows,
        "rows along the step": 2 * f * pairs * sizes.parts * NUMBER * sizes.tensors * sizes.prompts,
        "flags and checks": 2 * f * columns * NUMBER * sizes.tensors,
    }
    if sizes.sharded:
        of_model = _of_shards(sizes)
        gradients = sizes.own if sizes.keeps else sizes.microbatches + sizes.own
        handed_over = sizes.elements + sizes.tied
        found |= of_model | {"gradients of units": gradients * f * columns * sizes.width * handed_over}
    else:
        found["gradient sums"] = 2 * f * columns * sizes.width * sizes.elements
    if sizes.keeps:
        exchanged = 0 if sizes.sharded else f * columns * sizes.width * sizes.own * sizes.elements
        found["influence kernel"] = exchanged + 2 * f * pairs * NUMBER * (sizes.prompts**2 + sizes.tensors)
    else:
        found["products of units"] = 2 * f * pairs * NUMBER * (3 * sizes.prompts + sizes.tensors)
    return found


def _of_shards(sizes: Sizes) -> dict[str, float]:
    """What is gathered of a model that is sharded: layers come anew but for the two that were run last."""
    f, sweeps, layers = (sizes.ranks - 1) / sizes.ranks, 1 if sizes.keeps else 2, sizes.layers
    without_graph = (TRIALS + sizes.microbatches) * layers
    gathers = without_graph + sweeps * sizes.microbatches * ((sizes.backwards + 1) * layers - 4) + 2
    return {
        "layers": gathers * f * sizes.width * sizes.in_layers / layers,
        # With values and both moments of vectors, of which FSDP2 has given every rank a part and one rank keeps all.
        "once": f * sizes.width * (sizes.elsewhere + 3 * sizes.vectors),
    }


@contextlib.contextmanager
def counted(ranks: int) -> Iterator[dict[str, float]]:
    """Bytes that this rank gives to collective operations, by operation, as their algorithms send them."""
    found: dict[str, float] = {"sum": 0.0, "exchange": 0.0, "gather": 0.0}
    share = (ranks - 1) / ranks
    before = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather", "broadcast")}

    def wrap(name: str, kind: str, factor: float, tensor: Callable[..., Tensor]) -> None:
        def operation(*arguments: Any, **options: Any) -> Any:
            own = tensor(*arguments)
            found[kind] += factor * own.numel() * own.element_size()
            return before[name](*arguments, **options)

        setattr(dist, name, operation)

    wrap("all_reduce", "sum", 2 * share, lambda tensor, *_: tensor)
    wrap("all_to_all_single", "exchange", share, lambda _, send, *__: send)
    wrap("all_gather", "gather", ranks - 1, lambda _, own, *__: own)
    wrap("broadcast", "gather", 1, lambda tensor, *_: tensor)
    try:
        yield found
    finally:
        for name, operation in before.items():
            setattr(dist, name, operation)


def written() -> int:
    """Bytes that this process has written so far, to files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def sizes_of(result: DeltaH1Result, model: nn.Module, batch: Rollouts, workload: Workload, ranks: int) -> Sizes:
    trained = [p for p in model.parameters() if p.requires_grad]
    layers, plan = workload.layers(model), result.diagnostics.plan
    in_layers = [p for p in layers.parameters() if p.dim() > 1]
    forms = dealt_forms([Form("", p.shape, p.dtype, 0) for p in trained], ranks)
    kept = [sum(form.elements(rank) for form in forms) for rank in range(ranks)]
    lent = {id(p) for p in in_layers}
    assert result.split is not None
    return Sizes(
        ranks=ranks,
        prompts=batch.n_prompts,
        own=-(-batch.n_prompts // ranks),
        rows=batch.n_sequences,
        columns=batch.input_ids.shape[1],
        elements=sum(p.numel() for p in trained),
        tensors=len(trained),
        functionals=2,  # the whole and its direct part
        updates=1,
        parts=3,  # momentum, decay and scale; the fresh part is the kernel's
        width=4,
        keeps=workload.keeps,
        kept=max(kept) if workload.sharded and ranks > 1 else sum(kept),
        microbatches=plan.microbatches,  # type: ignore[attr-defined]
        backwards=plan.backwards,  # type: ignore[attr-defined]
        layers=len(layers),
        in_layers=sum(p.numel() for p in in_layers),
        elsewhere=sum(p.numel() for p in model.parameters() if id(p) not in lent),
        tied=sum(p.numel() for p in trained if p is model.get_output_embeddings().weight),  # type: ignore[operator]
        vectors=sum(p.numel() for p in trained if p.dim() == 1),
        sharded=workload.sharded,
    )


def probe(workload: Workload, rank: int, ranks: int) -> dict[str, Any]:
    """One probe by all ranks after one to warm up, as this rank sees it."""
    model, batch = workload.model(), workload.rollouts(ranks)
    workload.shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model(input_ids=batch.input_ids[:4], attention_mask=batch.attention_mask[:4]).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    budget = "4GiB" if workload.keeps else 0
    run = RunOptions(ranks="all" if ranks > 1 or workload.sharded else "own", rank_timeout=120, memory_budget=budget)

    def once() -> DeltaH1Result:
        return fast_delta_h1(model, optimizer, batch, estimate=EstimateOptions(step="next"), run=run)

    once()
    sent = {"sum": 0.0, "exchange": 0.0, "gather": 0.0}
    before, cpu, clock = written(), time.process_time(), time.monotonic()
    with counted(ranks) if ranks > 1 else contextlib.nullcontext(sent) as sent:
        result = once()
    plan = result.diagnostics.plan
    return {
        "sent": sent,
        "written": written() - before,
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.monotonic() - clock,
        "stored_bytes": plan.stored_bytes,  # type: ignore[attr-defined]
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "operations": plan.operations,  # type: ignore[attr-defined]
        "delta_h1": result.delta_h1,
        "sizes": dataclasses.asdict(sizes_of(result, model, batch, workload, ranks)),
    }


def by_ranks(workload: Workload, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What every rank of a group of processes reports; they are forked from this one."""
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if not process:
            try:
                _work(workload, rank, ranks, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(statuses):
        raise SystemExit(f"processes ended with {statuses}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def _work(workload: Workload, rank: int, ranks: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    place, limit = f"file://{folder / 'rendezvous'}", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks, timeout=limit)
    (folder / f"{rank}.json").write_text(json.dumps(probe(workload, rank, ranks)))
    dist.destroy_process_group()


def compared(workload: Workload, ranks: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: means over ranks beside the formula of the mean rank."""
    sizes = Sizes(**found[0]["sizes"])
    expected = predicted(dataclasses.replace(sizes, own=sizes.prompts / ranks))  # type: ignore[arg-type]
    counts = sum(sum(own["sent"].values()) for own in found) / ranks
    wire = sum(own["written"] for own in found) / ranks
    formula = sum(expected.values())
    # Of all parameters the gradients of the units of a rank, or of its own parameters those of all units.
    units = sizes.prompts if sizes.sharded else sizes.own
    stored = (sizes.functionals + sizes.updates) * sizes.width * units * sizes.kept if sizes.keeps else 0
    return {
        "workload": workload.name,
        "ranks": ranks,
        "formula": formula,
        "by_kind": expected,
        "counted": counts,
        "written": wire,
        "stored_formula": stored,
        "stored": max(own["stored_bytes"] for own in found),
        "cpu_seconds": [own["cpu_seconds"] for own in found],
        "seconds": max(own["seconds"] for own in found),
        "peak_bytes": max(own["peak_bytes"] for own in found),
        "operations": found[0]["operations"],
        "delta_h1": found[0]["delta_h1"],
        "same": len({own["delta_h1"] for own in found}) == 1,
    }


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    head = ("workload", "R", "formula", "counted", "written", "kept", "formula", "CPU s a rank", "peak MiB")
    print("{:36} {:>2} {:>11} {:>11} {:>11} {:>11} {:>11} {:>13} {:>9}".format(*head))
    for workload in WORKLOADS:
        for ranks in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                line = compared(workload, ranks, by_ranks(workload, ranks, Path(folder)))
            lines.append(line)
            cpu = max(line["cpu_seconds"])
            print(
                f"{workload.name:36} {ranks:2} {line['formula']:11.0f} {line['counted']:11.0f} {line['written']:11.0f} "
                f"{line['stored']:11} {line['stored_formula']:11} {cpu:13.2f} {line['peak_bytes'] / 2**20:9.0f}"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1))
    wrong = [
        f"{line['workload']}, {line['ranks']} ranks: {line[count]:.0f} for {line['formula']:.0f}"
        for line in lines
        if line["ranks"] > 1
        for count in ("counted", "written")
        if count == "written" or "sharded" not in line["workload"]  # tensors that DTensor gathers are not counted
        if abs(line[count] - line["formula"]) > ALLOWED * line["formula"]
    ]
    wrong += [
        f"{line['workload']}: kept {line['stored']}" for line in lines if line["stored"] != line["stored_formula"]
    ]
    if wrong:
        raise SystemExit("not as the formulas say: " + "; ".join(wrong))
    print(f"all within {ALLOWED:.0%} of the formulas")


if __name__ == "__main__":
    main()
