"""Keeping a training step: everything about it just before ``optimizer.step()``, so that its forecast can be repeated offline.

run.json               model, files and options, as in every run folder
rollouts.parquet       the batch
coefficients.parquet   the update by response token, and log-probs and entropies where they were found
gradient.safetensors   .grad by parameter name
optimizer.pt           the optimizer's state, with parameter names
adapter/ or model/     LoRA adapter, or the whole model
manifest.json          written last: step, facts, the number found online, and the hash of every file
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from entropy_fast._version import __version__
from entropy_fast.checks.parameter_registry import unwrap_model
from entropy_fast.columns import TokenScores
from entropy_fast.columns.given import given_update
from entropy_fast.config import EstimateOptions, RunOptions
from entropy_fast.digests import sha256_of
from entropy_fast.engines import engine_kind
from entropy_fast.errors import BundleError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.rollouts import Rollouts, write_rollouts
from entropy_fast.run_folder.bundle_reading import (
    ADAPTER,
    BUNDLE_NAME,
    BUNDLE_SCHEMA,
    MODEL,
    Bundle,
    read_bundle,
    rendered,
)
from entropy_fast.run_folder.kept_model import kept_model
from entropy_fast.run_folder.manifest import RunManifest, write_manifest
from entropy_fast.run_folder.placing import new_folder
from entropy_fast.run_folder.restoring import floating_dtypes
from entropy_fast.run_folder.token_tables import write_token_tables
from entropy_fast.step.optimizer_saving import named_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Bundle", "read_bundle", "write_bundle"]

ROLLOUTS, OPTIMIZER = "rollouts.parquet", "optimizer.pt"
COEFFICIENTS, GRADIENT = "coefficients.parquet", "gradient.safetensors"


def write_bundle(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    coefficients: tuple[Tensor, Tensor | None],
    estimate: EstimateOptions | None = None,
    run: RunOptions | None = None,
    step: int,
    facts: Mapping[str, object],
    base_model: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    result: DeltaH1Result | None = None,
    scores: TokenScores | None = None,
) -> Path:
    """Keep a step. Call it after backward and clipping, before ``optimizer.step()``, and on one rank alone.

    The folder is written under a hidden name beside it and renamed when it is whole; on any exception there is nothing. What
    a forecast was given besides (an entropy mask, an entropy batch) is not kept. Of an adapter's base the name is kept and not
    the weights: they have to be there, unchanged, when the step is read.

    Args:
        folder: where to; must not exist, or be empty.
        model: a transformers model, or a peft one over it, possibly wrapped.
        optimizer: ``torch.optim.Adam`` or ``AdamW`` that trains it, possibly wrapped by accelerate.
        rollouts: the batch the step is made from.
        coefficients: -∂L/∂(log-prob), [N] or [N, T] in the rollouts' columns, and -∂L/∂(entropy) [N, T]; None for no second.
        estimate: of the forecast; None for the defaults.
        run: how the forecast was run; None for the defaults.
        step: number of the training step.
        facts: what else is to be known (loss, learning rate, estimand, temperature), as JSON has it.
        base_model: path or hub name of an adapter's base; None for the one in the adapter's configuration.
        tokenizer: kept beside the weights; None for none.
        result: the forecast made online, whose number is kept; None for none.
        scores: log-probs and entropies [N, T] found online; None for none.

    Returns:
        The folder.

    Raises:
        BundleError: the model cannot be saved so that it comes back, there is no gradient where the forecast needs one, a
            trained parameter is not the optimizer's, or the facts are no JSON.
        OptimizerStateError: another kind of optimizer than Adam or AdamW, whose state cannot be read from a file.
        ConfigError: the coefficients do not fit the rollouts.
        RunFolderError: the folder exists, or cannot be.
        OutputFileError: a file cannot be written.
    """
    folder = Path(folder)
    estimate, run = estimate or EstimateOptions(), run or RunOptions()
    module = unwrap_model(model)
    state = named_state(optimizer, module)
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    _check_held(named, state)
    kept = kept_model(module, base_model)
    gradient = _gradient(named)
    if estimate.gradient == "live" and not gradient:
        raise BundleError(
            "gradient='live' and no trainable parameter has a .grad.",
            fix="keep the step after backward() and before optimizer.step() and zero_grad().",
        )
    manifest = RunManifest(
        kept.source,
        ROLLOUTS,
        OPTIMIZER,
        ADAPTER if kept.is_adapter else None,
        estimate=_with_step(estimate, run, result),
        run=run,
        gradient=GRADIENT if gradient else None,
        coefficients=COEFFICIENTS,
    )
    document = {
        "schema": BUNDLE_SCHEMA,
        "version": __version__,
        "step": _step_number(step),
        "facts": _as_json(facts),
        "online": None if result is None else _online(result),
        "trainable": list(named),
        "dtypes": floating_dtypes(module),
    }
    tables = _tables(rollouts, coefficients, scores)
    with new_folder(folder) as temporary:
        write_rollouts(rollouts, temporary / ROLLOUTS)
        write_token_tables(tables, rollouts.loss_mask, temporary / COEFFICIENTS)
        if gradient:
            save_file(gradient, str(temporary / GRADIENT))
        torch.save(state, temporary / OPTIMIZER)
        weights = temporary / (ADAPTER if kept.is_adapter else MODEL)
        kept.save(weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(weights))
        write_manifest(manifest, temporary)
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {path.relative_to(temporary).as_posix(): sha256_of(path) for path in paths}
        (temporary / BUNDLE_NAME).write_text(rendered({**document, "files": files}), encoding="utf-8")
    return folder


def _gradient(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``.grad`` as it stands, copied: in trainers it is often a view into a bucket."""
    found = {}
    for name, parameter in named.items():
        if parameter.grad is None:
            continue
        if parameter.grad.layout != torch.strided:
            raise BundleError(f"the gradient of '{name}' is sparse.", fix="train the embedding with sparse=False.")
        found[name] = parameter.grad.detach().to(device="cpu", copy=True).contiguous()
    return found


