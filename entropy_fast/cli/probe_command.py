"""``entropy-fast probe``: forecast from files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropy_fast.cli.bars import progress
from entropy_fast.cli.candidate_option import CandidateOption, candidate_updates
from entropy_fast.cli.launched import launched_ranks
from entropy_fast.cli.model_options import (
    CheckpointingOption,
    DeviceOption,
    DtypeOption,
    FourBitOption,
    ModelOption,
    given_path,
)
from entropy_fast.cli.probe_options import changed_options, with_probe_options
from entropy_fast.cli.quiet import quiet_libraries
from entropy_fast.cli.showing import JsonOption, Showing, VerboseOption
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.errors import ConfigError

if TYPE_CHECKING:
    from entropy_fast.estimates.attribution import Role
    from entropy_fast.rollouts import Rollouts

__all__ = ["probe"]


@with_probe_options
def probe(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(parser=given_path, help="Run folder with run.json.", show_default=False)
    ] = None,
    model: ModelOption = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FOLDER",
            help="LoRA adapter folder (safetensors); every weight is trained without.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="PATH", help="optimizer.pt or checkpoint folder.", show_default=False),
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="FILE", help="Update batch, .jsonl or .parquet.", show_default=False),
    ] = None,
    entropy_rollouts: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help="Independent entropy batch for the two-batch estimate.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FOLDER",
            help="Folder for the results; the run folder by default.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = None,
    load_in_4bit: FourBitOption = None,
    gradient_checkpointing: CheckpointingOption = None,
    device: DeviceOption = None,
    candidate: CandidateOption = None,
    picture: Annotated[
        bool | None,
        typer.Option(
            "--picture/--no-picture", help="contributions.png; drawn where matplotlib is.", show_default=False
        ),
    ] = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Forecast the entropy change of the next update from a run folder, or from single files.

    Options that are not given are the run folder's. Under torchrun all processes make one forecast, and the first one writes.
    """
    showing = Showing.of(context, verbose=verbose, as_json=as_json)
    context.with_resource(quiet_libraries())
    from entropy_fast.api import fast_delta_h1
    from entropy_fast.cli.inputs import resolve
    from entropy_fast.cli.origin import command_line, found_tokenizer, optimizer_kind
    from entropy_fast.cli.saving import Beside, save_and_show, show_online
    from entropy_fast.columns.functional import usual_functionals
    from entropy_fast.report.picture import require_matplotlib
    from entropy_fast.resuming import discard_checkpoint
    from entropy_fast.run_folder.placing import check_folder
    from entropy_fast.run_folder.provenance import provenance_of
    from entropy_fast.run_folder.response_table import response_table

    target = out or run
    model_options = {
        "name": model,
        "dtype": dtype,
        "load_in_4bit": load_in_4bit,
        "gradient_checkpointing": gradient_checkpointing,
        "device": device,
    }
    given = {"rank_timeout": options.get("rank_timeout")}
    seconds = changed_options(EstimateOptions(), RunOptions(), given)[1].rank_timeout
    with launched_ranks(seconds) as team:
        shows = team.rank == 0
        team.enter("reading files")
        if picture:
            require_matplotlib()
        if target is None:
            raise ConfigError("probe: no run folder and no --out, so there is nowhere to write.", fix="pass --out DIR.")
        inputs = resolve(run, model_options, adapter, optimizer, rollouts, entropy_rollouts, options)
        updates = candidate_updates(candidate or (), inputs.estimate)
        update, entropy = inputs.read_rollouts()
        # The question of a kept step; its scores are of its own model in its own precision too.
        as_asked = all(given is None for given in (entropy_rollouts, *options.values()))
        as_kept = as_asked and all(given is None for given in (model, dtype, load_in_4bit))
        check_folder(target)
        team.enter("loading the model")
        with progress(f"Loading {inputs.model.name}", shows=shows):
            policy, optimizer_at_hand = inputs.load()
        how = inputs.run if team.size == 1 else dataclasses.replace(inputs.run, ranks="all", rank_timeout=seconds)
        with progress("Forecast", shows=shows) as bars:
            result = fast_delta_h1(
                policy,
                optimizer_at_hand,
                update,
                entropy_rollouts=entropy,
                coefficients=inputs.coefficients(update),
                functionals=usual_functionals(update if entropy is None else entropy),
                updates=inputs.updates(updates, update),
                scores=inputs.scores(update) if as_kept else None,
                estimate=inputs.estimate,
                run=how,
                on_progress=bars.report,
                team=team if team.size > 1 else None,
                keeps_checkpoint=True,
            )
        team.enter("writing")
        team.meet()  # nobody writes what somebody has not got
        if shows:
            tokenizer, without_texts = found_tokenizer(inputs.model, [inputs.adapter])
            batches: dict[Role, Rollouts] = (
                {"both": update} if entropy is None else {"entropy": entropy, "update": update}
            )
            beside = Beside(
                provenance_of([command_line(context)], inputs.model, inputs.files, optimizer_kind(optimizer_at_hand)),
                response_table(result, batches, tokenizer),
                without_texts,
                picture,
            )
            save_and_show(result, target, beside, showing)
            if inputs.bundle is not None and as_asked:
                show_online(inputs.bundle.online, result, showing.aside)
        if how.checkpoint is not None:
            team.meet()  # the result is written: nobody needs what led to it
            discard_checkpoint(os.fspath(how.checkpoint), team)
