"""``entropy-fast probe``: forecast from files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from entropy_fast.cli.console import errors, output, progress, quiet_libraries
from entropy_fast.cli.model_options import (
    CheckpointingOption,
    DeviceOption,
    DtypeOption,
    FourBitOption,
    ModelOption,
)
from entropy_fast.errors import ConfigError

__all__ = ["probe"]


def probe(
    run: Annotated[Path | None, typer.Argument(help="Run folder with run.json.", show_default=False)] = None,
    model: ModelOption = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="LoRA adapter folder (safetensors); every weight is trained without.", show_default=False),
    ] = None,
    optimizer: Annotated[Path | None, typer.Option(help="optimizer.pt of Adam or AdamW.", show_default=False)] = None,
    rollouts: Annotated[Path | None, typer.Option(help="Update batch, .jsonl or .parquet.", show_default=False)] = None,
    entropy_rollouts: Annotated[
        Path | None, typer.Option(help="Independent entropy batch for the two-batch estimate.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; the run folder by default.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, one_pass, two_pass, or jvp (two batches).")] = "auto",
    weighting: Annotated[
        str | None,
        typer.Option(help="dr_grpo, per_token or sequence; the run folder's, or dr_grpo.", show_default=False),
    ] = None,
    entropy_estimator: Annotated[
        str | None, typer.Option(help="score_function (default) or rao_blackwell.", show_default=False)
    ] = None,
    importance_ratio: Annotated[
        str | None, typer.Option(help="none (default) or token: from old_logprobs.", show_default=False)
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Clip range ε of importance ratios; none by default.", show_default=False)
    ] = None,
    clip_high: Annotated[
        float | None, typer.Option(help="Upper ε of the clip range where it differs.", show_default=False)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the optimizer's.", show_default=False)] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Blocks of prompts as units: less work, a coarser error.", show_default=False)
    ] = None,
    prompts_per_microbatch: Annotated[
        int | None, typer.Option(help="Prompts in one forward.", show_default=False)
    ] = None,
    full_kernel: Annotated[
        bool | None,
        typer.Option(
            "--full-kernel/--no-full-kernel",
            help="two_pass: keep the influence kernel K. one_pass keeps it where it fits.",
            show_default=False,
        ),
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help='one_pass: for gradients kept, "4GiB" by default.', show_default=False)
    ] = None,
    by_sequence: Annotated[
        bool | None,
        typer.Option("--by-sequence/--no-by-sequence", help="Shares of sequences (one_pass).", show_default=False),
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Forwards under bfloat16 autocast.", show_default=False)
    ] = None,
    accumulate_on: Annotated[
        str | None, typer.Option(help="Gradient sums on: device (default) or cpu.", show_default=False)
    ] = None,
    conditional_variance: Annotated[
        str | None,
        typer.Option(
            help="two_pass, two batches: per_prompt (default) or alpha, the double backward.", show_default=False
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option("--strict/--no-strict", help="A parameter without a gradient is an error.", show_default=False),
    ] = None,
    max_excluded_share: Annotated[
        float | None,
        typer.Option(help="Largest share of the squared gradient without second moment (0.01).", show_default=False),
    ] = None,
    dtype: DtypeOption = None,
    load_in_4bit: FourBitOption = None,
    gradient_checkpointing: CheckpointingOption = None,
    device: DeviceOption = None,
    picture: Annotated[
        bool | None,
        typer.Option(
            "--picture/--no-picture", help="contributions.png; drawn where matplotlib is.", show_default=False
        ),
    ] = None,
) -> None:
    """Forecast the entropy change of the next update from a run folder, or from single files."""
    quiet_libraries()
    from entropy_fast.api import fast_delta_h1
    from entropy_fast.cli.inputs import resolve
    from entropy_fast.report.picture import require_matplotlib, write_picture
    from entropy_fast.report.terminal import print_result
    from entropy_fast.run_folder.result_files import prepare_folder, write_result

    undrawn = require_matplotlib(quiet=picture is None) if picture is not False else None
    target = out or run
    if target is None:
        raise ConfigError("probe: no run folder and no --out, so there is nowhere to write.", fix="pass --out DIR.")
    model_options = {
        "name": model,
        "dtype": dtype,
        "load_in_4bit": load_in_4bit,
        "gradient_checkpointing": gradient_checkpointing,
        "device": device,
    }
    inputs = resolve(run, model_options, adapter, optimizer, rollouts, entropy_rollouts)
    changes: dict[str, Any] = {
        "weighting": weighting,
        "entropy_estimator": entropy_estimator,
        "importance_ratio": importance_ratio,
        "clip": clip,
        "clip_high": clip_high,
        "mode": None if blocks is None else "blocks",
        "blocks": blocks,
        "prompts_per_microbatch": prompts_per_microbatch,
        "learning_rate": learning_rate,
        "full_kernel": full_kernel,
        "memory_budget": memory_budget,
        "by_sequence": by_sequence,
        "autocast_bfloat16": bf16,
        "accumulate_on": accumulate_on,
        "conditional_variance": conditional_variance,
        "strict": strict,
        "max_excluded_share": max_excluded_share,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    if importance_ratio == "none" or clip is not None:
        # What a run folder says about clipping goes with what it belongs to.
        given = {"clip": None, "clip_high": None, **given}
    inputs = dataclasses.replace(inputs, settings=dataclasses.replace(inputs.settings, **given))
    estimate, options = inputs.options()
    options = dataclasses.replace(options, engine=engine)
    update, entropy = inputs.read_rollouts()
    prepare_folder(target)
    console = output()
    with errors().status(Text(f"Loading {inputs.model.name}")):
        policy, state = inputs.load()
    with progress() as report:
        result = fast_delta_h1(
            policy,
            state,
            update,
            entropy_rollouts=entropy,
            estimate=estimate,
            run=options,
            on_progress=report,
        )
    print_result(result, console)
    paths = write_result(result, target)
    if undrawn is not None:
        console.print(Text(f"note: contributions.png was not drawn: {undrawn}", style="yellow"))
    elif picture is not False:
        paths.append(write_picture(result, target / "contributions.png"))
    console.print(Text("written: " + ", ".join(map(str, paths))), soft_wrap=True)
