"""What several processes of one group do with one another, for tests; started by `process_groups.run_jobs`.

Usage: python ranks_at_work.py FOLDER JOBS

Libraries are imported once: the processes of every job are forked from the one that imported them. The store is that process's,
as a launcher's would be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from probe_models.batches import make_rollouts
from rank_cases import CASES, SIZES, Run, probing, wide_model
from torch import Tensor

from entropy_fast import Rollouts
from entropy_fast.distributed import Team, gather_rows
from entropy_fast.distributed.team import joined
from entropy_fast.estimates.result import DeltaH1Result

LEFT_OUT = ("plan", "run_options", "estimate_options")


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, list[float]]]:
    """Every number of a result, by where it stands."""
    if isinstance(value, Tensor):
        yield path, value.double().flatten().tolist()
    elif isinstance(value, (int, float)):
        yield path, [float(value)]
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in LEFT_OUT:
                yield from numbers(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield from numbers(own, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for place, own in enumerate(value):
            yield from numbers(own, f"{path}.{place}")


def digest(found: Mapping[str, list[float]]) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def together(rank: int, names: list[str]) -> dict[str, Any]:
    """Probes of the named cases by all ranks; and by the first of them alone."""
    found = {}
    for name in names:
        run = CASES[name]()
        result = run("all")
        ours = dict(numbers(result))
        found[name] = {
            "digest": digest(ours),
            "plan": str(result.diagnostics.plan),
            "warnings": list(result.diagnostics.warnings),
        }
        if rank == 0:
            found[name] |= {"all": ours, "own": dict(numbers(run("own")))}
    return found


@contextlib.contextmanager
def at_phase(wanted: str, then: Callable[[], object]) -> Iterator[list[str]]:
    """Do something on this rank where it enters a phase for the first time; yields the phases that it entered."""
    entered: list[str] = []
    enter = Team.enter

    def entering(team: Team, phase: str) -> None:
        enter(team, phase)
        entered.append(phase)
        if phase == wanted and entered.count(phase) == 1:
            then()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "enter", entering)
        yield entered


def attempt(run: Run) -> dict[str, Any]:
    """What a probe by all ranks ends in, and how long that takes."""
    began = time.monotonic()
    try:
        run("all")
        said: dict[str, Any] = {"error": None}
    except Exception as error:
        said = {"error": type(error).__name__, "text": str(error), "ranks": list(getattr(error, "ranks", ()))}
    return said | {"seconds": time.monotonic() - began}


def raising(rank: int, name: str, failing: int) -> dict[str, Any]:
    """A rank raises at every phase in turn, and all of them at one; probes before, between and after succeed."""
    run = CASES[name]()
    with at_phase("none", lambda: None) as phases:
        found = {"good": attempt(run)}

    def fail() -> None:
        raise ValueError("made up")

    for phase in dict.fromkeys(phases):
        with at_phase(phase if rank == failing else "none", fail):
            found[phase] = attempt(run)
    with at_phase(phases[-1], fail):
        found["everywhere"] = attempt(run)
    found["good again"] = attempt(run)
    return {"phases": list(dict.fromkeys(phases)), "found": found}


def ending(rank: int, name: str, phase: str, failing: int, how: str, seconds: float) -> dict[str, Any]:
    """A rank is killed, or stops for longer than the others wait, where it enters a phase."""
    run = CASES[name]()

    def end() -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3 * seconds)

    def patient(ranks: str) -> DeltaH1Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rank_cases.TIMEOUT", seconds)
            return run(ranks)

    with at_phase(phase if rank == failing else "none", end):
        return attempt(patient)


def other_data(rank: int) -> dict[str, Any]:
    """Ranks that hold other rollouts, other options, other parameters, or a loss of their own."""
    found, batch, model = {}, make_rollouts(SIZES), wide_model()
    mine = make_rollouts(SIZES, seed=5 + rank)
    found["rollouts"] = attempt(probing(model, mine))
    found["options"] = attempt(probing(model, batch, blocks=2 + rank))

    def loss(logprobs: Tensor, entropies: Tensor) -> Tensor:
        return -(1 + rank) * (logprobs * batch.loss_mask).sum()

    found["loss"] = attempt(probing(model, batch, fields={"update": loss}))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-9 * rank
    found["parameters"] = attempt(probing(model, batch))
    return found


def spread_rows(rank: int) -> dict[str, Any]:
    """Rows shuffled over ranks, groups split, one rank without any: brought together, and forecast."""
    whole = make_rollouts(SIZES, rewards=None)
    with_rewards = dataclasses.replace(whole, advantages=None, rewards=whole.advantages)
    world = dist.get_world_size()
    owner = torch.randint(0, max(1, world - 1), (whole.n_sequences,), generator=torch.Generator().manual_seed(3))
    found: dict[str, Any] = {}
    for name, batch in (("advantages", whole), ("rewards", with_rewards)):
        rows = (owner == rank).nonzero().flatten()
        own = narrowed(batch.select_rows(rows)) if len(rows) else None
        if own is not None and name == "rewards":
            own = dataclasses.replace(own, advantages=None)  # centred on what is here
        given = (
            {}
            if own is None
            else {
                "number": rows.double(),
                "tokens": own.input_ids.double(),
                "shared": own.advantages,  # memory that the rollouts hold
            }
        )
        gathered = gather_rows(own, given, order=rows if own is not None else None)
        both = []
        for one in (gathered.rollouts, batch):
            mask = one.attention_mask == 1
            both.append(
                [
                    one.group_ids.tolist(),
                    [ids[kept].tolist() for ids, kept in zip(one.input_ids, mask, strict=True)],
                    [loss[kept].tolist() for loss, kept in zip(one.loss_mask, mask, strict=True)],
                    one.advantages.tolist(),
                    one.length_budgets.tolist(),
                    [one.temperature, one.top_p],
                ]
            )
        mask, tokens = gathered.rollouts.attention_mask == 1, gathered.tables["tokens"]
        found[name] = {
            "same": both[0] == both[1],
            "number": gathered.tables["number"].tolist(),
            "tokens": bool((tokens[mask] == gathered.rollouts.input_ids[mask]).all()),
        }
        if name == "advantages":
            result, expected = (probing(wide_model(), one) for one in (gathered.rollouts, batch))
            found["forecast"] = [result("all").delta_h1, expected("own").delta_h1]
    local = make_rollouts((2, 2), seed=rank)  # ids that mean another prompt on every rank
    try:
        gather_rows(local)
        found["local ids"] = None
    except Exception as error:
        found["local ids"] = [type(error).__name__, str(error)]
    return found


def narrowed(batch: Rollouts) -> Rollouts:
    """Without columns on the right that no row needs, so that widths differ from rank to rank."""
    wide = int(batch.attention_mask.any(0).nonzero().max()) + 1
    fields = {name: getattr(batch, name)[:, :wide] for name in ("input_ids", "attention_mask", "loss_mask")}
    return dataclasses.replace(batch, **fields)


def not_there(rank: int, seconds: float) -> dict[str, Any]:
    """One rank does not make the call at all."""
    run = CASES["score_function"]()
    if rank == 1:
        time.sleep(2 * seconds)
        return {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rank_cases.TIMEOUT", seconds)
        return attempt(run)


def looking_late(rank: int) -> dict[str, Any]:
    """The first rank fails right after a meeting, and the second looks only then who has failed at that meeting."""
    reached: list[str] = []
    has = Team._has

    def slow(team: Team, *keys: str) -> bool:
        if keys[0].startswith("failed"):
            time.sleep(1.0)
        return has(team, *keys)

    def together(_: str) -> None:
        with joined("all", 30.0) as team:
            team.meet()
            reached.append("first")
            if rank == 0:
                raise ValueError("made up")
            team.meet()

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Team, "_has", slow)
        return attempt(together) | {"reached": reached}


MODES: dict[str, Callable[..., dict[str, Any]]] = {
    own.__name__: own for own in (together, raising, ending, other_data, spread_rows, not_there, looking_late)
}


def mode_named(name: str) -> Callable[..., dict[str, Any]]:
    """One of `MODES`, or FUNCTION of a module beside this file, by ``MODULE:FUNCTION``."""
    module, _, function = name.rpartition(":")
    return getattr(importlib.import_module(module), function) if module else MODES[name]  # type: ignore[no-any-return]


def work(rank: int, world: int, folder: Path, mode: str, arguments: Mapping[str, Any]) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(1000 + rank)  # nothing may depend on it
    limit = datetime.timedelta(seconds=120)
    until = time.monotonic() + limit.total_seconds()
    while not (folder / "port").exists():
        assert time.monotonic() < until, "the store did not come"
        time.sleep(0.002)
    store = dist.TCPStore("127.0.0.1", int((folder / "port").read_text()), None, False, limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    found = mode_named(mode)(rank, **arguments)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


def main(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run jobs one after the other, each by processes of its own that are forked from this one."""
    torch.set_num_threads(1)
    sys.modules["ranks_at_work"] = sys.modules["__main__"]
    for job in jobs:
        mode_named(job["mode"])
    for number, job in enumerate(jobs):
        own = folder / str(number)
        own.mkdir()
        ranks = []
        for rank in range(job["world"]):
            process = os.fork()
            if not process:
                try:
                    work(rank, job["world"], own, job["mode"], job["arguments"])
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            ranks.append(process)
        # After the forks: the store's thread looks names up, and a process that is forked meanwhile inherits that lock taken.
        store = dist.TCPStore("127.0.0.1", 0, None, True, datetime.timedelta(seconds=120), wait_for_workers=False)
        (own / "port.new").write_text(str(store.port))
        (own / "port.new").rename(own / "port")
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
        (own / "statuses.json").write_text(json.dumps(statuses))
        del store


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
