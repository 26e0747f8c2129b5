"""``entropy-fast demo``: the whole story on a small pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from entropy_fast.cli.bars import progress
from entropy_fast.cli.model_options import given_path
from entropy_fast.cli.quiet import quiet_libraries
from entropy_fast.cli.showing import JsonOption, Showing, VerboseOption
from entropy_fast.errors import ConfigError, escaped

__all__ = ["demo"]


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(parser=given_path, metavar="FOLDER", help="Folder for everything the demo leaves.")
    ] = Path("runs/demo"),
    prompts: Annotated[int, typer.Option(min=2, help="Prompts in the batch that is probed.")] = 8,
    training_prompts: Annotated[int, typer.Option(min=1, help="Prompts in each GRPO step before it.")] = 4,
    responses: Annotated[int, typer.Option(min=2, help="Responses to each prompt.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generation budget.")] = 48,
    steps: Annotated[int, typer.Option(min=2, help="GRPO steps before the probe.")] = 3,
    learning_rate: Annotated[float, typer.Option(min=1e-12, help="AdamW's.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Of prompts, sampling and LoRA initialisation.")] = 0,
    by_token: Annotated[
        bool, typer.Option("--by-token/--no-by-token", help="Colour the report's tokens by their shares.")
    ] = True,
    model: Annotated[str | None, typer.Option(help="Another model than the embedded one.", show_default=False)] = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA for a few real GRPO steps, then forecast what the next one does to the entropy."""
    showing = Showing.of(context, verbose=verbose, as_json=as_json)
    context.with_resource(quiet_libraries())
    try:
        from entropy_fast.demo import DemoSettings, run_demo
        from entropy_fast.demo.story import DEFAULT_MODEL
    except ImportError as error:
        raise ConfigError(
            f"the demo needs a package that is not installed: {error.name}.", fix="pip install 'entropy-fast[demo]'."
        ) from error
    from entropy_fast.cli.origin import command_line, program
    from entropy_fast.cli.saving import Beside, save_and_show
    from entropy_fast.report.html import write_report
    from entropy_fast.report.realised import print_realised
    from entropy_fast.run_folder.placing import check_folder
    from entropy_fast.run_folder.provenance import provenance_of
    from entropy_fast.run_folder.response_table import response_table
    from entropy_fast.run_folder.run_reading import read_run
    from entropy_fast.run_folder.validation_files import write_validation
    from entropy_fast.truth import validation_of

    check_folder(out)
    settings = DemoSettings(
        prompts=prompts,
        training_prompts=training_prompts,
        responses_per_prompt=responses,
        max_new_tokens=max_new_tokens,
        optimizer_steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        model=model or DEFAULT_MODEL,
        by_token=by_token,
    )
    with progress("Demo") as bars:
        outcome = run_demo(settings, out, bars.say, bars.report)
    files = {"adapter": out / "adapter", "optimizer": out / "optimizer.pt", "rollouts": out / "rollouts.jsonl"}
    repeat = ["probe", str(out), "--out", "DIR"]
    commands = [command_line(context), ["entropy-fast", *repeat]]
    provenance = provenance_of(commands, outcome.source, files, outcome.optimizer)
    responses = response_table(outcome.result, {"both": outcome.rollouts}, outcome.tokenizer)
    save_and_show(outcome.result, out, Beside(provenance, responses), showing)
    print_realised(outcome.result, outcome.realised, showing.aside, verbose=verbose)
    write_validation({str(out): validation_of(outcome.result, outcome.realised)}, out)
    page = write_report([read_run(out)], out / "report.html")
    showing.aside.print(Text(f"to look at in a browser, or to pass on: {escaped(str(page))}"), soft_wrap=True)
    again = f"repeat the probe from these files: {escaped(' '.join([*program(), *repeat]))}"
    showing.aside.print(Text(again), soft_wrap=True)
