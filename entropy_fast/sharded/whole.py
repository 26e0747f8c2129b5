"""A model that FSDP2 shards, and its optimizer, as plain ones for the length of a probe.

Plain parameters stand in the modules in place of the sharded ones, and FSDP2's hooks and classes are set aside but for its
casts: engines see a replica. For an engine that goes through layers one by one, the layers' matrices come and go, and every
rank keeps its own rows of what is trained, with their optimizer state and gradients (`sharded.parted`); what is in no layer
every rank gathers. For others every rank gathers everything. Nothing that training uses is written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.distributed.agreement import fingerprint, refuse_others
from entropy_fast.distributed.team import Team
from entropy_fast.errors import ConfigError
from entropy_fast.sharded.exchange import in_place
from entropy_fast.sharded.forms import Form, all_have_some, dealt_forms
from entropy_fast.sharded.fsdp2 import ShardedModel, fsdp2_modules
from entropy_fast.sharded.gathering import gathered
from entropy_fast.sharded.layers import LayersOnDemand
from entropy_fast.sharded.optimizer import ShardedOptimizer, StandIns, sharded_optimizer
from entropy_fast.sharded.parted import PartedSums
from entropy_fast.sharded.pieces import optimizer_in_pieces
from entropy_fast.sharded.rounds import Rounds
from entropy_fast.step import GivenOptimizer, OptimizerAtHand

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
    matrices = sharded.layers(trained=True)
    forms = dealt_forms(_forms(sharded, list(matrices), trained), team.size)
    on_demand = by_layer and team.size > 1
    # Shares of sequences and tokens need sums where the sequences are.
    apart = on_demand and not (run.by_sequence or run.by_token) and given.in_pieces(model) and all_have_some(forms)
    rounds = Rounds(team)
    lent = {} if not on_demand else matrices if apart else sharded.layers(trained=False)
    layers = LayersOnDemand(rounds, lent)
    parted = PartedSums(team, rounds, forms, len(matrices)) if apart else None
    if parted is not None:
        layers.tell(parted.entering)
    stand_ins = _stand_ins(sharded, layers.stand_ins, team, live=live and parted is None)
    momentum = estimate.step != "adam_static"
    if parted is None:
        known = given.of_stand_ins(stand_ins, team, momentum=momentum)
    else:
        found = optimizer_in_pieces(given, parted, model, trained, team, momentum=momentum, live=live)

        def known(_: nn.Module) -> OptimizerAtHand:
            return found

    with team.serving(rounds.serve), in_place(sharded, model, stand_ins.computed, layers):
        yield WholeModel(model, known(model), parted)


def _forms(sharded: ShardedModel, layers: Sequence[nn.Module], trained: Mapping[str, nn.Parameter]) -> list[Form]:
    """Of all trained parameters, sharded or not."""
    computed_in = {id(own.tensor): own.computed_in for own in sharded.parameters}
    number = {id(p): number for number, module in enumerate(layers) for p in module.parameters()}
    return [
        Form(
            name,
            p.shape,
            torch.promote_types(computed_in.get(id(p), p.dtype), torch.float32),
            number.get(id(p), len(layers)),
        )
        for name, p in trained.items()
    ]


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


def _stand_ins(sharded: ShardedModel, lent: Mapping[int, nn.Parameter], team: Team, *, live: bool) -> StandIns:
    """Whole parameters beside those that come and go, and with ``live`` the gradients of those that are trained."""
    stepped: dict[int, nn.Parameter] = {}
    computed = dict(lent)
    for own in sharded.parameters:
        trained, key = own.tensor.requires_grad, id(own.tensor)
        if key in computed:
            continue
        values = gathered(team, own.tensor)
        computed[key] = nn.Parameter(values.to(own.computed_in), requires_grad=trained)
        if not trained:
            continue
        cast = own.computed_in != own.tensor.dtype
        stepped[key] = nn.Parameter(values) if cast else computed[key]
        if live and own.tensor.grad is not None:
            stepped[key].grad = gathered(team, own.tensor.grad)
    return StandIns(stepped, computed)
