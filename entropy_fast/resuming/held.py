"""What a sweep adds up, seen as tensors that can be written and filled again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from entropy_fast.errors import ResumeError

__all__ = ["Accumulator", "Held", "Tables", "UnitRows", "flags_of", "refuse_other_form"]


class Accumulator(Protocol):
    """Numbers that every microbatch adds to, or writes its own part of."""

    def clear(self) -> None:
        """Back to empty."""

    def kept(self) -> Mapping[str, Tensor]:
        """All that it holds, by name: its own memory, or small copies."""

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Take over what `kept` once gave, in place: who has its tensors sees it too."""


class UnitRows(Accumulator, Protocol):
    """An accumulator that also holds something of every unit by itself, final as soon as its unit has been visited."""

    def rows(self, start: int, stop: int) -> Mapping[str, Tensor]:
        """Of successive units by name, ``[stop - start, ...]``; its own memory."""

    def restore_rows(self, start: int, stop: int, found: Mapping[str, Tensor]) -> None:
        """Take over what `rows` once gave, in place."""


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tensors as an accumulator.

    Attributes:
        tensors: by name, written to in place.
        overwritten: whether every part of them is written anew when a sweep starts again, so that they need no clearing.
    """

    tensors: Mapping[str, Tensor]
    overwritten: bool = False

    def clear(self) -> None:
        """See `Accumulator.clear`."""
        if not self.overwritten:
            for tensor in self.tensors.values():
                tensor.zero_()

    def kept(self) -> Mapping[str, Tensor]:
        """See `Accumulator.kept`."""
        return self.tensors

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """See `Accumulator.restore`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(found[name])


@dataclasses.dataclass(frozen=True)
class Held:
    """Everything that a sweep adds up.

    Attributes:
        sums: by name, written whole each time.
        units: of every unit by itself, written once; one of ``sums`` too. None where no unit is kept.
    """

    sums: Mapping[str, Accumulator]
    units: UnitRows | None = None

    def clear(self) -> None:
        """Back to empty."""
        for own in self.sums.values():
            own.clear()

    def and_also(self, name: str, own: Accumulator) -> Held:
        """With one more."""
        return dataclasses.replace(self, sums={**self.sums, name: own})

    def kept(self) -> dict[str, Tensor]:
        """All tensors of the sums, by the sum's name and their own."""
        return {f"{name}/{key}": tensor for name, own in self.sums.items() for key, tensor in own.kept().items()}

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Fill the sums.

        Raises:
            ResumeError: these are not the tensors that this sweep has.
        """
        refuse_other_form(found, self.kept())
        for name, own in self.sums.items():
            own.restore({key: found[f"{name}/{key}"] for key in own.kept()})


def refuse_other_form(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise unless names, dtypes and shapes are the same.

    Raises:
        ResumeError: they are not.
    """
    theirs, ours = ({name: (t.dtype, t.shape) for name, t in own.items()} for own in (found, expected))
    if theirs != ours:
        raise ResumeError(
            f"a checkpoint holds other tensors ({len(theirs)}) than the sweep that it is of adds up ({len(ours)}).",
            fix="repeat the very call that wrote it, with the same version; or delete it to begin anew.",
        )


def flags_of(flags: list[bool]) -> Tensor:
    """Flags as a tensor, which is what can be written."""
    return torch.tensor(flags, dtype=torch.bool)
