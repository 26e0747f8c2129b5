"""Optimizer states of sharded models, written by torch's and accelerate's own code, and the same training without shards.

As a script it is one of several processes: python sharded_states.py RANK WORLD_SIZE RENDEZVOUS_FILE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

STEPS = 3
FULL = StateDictOptions(full_state_dict=True)


class Layers(nn.Module):
    """Layers of one shape, so that nothing but names tells their parameters apart; a last one that few processes share."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(3, 3, dtype=torch.float64) for _ in range(3)])
        self.last = nn.Linear(3, 1, dtype=torch.float64)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: Tensor = self.last(x)
        return out


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, the third layer before the second: counts and shapes fit in named_parameters() order too.

    FSDP1's flattened parameters count as what they are of.
    """
    named = list(model.named_parameters())
    late = [p for layer in ("layers.2", "layers.1") for name, p in named if layer in name]
    early = [p for _, p in named if all(p is not own for own in late)]
    groups = [{"params": late, "lr": 3e-3, "eps": 1e-6}, {"params": early, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(
        4
    )  # the same batch everywhere: the mean over processes is every one's own
    for _ in range(STEPS):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def plain() -> tuple[Layers, torch.optim.Optimizer]:
    """The same training in one process."""
    model = Layers()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    return model, optimizer


def write_fsdp2(folder: Path, with_accelerate: bool = False) -> None:
    """``fsdp2-full.pt``, folders ``fsdp2`` (nested) and ``fsdp2-flat``, and ``fsdp2-shards.pt`` of every rank."""
    from torch.distributed.fsdp import fully_shard

    model = Layers()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), folder / "fsdp2-shards.pt")
    _save_all(folder, "fsdp2", model, optimizer, with_accelerate)


def write_fsdp1(folder: Path, original: bool, with_accelerate: bool = False) -> None:
    """Likewise with FSDP1, which flattens; with ``original`` it shows original parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = FullyShardedDataParallel(
        Layers(),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )
    optimizer = optimizer_of(model)
    train(model, optimizer)
    name = f"fsdp1-{'original' if original else 'flat'}"
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        sharded = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    dcp.save({"optimizer": sharded}, checkpoint_id=folder / f"{name}-dcp")
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), folder / f"{name}-raw.pt")
    _save_all(folder, name, model, optimizer, with_accelerate)


def _save_all(
    folder: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, with_accelerate: bool
) -> None:
    whole = get_optimizer_state_dict(model, optimizer, options=FULL)
    if dist.get_rank() == 0:
        torch.save(whole, folder / f"{name}-full.pt")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / name)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"optimizer": flat, "model": model.state_dict()}, checkpoint_id=folder / f"{name}-flat")
    if with_accelerate:
        _accelerate(folder, name, model, optimizer)


def _accelerate(folder: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Folders of accelerate's ``save_state``: ``optimizer.bin`` with the whole state, ``optimizer_0`` with shards."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import save_fsdp_optimizer

    for kind in ("FULL", "SHARDED"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1 if name.startswith("fsdp1") else 2, state_dict_type=f"{kind}_STATE_DICT"
        )
        of_rank = SimpleNamespace(process_index=dist.get_rank())
        save_fsdp_optimizer(plugin, of_rank, optimizer, model, str(folder / f"{name}-accelerate-{kind.lower()}"))
    save_fsdp_optimizer(plugin, of_rank, optimizer, model, str(folder / f"{name}-accelerate-ranks"), use_dcp=False)


def main(rank: int, world: int, rendezvous: str, folder: str) -> None:
    from accelerate import PartialState

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    PartialState(cpu=True)  # accelerate's functions write into its log
    write_fsdp2(Path(folder), with_accelerate=True)
    write_fsdp1(Path(folder), original=False, with_accelerate=True)
    write_fsdp1(Path(folder), original=True, with_accelerate=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