def _check_held(named: Mapping[str, nn.Parameter], state: Mapping[str, Any]) -> None:
    held = {name for group in state["param_groups"] for name in group["param_names"]}
    if lacking := [name for name in named if name not in held]:
        raise BundleError(
            f"the trainable '{lacking[0]}' is not the optimizer's ({len(lacking)} of {len(named)} in all), so it "
            "could not be matched when it is read.",
            fix="give it to the optimizer, or set requires_grad to False.",
        )


def _with_step(estimate: EstimateOptions, run: RunOptions, result: DeltaH1Result | None) -> EstimateOptions:
    """With the step that was forecast: what is left open means another one for a file than for a live optimizer."""
    if estimate.step is not None:
        return estimate
    possible = engine_kind(run).no_next_step(estimate, run) is None
    whole = possible if result is None else result.geometry == "next_step"
    return dataclasses.replace(estimate, step="next" if whole else "adam_static")


def _tables(
    rollouts: Rollouts, coefficients: tuple[Tensor, Tensor | None], scores: TokenScores | None
) -> dict[str, Tensor]:
    of_logprob, of_entropy = coefficients
    given_update(
        of_logprob if of_entropy is None else (of_logprob, of_entropy), rollouts
    )  # says what is wrong with them
    of_logprob = torch.as_tensor(of_logprob)
    if of_logprob.dim() == 1:
        of_logprob = of_logprob.unsqueeze(1).expand(rollouts.loss_mask.shape)
    tables = {"of_logprob": of_logprob}
    if of_entropy is not None:
        tables["of_entropy"] = torch.as_tensor(of_entropy)
    if scores is not None:
        tables |= {"logprobs": scores.logprobs, "entropies": scores.entropies}
    return tables


def _online(result: DeltaH1Result) -> dict[str, Any]:
    """The number itself; null for what was not asked for or is not known."""
    found: dict[str, Any] = {
        "delta_h1": _number(result.delta_h1),
        "std_error": _number(result.std_error),
        "forecast": _number(result.forecast.value),
        "unit": result.unit,
        "learning_rate": _number(result.learning_rate),
        "engine": result.engine,
    }
    if result.split is not None:
        parts = ("direct", "visitation", "total")
        found["split"] = {part: _number(getattr(result.split, part).value) for part in parts}
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _step_number(step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise BundleError(f"step is {step!r}.", fix="pass the number of the training step, 0 or more.")
    return step


def _as_json(facts: Mapping[str, object]) -> dict[str, Any]:
    try:
        found = json.loads(json.dumps(dict(facts), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"facts are no JSON: {error}", fix="use texts, finite numbers, lists and mappings of these."
        ) from error
    plain: dict[str, Any] = found
    return plain
