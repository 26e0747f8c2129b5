"""``entropy-fast sample``: prompts to rewarded rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from entropy_fast.cli.bars import progress
from entropy_fast.cli.model_options import DeviceOption, DtypeOption, FourBitOption, given_path, model_source
from entropy_fast.cli.quiet import quiet_libraries
from entropy_fast.cli.showing import JsonOption, Showing
from entropy_fast.errors import ConfigError, SamplingError, escaped

__all__ = ["sample"]


def sample(
    context: typer.Context,
    prompts: Annotated[Path, typer.Argument(parser=given_path, help="JSONL of objects with `prompt` and `answer`.")],
    model: Annotated[str, typer.Option(help="Model folder, hub id, FILE.gguf, or package:NAME/FILE.gguf.")],
    out: Annotated[
        Path, typer.Option(parser=given_path, metavar="FILE", help="Rollouts file to write, .jsonl or .parquet.")
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FOLDER",
            help="LoRA adapter of the policy that will be probed; the base model without.",
            show_default=False,
        ),
    ] = None,
    responses: Annotated[int, typer.Option(help="Responses to each prompt, G.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Generation budget, recorded as L_max.")] = 256,
    temperature: Annotated[float, typer.Option(help="Anything but 1 biases a probe.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Anything but 1 biases a probe.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Anything but 0, which is all tokens, biases a probe.")] = 0,
    min_p: Annotated[float, typer.Option(help="Anything but 0 biases a probe.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends a response; may be repeated.")] = None,
    verifier: Annotated[
        str, typer.Option(help="Right is: last-number in the response equal to the answer, or exact-text.")
    ] = "last-number",
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    prompts_per_batch: Annotated[int, typer.Option(help="Prompts generated together.")] = 8,
    dtype: DtypeOption = None,
    load_in_4bit: FourBitOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample responses, reward them, and write rollouts a probe can read."""
    showing = Showing.of(context, verbose=False, as_json=as_json)
    context.with_resource(quiet_libraries())
    from entropy_fast.cli.inputs import load_policy
    from entropy_fast.rollouts import format_of, write_rollouts
    from entropy_fast.run_folder.model_source import load_tokenizer
    from entropy_fast.sampling import VERIFIERS, SamplingSettings, read_tasks, sample_rollouts

    if verifier not in VERIFIERS:
        raise ConfigError(f"sampling: verifier is {verifier!r}.", fix=f"use one of {', '.join(VERIFIERS)}.")
    settings = SamplingSettings(
        responses, max_new_tokens, temperature, top_p, tuple(stop or ()), seed, prompts_per_batch, top_k, min_p
    )
    tasks = read_tasks(prompts)
    format_of(out)
    if not out.parent.is_dir():
        raise SamplingError(f"folder {out.parent} of --out does not exist.", fix="make it, or pass another path.")
    source = model_source(None, name=model, dtype=dtype, load_in_4bit=load_in_4bit, device=device)
    assert source is not None
    with progress(f"Loading {source.name}"):
        policy, tokenizer = load_policy(source, adapter), load_tokenizer(source)
    with progress("Sample") as bars:
        rollouts = sample_rollouts(policy, tokenizer, tasks, VERIFIERS[verifier], settings, bars.report)
    write_rollouts(rollouts, out)
    assert rollouts.rewards is not None
    assert rollouts.advantages is not None
    mean = float(rollouts.rewards.mean())
    signal = sum(bool((rollouts.advantages[rollouts.rows_of_prompt(n)] != 0).any()) for n in range(rollouts.n_prompts))
    if as_json:
        found = {"responses": rollouts.n_sequences, "prompts": rollouts.n_prompts, "mean_reward": mean}
        showing.document(json.dumps(found | {"prompts_whose_rewards_differ": signal, "written": str(out)}, indent=2))
        return
    showing.aside.print(
        Text(
            f"{rollouts.n_sequences} responses to {rollouts.n_prompts} prompts, mean reward {mean:.3f}, "
            f"{signal} prompts whose rewards differ."
        )
    )
    showing.aside.print(Text(f"written: {escaped(str(out))}"), soft_wrap=True)
