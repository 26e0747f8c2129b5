"""What several processes do with a model that FSDP2 shards, for tests; started by `process_groups.run_jobs`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp2_cases import CASES, Sharded, layers_of, loss_of
from ranks_at_work import at_phase, attempt, digest, numbers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from entropy_fast.capture import GradientRecorder
from entropy_fast.context import ProbeContext
from entropy_fast.engines.gradient_sum import GradientSum
from entropy_fast.engines.one_pass.gradient_stack import GradientStack
from entropy_fast.sharded import PartedSums


def sharded(rank: int, names: list[str]) -> dict[str, Any]:
    """Forecasts of the named cases by all ranks, and by the first of them of a model that is whole."""
    found = {}
    for name in names:
        run = CASES[name].sharded()
        run.train(2)
        if run.case.live:
            loss_of(run.model, run.batch).backward()
        alone = run.alone()
        with run.case.circumstances(rank):
            result = run()
        if run.case.file and rank == 0:
            (shutil.rmtree if run.case.file == "folder" else os.unlink)(run.path)
        ours = dict(numbers(result))
        found[name] = {
            "digest": digest(ours),
            "plan": str(result.diagnostics.plan),
            "warnings": list(result.diagnostics.warnings),
        }
        if rank == 0:
            found[name] |= {"all": ours, "own": dict(numbers(alone()))}
    return found


def bits_of(run: Sharded) -> dict[str, Any]:
    """All that training goes on from, of this rank."""
    tensors = dict(run.model.named_parameters())
    tensors |= {f"gradient of {name}": p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    tensors |= {
        f"{key} of {place}": value
        for place, own in enumerate(run.optimizer.state.values())
        for key, value in own.items()
    }
    found = {name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in tensors.items()}
    return {name: tensor.detach().reshape(-1).tolist() for name, tensor in found.items()}


def form_of(model: nn.Module) -> list[Any]:
    """Classes, hooks, flags and parameters' identities."""
    return [
        [
            id(type(module)),
            module.training,
            [(key, id(hook)) for key, hook in module._forward_pre_hooks.items() if not hasattr(hook, "__self__")],
            list(module._forward_pre_hooks), list(module._forward_hooks), sorted(module.__dict__),
            {slot: id(p) for slot, p in module._parameters.items()},
        ]
        for module in model.modules()
    ]  # fmt: skip


def training(rank: int, name: str) -> dict[str, Any]:
    """Whether training goes on as if there had been no probe; also after one that failed half-way."""

    def fail(stage: str, done: int, total: int) -> None:
        raise ValueError("made up")

    def trained(probe: bool) -> tuple[dict[str, Any], bool]:
        run = CASES[name].sharded()
        run.train(2)
        same = True
        if probe:
            for module in run.model.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
            before, form, state = bits_of(run), form_of(run.model), torch.get_rng_state()
            run()
            error = attempt(lambda _: run(on_progress=fail))
            same = error["error"] == "ValueError"
            same &= (
                before == bits_of(run) and form == form_of(run.model) and bool((state == torch.get_rng_state()).all())
            )
        run.train(2)
        with torch.no_grad():  # leaves parameters gathered
            run.model(input_ids=run.batch.input_ids, attention_mask=run.batch.attention_mask)
        if probe:
            run()
        loss_of(run.model, run.batch).backward()
        if probe:
            run()
        run.optimizer.step()
        return bits_of(run), same

    with_probe, same = trained(True)
    without, _ = trained(False)
    return {"as it was": same, "same training": with_probe == without, "tensors": len(without)}


def matrices_of(module: nn.Module, *, adapters: bool) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if p.dim() > 1 and (adapters or "lora_" not in name)]


