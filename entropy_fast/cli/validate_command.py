"""``entropy-fast validate``: take the step that was forecast, look, put it back, and say whether the forecast came true."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from entropy_fast.cli.bars import progress
from entropy_fast.cli.model_options import given_path
from entropy_fast.cli.quiet import quiet_libraries
from entropy_fast.cli.showing import JsonOption, Showing, VerboseOption
from entropy_fast.errors import ConfigError, escaped

__all__ = ["validate"]

HELD_OUT = "held_out.jsonl"


def validate(
    context: typer.Context,
    runs: Annotated[
        list[Path],
        typer.Argument(parser=given_path, metavar="RUN...", help="Run folders with run.json.", show_default=False),
    ],
    held_out: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE",
            help=f"Other responses of the same policy, for the total; {HELD_OUT} of the run folder where it is there.",
            show_default=False,
        ),
    ] = None,
    etas: Annotated[str, typer.Option(help="Multiples of the optimizer's step.")] = "0.01,0.03,0.1,0.3,1,3,10",
    out: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FOLDER",
            help="Folder for validation.json and validation.png; the (first) run folder by default.",
            show_default=False,
        ),
    ] = None,
    picture: Annotated[bool, typer.Option("--picture/--no-picture", help="validation.png.")] = True,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hold forecasts of run folders against what their steps really do to the entropy."""
    showing = Showing.of(context, verbose=verbose, as_json=as_json)
    context.with_resource(quiet_libraries())
    from entropy_fast.report.layout import files_line
    from entropy_fast.report.picture import require_matplotlib
    from entropy_fast.report.validation import print_validation, write_validation_picture
    from entropy_fast.run_folder.placing import check_folder
    from entropy_fast.run_folder.validation_files import write_validation

    multiples = _numbers(etas)
    if held_out is not None and len(runs) > 1:
        raise ConfigError("validate: --held-out with several run folders.", fix=f"put a {HELD_OUT} into each of them.")
    undrawn = require_matplotlib(quiet=True) if picture else None
    target = out or runs[0]
    check_folder(target)
    console, found = showing.aside, {}
    for run in runs:
        found[str(run)] = one = _validated(run, held_out, multiples)
        if not as_json:
            print_validation(str(run), one, console, verbose=verbose)
    written = [write_validation(found, target)]
    if picture and undrawn is None:
        written.append(write_validation_picture(found, target / "validation.png"))
    elif undrawn is not None:
        console.print(Text(f"note: validation.png was not drawn: {escaped(undrawn)}", style="yellow"))
    if as_json:
        showing.document(written[0].read_text(encoding="utf-8"))
    else:
        console.print(files_line(written, console.width), soft_wrap=True)


def _validated(run: Path, held_out: Path | None, etas: list[float]) -> Any:
    from entropy_fast.api import fast_delta_h1
    from entropy_fast.cli.inputs import resolve
    from entropy_fast.rollouts import read_rollouts
    from entropy_fast.truth import measure_delta_h, validation_of

    inputs = resolve(run, {}, None, None, None, None, {})
    update, entropy = inputs.read_rollouts()
    if entropy is not None:
        raise ConfigError(
            f"validate: {run} is of the two-batch estimate.",
            fix=f"name its entropy rollouts {HELD_OUT}, and not in run.json.",
        )
    apart = held_out or (run / HELD_OUT if (run / HELD_OUT).is_file() else None)
    others = None if apart is None else read_rollouts(apart)
    estimate = inputs.estimate
    if estimate.step is None:
        estimate = dataclasses.replace(estimate, step="next")
    with progress(f"Loading {inputs.model.name}"):
        policy, optimizer_at_hand = inputs.load()
    given = inputs.coefficients(update)
    with progress("Forecast") as bars:
        result = fast_delta_h1(
            policy,
            optimizer_at_hand,
            update,
            coefficients=given,
            scores=inputs.scores(update),
            estimate=estimate,
            run=inputs.run,
            on_progress=bars.report,
        )
    plain = dataclasses.replace(inputs.run, engine="one_pass", full_kernel=False, by_sequence=False, by_token=False)
    with progress("Taking the step and putting it back") as bars:
        found = measure_delta_h(
            policy,
            optimizer_at_hand,
            update,
            held_out=others,
            etas=etas,
            coefficients=given,
            estimate=estimate,
            run=plain,
            on_progress=bars.report,
        )
    return validation_of(result, found)


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"validate: --etas is {text!r}.", fix="pass numbers with commas between.") from error
    return found
