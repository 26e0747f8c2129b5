"""``entropy-fast doctor``: the checklist, on the machine and on the user's own model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from entropy_fast.cli.console import errors, output, quiet_libraries
from entropy_fast.cli.model_options import (
    CheckpointingOption,
    DeviceOption,
    DtypeOption,
    FourBitOption,
    ModelOption,
    given_path,
    model_source,
)
from entropy_fast.errors import ConfigError

if TYPE_CHECKING:
    from entropy_fast.report.doctor import Check

__all__ = ["doctor"]

MARKS = {True: Text("ok", style="green"), False: Text("FAIL", style="bold red"), None: Text("info")}


def doctor(
    run: Annotated[
        Path | None, typer.Argument(parser=given_path, help="Run folder with run.json.", show_default=False)
    ] = None,
    model: ModelOption = None,
    adapter: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="FOLDER", help="LoRA adapter folder.", show_default=False),
    ] = None,
    optimizer: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="PATH", help="optimizer.pt or checkpoint folder.", show_default=False),
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Rollouts; random tokens stand in without them.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = None,
    load_in_4bit: FourBitOption = None,
    gradient_checkpointing: CheckpointingOption = None,
    device: DeviceOption = None,
) -> None:
    """Check the installation and, with a model, whether it can be probed: a small probe of two prompts."""
    quiet_libraries()
    from entropy_fast.cli.inputs import load_policy, read_batch, require_no_pipe, resolve
    from entropy_fast.report.doctor import check_environment, check_model, verdict
    from entropy_fast.report.doctor_rows import synthetic_rollouts
    from entropy_fast.step import optimizer_from_file

    checks = check_environment()
    model_options = {
        "name": model,
        "dtype": dtype,
        "load_in_4bit": load_in_4bit,
        "gradient_checkpointing": gradient_checkpointing,
        "device": device,
    }
    if run is not None:
        inputs = resolve(run, model_options, adapter, optimizer, rollouts, None, {})
        batch = inputs.read_rollouts()[0]
        with errors().status(Text(f"Checking {inputs.model.name}")):
            policy, optimizer_at_hand = inputs.load()
            checks += check_model(policy, optimizer_at_hand, batch, estimate=inputs.estimate, run=inputs.run)
    elif (source := model_source(None, **model_options)) is not None:
        require_no_pipe(optimizer, or_folder=True)
        require_no_pipe(rollouts)
        with errors().status(Text(f"Loading {source.name}")):
            policy = load_policy(source, adapter)
        known = None if optimizer is None else optimizer_from_file(optimizer, policy)
        if rollouts is None:
            batch = synthetic_rollouts(policy.config.get_text_config().vocab_size)
        else:
            batch = read_batch(rollouts, source)
        with errors().status(Text(f"Checking {source.name}")):
            checks += check_model(policy, known, batch)
    elif any(value is not None for value in (*model_options.values(), adapter, optimizer, rollouts)):
        raise ConfigError("doctor: files or model options were given without a model.", fix="pass RUN or --model.")
    checks.append(verdict(checks))
    _show(checks)
    if checks[-1].passed is False:
        raise typer.Exit(code=1)


def _show(checks: list[Check]) -> None:
    table = Table(title="entropy-fast doctor", title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(Text(check.name), MARKS[check.passed], Text(check.detail))
    output().print(table)
