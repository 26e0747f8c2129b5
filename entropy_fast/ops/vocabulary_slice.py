"""One rank's rows of an output layer whose vocabulary is spread over the ranks of a process group."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from entropy_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VocabularySlice", "is_dtensor"]


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularySlice:
    """Successive rows of an output layer, which this rank holds.

    The slices of all ranks of the group make the whole, each row once; they may differ in size, and one may have no rows.

    Attributes:
        weight: ``[V_r, H]`` a plain tensor, the rows ``first`` .. ``first + V_r`` of the whole weight.
        first: index of the first of them; any number where there are none.
        vocabulary: V, how many rows the whole has.
        bias: ``[V_r]`` of the same rows, or None.
        group: the processes among which the rows are spread; None for the default group.

    Raises:
        ConfigError: the rows do not lie within the vocabulary, or a tensor is a DTensor.
    """

    weight: Tensor
    first: int
    vocabulary: int
    bias: Tensor | None = None
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if is_dtensor(tensor):
                raise ConfigError(
                    f"VocabularySlice got a DTensor as its {name}; expected the plain tensor with this rank's rows.",
                    fix="use VocabularySlice.from_dtensor(weight, bias), which knows where they begin.",
                )
        if self.weight.dim() != 2 or (self.bias is not None and self.bias.shape != self.weight.shape[:1]):
            bias = "" if self.bias is None else f" and bias {tuple(self.bias.shape)}"
            raise ConfigError(
                f"VocabularySlice got weight {tuple(self.weight.shape)}{bias}; expected [rows, H] and [rows].",
                fix="pass this rank's rows of the output layer's weight, and the same of its bias.",
            )
        rows = self.weight.shape[0]
        if self.vocabulary < 1 or (rows and not 0 <= self.first <= self.vocabulary - rows):
            raise ConfigError(
                f"VocabularySlice got rows {self.first} to {self.first + rows} of a vocabulary of {self.vocabulary}.",
                fix="pass the index of this rank's first row, and the number of rows on all ranks together.",
            )

    @classmethod
    def from_dtensor(cls, weight: Tensor, bias: Tensor | None = None) -> VocabularySlice:
        """The slice that this rank has of a sharded layer, as ``parallelize_module`` with ``ColwiseParallel`` leaves it.

        Gradients of the slice flow back into the DTensors. Make it again for every forward: where the DTensors' values change,
        or are gathered and let go again (FSDP), it does not follow.

        Args:
            weight: ``[V, H]`` a DTensor that is split along its rows in one dimension of its mesh, and whole in the others. A
                tied embedding arrives like this too (sharded by ``RowwiseParallel``, and tied again afterwards:
                ``parallelize_module`` gives both modules a parameter of their own).
            bias: ``[V]``, likewise, or None.

        Raises:
            ConfigError: it is no DTensor, or not split like this.
        """
        mesh_dimension = _split_dimension("weight", weight)
        if bias is not None:
            fits = is_dtensor(bias) and bias.device_mesh == weight.device_mesh  # type: ignore[attr-defined]
            if not fits or _split_dimension("bias", bias) != mesh_dimension or bias.shape != weight.shape[:1]:
                raise ConfigError(
                    f"VocabularySlice.from_dtensor got {_described('weight', weight)} and {_described('bias', bias)}; expected "
                    "both split along the vocabulary over the same ranks.",
                    fix="shard weight and bias of the output layer together (ColwiseParallel does).",
                )
        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ConfigError(
                f"VocabularySlice.from_dtensor: this rank is not in the mesh of {_described('weight', weight)}.",
                fix="call it on the ranks that hold the output layer.",
            )
        vocabulary = weight.shape[0]
        # A DTensor is split as torch.chunk splits: all parts alike but the last ones, of which some may be empty.
        size = -(-vocabulary // mesh.size(mesh_dimension))
        first = min(coordinate[mesh_dimension] * size, vocabulary)
        local: Tensor = weight.to_local()  # type: ignore[attr-defined]
        expected = min(size, vocabulary - first)
        if local.shape[0] != expected:
            raise ConfigError(
                f"VocabularySlice.from_dtensor: this rank has {local.shape[0]} rows of {_described('weight', weight)}; "
                f"expected {expected}, as even shards have.",
                fix="make the slice yourself: VocabularySlice(weight.to_local(), first, vocabulary, group=...).",
            )
        local_bias = None if bias is None else bias.to_local()  # type: ignore[attr-defined]
        return cls(local, first, vocabulary, local_bias, mesh.get_group(mesh_dimension))


def is_dtensor(tensor: object) -> bool:
    """Whether it is a ``torch.distributed.tensor.DTensor``; imports nothing."""
    # Before anybody imported that module there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _described(name: str, tensor: Tensor) -> str:
    if not is_dtensor(tensor):
        return f"{name} {tuple(tensor.shape)}, a plain {type(tensor).__name__}"
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements = ", ".join(map(repr, tensor.placements))  # type: ignore[attr-defined]
    return f"{name} {tuple(tensor.shape)}, a DTensor with placements ({placements}) on a mesh of {tuple(mesh.shape)}"


def _split_dimension(name: str, tensor: Tensor) -> int:
    """The one mesh dimension along which rows are split."""
    if is_dtensor(tensor):
        from torch.distributed.tensor import Replicate, Shard

        placements: Any = tensor.placements  # type: ignore[attr-defined]
        split = [index for index, placement in enumerate(placements) if placement != Replicate()]
        # Not a subclass: the shards of FSDP over tensor parallelism are interleaved.
        if len(split) == 1 and type(placements[split[0]]) is Shard and placements[split[0]].dim == 0:
            return split[0]
    raise ConfigError(
        f"VocabularySlice.from_dtensor got {_described(name, tensor)}; expected a DTensor that is split along the vocabulary "
        "(Shard(0)) in one dimension of the mesh and whole in the others.",
        fix="shard the output layer with ColwiseParallel, a tied embedding with RowwiseParallel; where FSDP shards it too, "
        "make the slice while it is gathered; where nothing is split, use linear_token_logprobs.",
    )
