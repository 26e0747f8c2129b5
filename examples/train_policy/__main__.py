"""The command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from entropy_fast.cli.quiet import quiet_libraries
from entropy_fast.errors import EntropyFastError
from examples.train_policy import SMALL, SMOLLM2, train


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_policy", description="Train a policy by GRPO and leave run folders."
    )
    parser.add_argument("--policy", choices=["small", "smollm2"], default="small")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for everything; one in the user's cache without"
    )
    parser.add_argument("--steps", type=int, help="GRPO steps")
    parser.add_argument(
        "--checkpoints", type=_numbers, metavar="5,20,60", help="after how many steps run folders are left"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    defaults = SMALL if given.policy == "small" else SMOLLM2
    steps = defaults.steps if given.steps is None else given.steps
    checkpoints = defaults.checkpoints if given.checkpoints is None else given.checkpoints
    try:
        settings = dataclasses.replace(defaults, steps=steps, checkpoints=checkpoints, seed=given.seed)
        with quiet_libraries():
            for checkpoint in train(settings, given.out):
                print(checkpoint)
    except EntropyFastError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
