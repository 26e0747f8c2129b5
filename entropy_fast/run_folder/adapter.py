"""Attaching a LoRA adapter from safetensors, with every one of its weights accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_fast.errors import RunFolderError
from entropy_fast.run_folder.loading import first_line, ordinary_files, require_every_weight
from entropy_fast.run_folder.model_source import ModelSource, load_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["attach_adapter", "load_policy"]

# Far above what matching takes: a pattern of PEFT's kind needs microseconds a name.
PATTERN_SECONDS = 10.0
# Runs in a process of its own: a match that backtracks for ever cannot be stopped from outside within one.
MATCH_ALL = """
import json, re, sys
names, patterns = json.load(sys.stdin)
for pattern in patterns:
    compiled = re.compile(pattern)
    for name in names:
        compiled.fullmatch(name)
"""


def load_policy(source: ModelSource, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The model with its adapter; without an adapter all floating-point parameters are trainable.

    Raises:
        RunFolderError: one of them cannot be found or loaded.
    """
    base = load_model(source)
    return base if adapter is None else attach_adapter(base, adapter)


def attach_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The model with a LoRA adapter in training mode, its weights read from safetensors.

    Raises:
        RunFolderError: the folder holds no adapter in safetensors; it does not fit the model; its file lacks weights or has
            others (of another adapter's name, with ``_orig_mod.`` in front); or a regular expression in its configuration does
            not come to an end.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise RunFolderError(
                f"adapter folder {adapter} has no {file}.",
                fix="save it with model.save_pretrained(folder) (safetensors; pickled .bin weights are not read).",
            )
    ordinary_files(adapter, "adapter folder")
    _check_patterns(adapter, [name for name, _ in model.named_modules()])
    try:
        attached = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        # Once more, for the report: what `from_pretrained` was told it only warns about.
        report: Any = set_peft_model_state_dict(attached, load_peft_weights(str(adapter), device="cpu"))
    except Exception as error:  # a damaged configuration or file can fail anywhere
        raise RunFolderError(
            f"adapter {adapter} does not fit the model: {' '.join(first_line(error).split())}",
            fix="pass the base model it was trained on, and keep adapter_config.json (r, target_modules) as it was saved.",
        ) from error
    trained = {name for name, parameter in attached.named_parameters() if parameter.requires_grad}
    require_every_weight(
        f"adapter {adapter}",
        # A prompt encoder is filled another way, a vector bank is one parameter under several names.
        missing=[
            key
            for key in report.missing_keys
            if key in trained and "prompt_encoder" not in key and "vblora_vector_bank" not in key
        ],
        unexpected=report.unexpected_keys,
        fix="save it with save_pretrained of the PeftModel itself (not of what torch.compile or a trainer wrapped around it).",
    )
    return attached


def _check_patterns(adapter: Path, modules: list[str]) -> None:
    """Try the regular expressions of the configuration on the model's names, within a time.

    Raises:
        RunFolderError: the configuration is no JSON object, or a pattern cannot be used.
    """
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        patterns = _patterns(config)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise RunFolderError(
            f"{path} cannot be read as a JSON object: {first_line(error)}", fix="save the adapter again."
        ) from error
    if not patterns:
        return
    try:
        found = subprocess.run(
            [sys.executable, "-I", "-c", MATCH_ALL],
            input=json.dumps([modules, patterns]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunFolderError(
            f"{path}: matching its regular expressions ({', '.join(patterns)[:200]}) takes more than {PATTERN_SECONDS:g} s.",
            fix="name the modules in a list (target_modules), or write a pattern without nested repetition.",
        ) from error
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise RunFolderError(
            f"{path}: a regular expression in {patterns} cannot be used: {reason[0][:200]}", fix="correct the pattern."
        )


def _patterns(config: dict[str, Any]) -> list[str]:
    """What PEFT takes for regular expressions: a text where a list of names is usual, and the keys of per-module values."""
    texts = [config.get(key) for key in ("target_modules", "exclude_modules")]
    layers = config.get("layers_pattern")
    texts += layers if isinstance(layers, list) else [layers]
    keys = [pattern for key in ("rank_pattern", "alpha_pattern") for pattern in config.get(key) or {}]
    return [text for text in texts if isinstance(text, str) and text != "all-linear"] + keys
