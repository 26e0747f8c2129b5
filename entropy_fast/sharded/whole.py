"""A model that FSDP2 shards, and its optimizer, as plain ones for the length of a probe.

Plain parameters stand in the modules in place of the sharded ones, and FSDP2's hooks and classes are set aside but for its
casts: engines see a replica. For an engine that goes through layers one by one, the layers' matrices come and go, and every
trained parameter, with its optimizer state and gradients, is one rank's (`sharded.parted`); what is in no layer every rank
gathers. For others every rank gathers everything. Nothing that training uses is written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.distributed.agreement import fingerprint, refuse_others
from entropy_fast.distributed.team import Team
from entropy_fast.errors import ConfigError
from entropy_fast.sharded.exchange import in_place
from entropy_fast.sharded.fsdp2 import ShardedModel, fsdp2_modules
from entropy_fast.sharded.gathering import gathered
from entropy_fast.sharded.layers import LayersOnDemand
from entropy_fast.sharded.optimizer import ShardedOptimizer, StandIns, sharded_optimizer
from entropy_fast.sharded.parted import Form, PartedSums
from entropy_fast.sharded.rounds import Rounds
from entropy_fast.step import GivenOptimizer

__all__ = ["WholeModel", "as_whole"]


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """What engines are given.

    Attributes:
        model: whose parameters are whole on this rank.
        optimizer: of these.
        parted: whose sums are kept where; None where this process keeps all.
    """

    model: nn.Module
    optimizer: GivenOptimizer
    parted: PartedSums | None = None


@contextlib.contextmanager
def as_whole(
    model: nn.Module,
    optimizer: GivenOptimizer,
    estimate: EstimateOptions,
    run: RunOptions,
    team: Team,
    *,
    by_layer: bool,
) -> Iterator[WholeModel]:
    """Plain parameters in place of sharded ones; as it was afterwards, also after an exception. Other models pass as they are.

    Args:
        model: possibly wrapped.
        optimizer: see `entropy_fast.fast_delta_h1`.
        estimate: what is estimated.
        run: how it is run. Where ranks do not make one forecast together, nothing is gathered, and who reads the model next
            refuses it.
        team: the ranks, all of which have to come here.
        by_layer: whether matrices of layers are read in their layers' forwards and backwards alone, and gradients are of use
            wherever they are kept.

    Raises:
        ModelStateError: FSDP2 shards the model in a way that is not taken.
        OptimizerStateError: the optimizer is not one that is read under sharding.
        ConfigError: ``gradient="live"``, and gradients wait to be added up over ranks; or a checkpoint is to be kept.
        DistributedError: a rank failed, was lost, or holds something else.
    """
    modules = fsdp2_modules(model) if run.ranks == "all" else {}
    if not modules:
        yield WholeModel(model, optimizer)
        return
    team.enter("sharded parameters")
    sharded = ShardedModel.of(model, modules)
    # What a checkpoint is of is told by the bits of all parameters, and layers come and go.
    run.refuse_checkpoint("FSDP2 shards the model")
    live = estimate.gradient == "live"
    if live and sharded.unreduced is not None:
        raise ConfigError(
            f"gradient='live' and the gradients of '{sharded.unreduced}' were not added up over ranks yet.",
            fix="call it after a backward with set_requires_gradient_sync(True).",
        )
    given = sharded_optimizer(optimizer, sharded)
    _refuse_others(team, sharded, given, estimate)
    trained = {name: p for name, p in unwrap_model(model).named_parameters() if p.requires_grad}
    # Shares of sequences and tokens need sums where the sequences are.
    parts = by_layer and not (run.by_sequence or run.by_token) and len(trained) >= team.size
    rounds = Rounds(team)
    layers = LayersOnDemand(rounds, sharded.layers(trained=parts) if by_layer and team.size > 1 else {})
    parted = _parted(team, rounds, sharded, layers, trained) if parts and team.size > 1 else None
    kept = None if parted is None else _kept(parted, trained)
    stand_ins = _stand_ins(sharded, layers.stand_ins, team, kept, live=live)
    whole = given.of_stand_ins(stand_ins, team, kept, momentum=estimate.step != "adam_static")
    with team.serving(rounds.serve), in_place(sharded, model, stand_ins.computed, layers):
        yield WholeModel(model, whole(model), parted)


def _parted(
    team: Team,
    rounds: Rounds,
    sharded: ShardedModel,
    layers: LayersOnDemand,
    trained: Mapping[str, nn.Parameter],
) -> PartedSums:
    """All trained parameters, sharded or not, dealt to the ranks."""
    computed_in = {id(own.tensor): own.computed_in for own in sharded.parameters}
    numbers, n_layers = layers.numbers, layers.count
    forms = [
        Form(
            name,
            p.shape,
            torch.promote_types(computed_in.get(id(p), p.dtype), torch.float32),
            numbers.get(id(p), n_layers),
        )
        for name, p in trained.items()
    ]
    parted = PartedSums(team, rounds, forms, n_layers)
    layers.tell(parted.entering)
    return parted


def _kept(parted: PartedSums, trained: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """Names of the parameters that this rank keeps, by identity."""
    names = list(trained)
    return {id(trained[names[place]]): names[place] for place in parted.places}


def _refuse_others(team: Team, sharded: ShardedModel, given: ShardedOptimizer, estimate: EstimateOptions) -> None:
    """Raise, on all ranks alike, unless all will gather the same."""
    forms = [
        [p.name, list(p.tensor.shape), str(p.tensor.dtype), str(p.computed_in), p.tensor.requires_grad, p.owner]
        for p in sharded.parameters
    ]
    refuse_others(
        team,
        {
            "sharded parameters": fingerprint(forms),
            "sharded optimizer states": given.form,
            "options of the estimate": fingerprint(estimate.to_dict()),
        },
        fix="make the same call on all ranks, with the model that fully_shard made and the optimizer of each.",
    )


def _stand_ins(
    sharded: ShardedModel, lent: Mapping[int, nn.Parameter], team: Team, kept: Mapping[int, str] | None, *, live: bool
) -> StandIns:
    """Whole parameters: as forwards see them, beside those that come and go, and as the optimizer steps them.

    With ``live`` these have their gradients. Of those that are trained this rank has the ones that it keeps; None for all.
    """
    stepped: dict[int, nn.Parameter] = {}
    computed = dict(lent)
    for own in sharded.parameters:
        trained, key = own.tensor.requires_grad, id(own.tensor)
        if key in lent and not trained:
            continue
        mine = kept is None or key in kept
        values = gathered(team, own.tensor)
        if key not in lent:
            computed[key] = nn.Parameter(values.to(own.computed_in), requires_grad=trained)
        gradient = gathered(team, own.tensor.grad) if live and trained and own.tensor.grad is not None else None
        if trained and mine:
            same = key not in lent and own.computed_in == own.tensor.dtype
            stepped[key] = computed[key] if same else nn.Parameter(values)
            stepped[key].grad = gradient
    return StandIns(stepped, computed)
