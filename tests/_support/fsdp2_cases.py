"""Small models, how FSDP2 shards them, and what is asked of them, for tests."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from probe_models.architectures import add_lora, build_model, enable_checkpointing
from probe_models.batches import make_rollouts
from probe_options import options_of
from rank_cases import SIZES, TIMEOUT
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from entropy_fast import Rollouts, candidates, fast_delta_h1
from entropy_fast.capture import GradientRecorder
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.step import AdamState
from entropy_fast.ways.packed import way as packed_way
from entropy_fast.ways.packed.way import PackedWay

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-6, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is sharded, and what is asked of it."""

    family: str = "opt"
    lora: bool = True
    tied: bool | None = None
    dtype: torch.dtype = torch.float64
    only: str = ""  # what is trained, by a part of its name
    head: bool = False  # not tied, and sharded by itself
    mixed: bool = False
    ignored: bool = False  # what is trained is not sharded
    file: str = ""  # the optimizer's, instead of itself: "whole", or a "folder" of shards
    checkpointing: str = ""
    depth: int = 0  # layers; 0 for two
    apart: bool = False  # prompts in a forward of their own
    out_of_memory: bool = False  # once, on the second rank
    refused: bool = False  # a parameter, likewise: it cannot be captured after all
    optimizer: str = "adamw"
    live: bool = False
    two: bool = False  # batches
    others: bool = False  # updates and functionals beside
    sizes: tuple[int, ...] = SIZES
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plain(self) -> nn.Module:
        model: Any = build_model(self.family, tied=self.tied)
        if self.depth:
            model = deeper(model, self.depth)
        if self.head:
            model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach() + 0.1)
        model = add_lora(model) if self.lora else model
        for name, parameter in model.named_parameters() if self.only else ():
            parameter.requires_grad_(self.only in name)
        if self.checkpointing:
            enable_checkpointing(model, reentrant=self.checkpointing == "reentrant")
        return model.to(self.dtype)

    def sharded(self, **how: Any) -> Sharded:
        model = self.plain()
        if self.mixed:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            how = {"mp_policy": policy, **how}
        if self.ignored:
            how = {"ignored_params": {p for p in model.parameters() if p.requires_grad}, **how}
        base: Any = model.get_base_model() if self.lora else model  # type: ignore[operator]
        for layer in layers_of(base):
            fully_shard(layer, **how)
        if self.head:
            fully_shard(base.get_output_embeddings(), **how)
        fully_shard(model, **how)
        optimizer = OPTIMIZERS[self.optimizer]([p for p in model.parameters() if p.requires_grad])
        return Sharded(self, model, optimizer, make_rollouts(self.sizes))

    @contextlib.contextmanager
    def circumstances(self, rank: int) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if self.apart:
                patch.setattr(packed_way, "_MOST_COPIED", -1)
            if self.out_of_memory and rank == 1:
                waiting, run_row = [torch.OutOfMemoryError("made up: out of memory")], PackedWay.run

                def run(way: PackedWay, *arguments: Any) -> Any:
                    found = run_row(way, *arguments)
                    if waiting:
                        raise waiting.pop()
                    return found

                patch.setattr(PackedWay, "run", run)
            if self.refused and rank == 1:
                known, product = [], GradientRecorder.product

                def refuse(recorder: GradientRecorder, name: str, *signals: torch.Tensor) -> None:
                    if not known and ".1." in name:
                        known.append(name)
                        recorder.refused.add(name)
                    product(recorder, name, *signals)

                patch.setattr(GradientRecorder, "product", refuse)
            yield

    def asked(self, ranks: str) -> dict[str, Any]:
        chosen = options_of(**{"step": "next", **self.options})
        chosen["run"] = dataclasses.replace(chosen["run"], ranks=ranks, rank_timeout=TIMEOUT)
        if self.two:
            chosen["entropy_rollouts"] = make_rollouts((2, 2, 2), seed=7)
        if self.others:
            batch = make_rollouts(self.sizes)
            chosen["functionals"] = {"length": batch.response_lengths.double()}
            chosen["updates"] = {"bonus": candidates.entropy_bonus(0.01)}
        if self.others and self.live:
            scale = 8 * batch.n_sequences  # of the loss
            another = torch.randn(batch.n_sequences, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            chosen["coefficients"] = batch.advantages.double() / scale
            chosen["updates"] = {"another": another / scale}
        return chosen


@dataclasses.dataclass(frozen=True)
class Sharded:
    case: Case
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Rollouts

    def train(self, steps: int) -> None:
        train(self.model, self.optimizer, self.batch, steps)

    @property
    def path(self) -> str:
        return f"{tempfile.gettempdir()}/entropy_fast_fsdp2_{os.getppid()}.{self.case.file}"

    def __call__(self, ranks: str = "all", **given: Any) -> DeltaH1Result:
        optimizer = self.path if self.case.file else self.optimizer
        return fast_delta_h1(self.model, optimizer, self.batch, **(self.case.asked(ranks) | given))

    def alone(self) -> Callable[[], DeltaH1Result]:
        """The same model with the same optimizer, of this process alone; every rank has to call this."""
        weights = get_model_state_dict(self.model, options=WHOLE)
        state = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        if self.case.file == "folder":
            sharded = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
            dcp.save(sharded, checkpoint_id=self.path)
        elif self.case.file:
            if dist.get_rank() == 0:
                torch.save(state, self.path)
            dist.barrier()
        gradients = {n: p.grad.full_tensor() for n, p in self.model.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
        if dist.get_rank():
            return lambda: self("own")
        model = self.case.plain()
        model.load_state_dict(weights)
        optimizer: Any = OPTIMIZERS[self.case.optimizer]([p for p in model.parameters() if p.requires_grad])
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        if self.case.mixed:
            optimizer = AdamState.from_optimizer(optimizer, model)
            for parameter in model.parameters():  # and no buffers
                parameter.data = parameter.data.to(torch.bfloat16)
        return lambda: fast_delta_h1(model, optimizer, self.batch, **self.case.asked("own"))


def deeper(model: Any, layers: int) -> Any:
    """The same kind of model with more layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return type(model)(config).train()


def layers_of(base: Any) -> Any:
    inner = base.base_model
    return inner.layers if hasattr(inner, "layers") else inner.h if hasattr(inner, "h") else inner.decoder.layers


def loss_of(model: nn.Module, batch: Rollouts) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.loss_mask[:, 1:]
    return -(logprobs.sum(1) * batch.advantages / 8).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Rollouts, steps: int) -> None:
    for _ in range(steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


PARTS = {"entropy_estimator": "rao_blackwell", "baseline": "prompts"}
# In 16 bits the same rows have the same bits only where they are in forwards of the same shape, whoever goes through them.
ALONE = {"step": "adam_static", "prompts_per_microbatch": 1}
CASES: dict[str, Case] = {
    "lora": Case(options={**PARTS, "max_grad_norm": 0.01, "by_sequence": True}),
    "static geometry": Case(options={"step": "adam_static"}),
    "all of a tied model": Case("gpt2", lora=False, options=PARTS),
    "a head by itself": Case("gpt2", lora=False, head=True, options=PARTS),
    "second sweep": Case(options={**PARTS, "memory_budget": 0}),
    "live gradient": Case(
        live=True, options={**PARTS, "gradient": "live", "parts": ("direct",), "max_grad_norm": 0.01}
    ),
    "checkpointing": Case("gpt2", checkpointing="not reentrant", options=PARTS),
    "many layers": Case(depth=6, options={**PARTS, "prompts_per_microbatch": 1, "by_token": True}),
    "many layers, second sweep": Case("gpt2", depth=6, options={**PARTS, "memory_budget": 0}),
    "many layers, checkpointing": Case("gpt2", depth=6, checkpointing="not reentrant", options=PARTS),
    "many layers, reentrant": Case("gpt2", depth=6, checkpointing="reentrant", options=PARTS),
    "many layers, prompts apart": Case(depth=6, apart=True, options=PARTS),
    "many layers, no prompt for one": Case(depth=5, sizes=(2, 2), options=PARTS),
    "many layers, out of memory": Case(depth=5, out_of_memory=True, options=PARTS),
    "many layers, mixed": Case("gpt2", dtype=torch.float32, mixed=True, depth=5, options=ALONE),
    "sgd": Case(optimizer="sgd", options=PARTS),
    "amsgrad": Case(optimizer="amsgrad", options=PARTS),
    "a file of the optimizer": Case(file="whole", options=PARTS),
    "a folder of shards": Case(file="folder", depth=3, options=PARTS),
    "many layers, all of them": Case(
        "gpt2", lora=False, depth=4, options={**PARTS, "max_grad_norm": 0.01, "full_kernel": True}
    ),
    "all, blocks": Case("gpt2", lora=False, depth=3, options={**PARTS, "blocks": 2, "prompts_per_microbatch": 1}),
    "all, second sweep": Case("gpt2", lora=False, depth=3, options={**PARTS, "memory_budget": 0}),
    "all, a prompt at a time": Case(
        "gpt2", lora=False, depth=3, options={**PARTS, "memory_budget": 0, "prompts_per_microbatch": 1}
    ),
    "all, two batches": Case("gpt2", lora=False, depth=3, two=True, options={**PARTS, "prompts_per_microbatch": 1}),
    "all, two batches, second sweep": Case(
        "gpt2", lora=False, depth=3, two=True, options={**PARTS, "memory_budget": 0}
    ),
    "all, out of memory": Case("gpt2", lora=False, depth=4, out_of_memory=True, options=PARTS),
    "all, one not captured": Case("gpt2", lora=False, depth=3, refused=True, options=PARTS),
    "a vector alone": Case("gpt2", lora=False, only="h.1.ln_2.bias", depth=3, options=PARTS),
    "a vector and a matrix": Case("gpt2", lora=False, only="h.1.mlp.c_proj", depth=3, options=PARTS),
    "all, checkpointing": Case("gpt2", lora=False, depth=4, checkpointing="not reentrant", options=PARTS),
    "all, live gradient": Case(
        "gpt2",
        lora=False,
        depth=3,
        live=True,
        options={**PARTS, "gradient": "live", "parts": ("direct",), "max_grad_norm": 0.01},
    ),
    "all, updates compared": Case("gpt2", lora=False, depth=3, others=True, options={**PARTS, "max_grad_norm": 0.01}),
    "all, updates beside a live gradient": Case(
        "gpt2",
        lora=False,
        depth=3,
        live=True,
        others=True,
        sizes=(2, 3, 2, 2, 2, 2),
        options={**PARTS, "gradient": "live", "parts": ("direct",), "sample": 4},
    ),
    "all, sgd": Case("gpt2", lora=False, depth=3, optimizer="sgd", options=PARTS),
    "all, mixed": Case("gpt2", lora=False, dtype=torch.float32, mixed=True, depth=3, options=ALONE),
    "all, no prompt for one": Case("gpt2", lora=False, depth=3, sizes=(2, 2), options=PARTS),
    "adapters by themselves": Case(ignored=True, depth=4, options=PARTS),
    "two batches": Case(two=True, options=PARTS),
    "fewer prompts than ranks": Case(sizes=(2, 2)),
    "two passes": Case(options={"engine": "two_pass"}),
    "two passes of two batches": Case("gpt2", lora=False, two=True, options={"engine": "two_pass", **PARTS}),
    "forwards with tangents": Case(
        two=True,
        options={"engine": "jvp", "entropy_estimator": "rao_blackwell", "parts": ("direct",), "step": "adam_static"},
    ),
    "single precision": Case("qwen2", dtype=torch.float32, options=PARTS),
    "all in single precision": Case("qwen2", lora=False, tied=True, dtype=torch.float32, options=PARTS),
    "mixed precision": Case("qwen2", dtype=torch.float32, mixed=True, options=ALONE),
}
