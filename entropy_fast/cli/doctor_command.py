"""``entropy-fast doctor``: the checklist, on the machine and on the user's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_fast.cli.bars import progress
from entropy_fast.cli.console import output
from entropy_fast.cli.exit_status import ExitStatus
from entropy_fast.cli.model_options import (
    CheckpointingOption,
    DeviceOption,
    DtypeOption,
    FourBitOption,
    ModelOption,
    given_path,
    model_source,
)
from entropy_fast.cli.quiet import quiet_libraries
from entropy_fast.cli.showing import JsonOption, Showing, VerboseOption
from entropy_fast.errors import ConfigError

__all__ = ["doctor"]


def doctor(
    context: typer.Context,
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
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check the installation and, with a model, whether it can be probed: a small probe of two prompts."""
    showing = Showing.of(context, verbose=verbose, as_json=as_json)
    context.with_resource(quiet_libraries())
    from entropy_fast.cli.inputs import load_policy, read_batch, require_no_pipe, resolve
    from entropy_fast.report.checklist import checklist_document, print_checklist
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
        with progress(f"Checking {inputs.model.name}"):
            policy, optimizer_at_hand = inputs.load()
            checks += check_model(policy, optimizer_at_hand, batch, estimate=inputs.estimate, run=inputs.run)
    elif (source := model_source(None, **model_options)) is not None:
        require_no_pipe(optimizer, or_folder=True)
        require_no_pipe(rollouts)
        with progress(f"Loading {source.name}"):
            policy = load_policy(source, adapter)
        known = None if optimizer is None else optimizer_from_file(optimizer, policy)
        if rollouts is None:
            batch = synthetic_rollouts(policy.config.get_text_config().vocab_size)
        else:
            batch = read_batch(rollouts, source)
        with progress(f"Checking {source.name}"):
            checks += check_model(policy, known, batch)
    elif any(value is not None for value in (*model_options.values(), adapter, optimizer, rollouts)):
        raise ConfigError("doctor: files or model options were given without a model.", fix="pass RUN or --model.")
    said = verdict(checks)
    if as_json:
        showing.document(checklist_document(checks, said))
    else:
        print_checklist(checks, said, output(), verbose=verbose)
    if said.passed is False:
        raise typer.Exit(code=ExitStatus.REFUSED)
