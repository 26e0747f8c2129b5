"""GRPO trainers of TRL's whose model FSDP2 shards, for `trl_ranks`.

accelerate 1.15 reads its FSDP plugin on accelerators alone, and on CPUs trains with DistributedDataParallel without a word. So
its state is told what it would have told itself; sharding, gathering, clipping and stepping are its own code. transformers
shards a model by itself where it is loaded, on CPUs too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Qwen2ForCausalLM
from transformers.distributed import DistributedConfig

BY_ACCELERATE: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
}


class ToldToShard:
    """Mixed into a trainer: accelerate has the plugin that the trainer's arguments describe."""

    def create_accelerator_and_postprocess(self: Any) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.args.fsdp_plugin_args is None:
            return
        state = self.accelerator.state
        # What is made later copies it from there.
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        self.is_fsdp_enabled = True


def loaded_in_shards(model: Any, folder: Path) -> Any:
    """The same model as transformers loads it for all ranks of the process group."""
    shared = [str(folder)]
    dist.broadcast_object_list(shared)
    if dist.get_rank() == 0:
        model.save_pretrained(shared[0])
    dist.barrier()
    return Qwen2ForCausalLM.from_pretrained(
        shared[0], distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
    )