def held(rank: int, name: str) -> dict[str, Any]:
    """Bytes of layers' matrices there at the most, in linear maps' forwards and backwards, and of each layer."""
    run = CASES[name].sharded()
    run.train(1)
    base: Any = run.model.get_base_model() if run.case.lora else run.model  # type: ignore[operator]
    layers, most = layers_of(base), [0]
    adapters = "by_token" not in run.case.options  # whose shares need them where the tokens are
    sharded = [sum(p.numel() * p.element_size() for p in matrices_of(layer, adapters=adapters)) for layer in layers]

    def look(*_: object) -> None:
        storages = {
            s.data_ptr(): s.nbytes() for p in matrices_of(layers, adapters=adapters) for s in [p.untyped_storage()]
        }
        most[0] = max(most[0], sum(size for size in storages.values()))

    def look_twice(module: nn.Module, args: Any, output: Any) -> None:
        look()
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(look)

    handles = [m.register_forward_hook(look_twice) for m in layers.modules() if type(m) is nn.Linear]
    handles += [layer.register_forward_hook(look_twice) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return {"most": most[0], "layers": sharded}


def shares(rank: int, name: str) -> dict[str, Any]:
    """Bytes of gradients, of sums and of states of the optimizer that a rank has in a probe, beside those of all."""
    run = CASES[name].sharded()
    run.train(1)
    base: Any = run.model.get_base_model() if run.case.lora else run.model  # type: ignore[operator]
    trained = [p for p in run.model.parameters() if p.requires_grad]
    in_layers = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers_of(base)]
    found: dict[str, Any] = {"found": 0, "arrived": 0, "sums": [], "units": [], "moments": [], "columns": 0}
    take, zeros, reading = GradientRecorder.take, GradientSum.zeros, ProbeContext.of
    stack, take_in = GradientStack.__init__, PartedSums._take_in

    def taking(recorder: GradientRecorder, parameter: str) -> Any:
        found["found"] = max(found["found"], sum(g.numel() for own in recorder.columns for g in own.values()))
        found["columns"] = len(recorder.columns)
        return take(recorder, parameter)

    def summing(parameters: Any, device: Any) -> Any:
        found["sums"].append(sum(p.numel() for p in parameters))
        return zeros(parameters, device)

    def keeping(own: GradientStack, names: Any, parameters: Any, n_units: int, n_columns: int, **how: Any) -> None:
        found["units"].append([sum(p.numel() for p in parameters), n_units])
        stack(own, names, parameters, n_units, n_columns, **how)

    def read(model: nn.Module, optimizer: Any, *others: Any) -> Any:
        found["moments"].append(sum(own.second_moment.numel() for own in optimizer.state.moments.values()))
        return reading(model, optimizer, *others)

    def arriving(parted: PartedSums, sender: int, numbers: Any, rows: Any, **how: Any) -> None:
        found["arrived"] = max(found["arrived"], sum(g.numel() for own in rows for g in own.values()))
        take_in(parted, sender, numbers, rows, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientRecorder, "take", taking)
        patch.setattr(GradientSum, "zeros", summing)
        patch.setattr(GradientStack, "__init__", keeping)
        patch.setattr(PartedSums, "_take_in", arriving)
        patch.setattr(ProbeContext, "of", read)
        run()
    whole = sum(p.numel() for p in trained)
    return found | {
        "whole": whole,
        "layer": max(in_layers),
        "rest": whole - sum(in_layers),
        # Rows are dealt in whole, and vectors to one rank.
        "slack": sum(p.shape[1:].numel() if p.dim() > 1 else p.numel() for p in trained),
    }


def failing(rank: int, name: str, who: int) -> dict[str, Any]:
    """A rank raises at every phase in turn."""
    run = CASES[name].sharded()
    run.train(1)
    with at_phase("none", lambda: None) as phases:
        found = {"good": attempt(lambda _: run())}

    def fail() -> None:
        raise ValueError("made up")

    for phase in dict.fromkeys(phases):
        with at_phase(phase if rank == who else "none", fail):
            found[phase] = attempt(lambda _: run())
    found["good again"] = attempt(lambda _: run())
    run.train(1)
    return {"phases": list(dict.fromkeys(phases)), "found": found}


def half_way(rank: int, name: str, who: int, how: str) -> dict[str, Any]:
    """A rank raises, or is killed, in the backward of a layer, which others will need to be gathered."""
    run = CASES[name].sharded()
    run.train(1)
    base: Any = run.model.get_base_model()  # type: ignore[operator]
    left = [20]  # layers that are gone through before

    def end(*_: object) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("made up")

    def count(module: nn.Module, args: Any, output: Any) -> None:
        left[0] -= 1
        first = output[0] if isinstance(output, tuple) else output
        if left[0] <= 0 and first.requires_grad:
            first.register_hook(end)

    if rank != who:
        return {"error": attempt(lambda _: run())}
    handles = [layer.register_forward_hook(count) for layer in layers_of(base)]
    found = attempt(lambda _: run())
    for handle in handles:
        handle.remove()
    return {"error": found, "left": left[0]}


def refused(rank: int) -> dict[str, Any]:
    """What is not taken: the error of every rank, by what it is about."""
    found, world = {}, dist.get_world_size()
    case = CASES["lora"]

    def of(name: str, run: Sharded, **given: Any) -> None:
        found[name] = attempt(lambda _: run(**given))

    of(
        "replicas of shards",
        case.sharded(mesh=init_device_mesh("cpu", (1, world), mesh_dim_names=("copies", "shards"))),
    )
    of("some of the ranks", case.sharded(mesh=DeviceMesh("cpu", [rank])))
    split = case.sharded()
    for part in split.model.modules():
        if isinstance(part._parameters.get("bias"), DTensor):  # with a weight that something else has sharded
            weight = part._parameters["weight"]
            assert weight is not None
            part._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    of("sharded by others", split)
    of("offloaded", case.sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)))
    of("another optimizer", dataclasses.replace(case, optimizer="adagrad").sharded())
    run = case.sharded()
    run.train(1)
    of("each by itself", run, ranks="own")
    of("a checkpoint", dataclasses.replace(run, case=dataclasses.replace(case, options={"checkpoint": "folder"})))
    of("several optimizers", dataclasses.replace(run, optimizer=[run.optimizer]))  # type: ignore[arg-type]
    hook = next(p for p in run.model.parameters() if p.requires_grad).register_hook(lambda g: g)
    of("a hook", run)
    hook.remove()
    live = dataclasses.replace(run, case=CASES["live gradient"])
    of("no gradient", live)
    run.model.set_requires_gradient_sync(False)  # type: ignore[operator]
    loss_of(run.model, run.batch).backward()
    of("unreduced gradients", live)
    run.model.set_requires_gradient_sync(True)  # type: ignore[operator]
    changed = case.sharded()
    for group in changed.optimizer.param_groups:
        group["lr"] *= 1 + rank
    changed.train(1)
    of("another rate", changed)
    return found
