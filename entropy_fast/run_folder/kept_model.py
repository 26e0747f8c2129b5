"""Saving the model of a step so that loading it gives the same one: an adapter over a named base, or all weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from entropy_fast.errors import BundleError
from entropy_fast.run_folder.bundle_reading import MODEL
from entropy_fast.run_folder.manifest import IN_FOLDER
from entropy_fast.run_folder.model_source import DtypeName, ModelSource

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["KeptModel", "kept_model"]

THE_ADAPTER = "default"  # the name under which an adapter is attached again
WIDEST_FIRST = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class KeptModel:
    """A model that can be saved.

    Attributes:
        module: without wrappers.
        source: how it, or the base of its adapter, is loaded again.
        is_adapter: whether the adapter alone is saved.
    """

    module: PreTrainedModel | PeftModel
    source: ModelSource
    is_adapter: bool

    def save(self, folder: Path) -> None:
        """Write the adapter or the weights as safetensors."""
        options: dict[str, Any] = {}
        if self.is_adapter:
            # Whether embeddings were resized would be looked up on the hub.
            options = {"selected_adapters": [THE_ADAPTER], "save_embedding_layers": False}
        self.module.save_pretrained(str(folder), **options)


def kept_model(module: nn.Module, base_model: str | None) -> KeptModel:
    """See that a model comes back when it is saved.

    Args:
        module: without wrappers.
        base_model: path or hub name of an adapter's base; None for the one in the adapter's configuration.

    Raises:
        BundleError: it is no transformers or peft model, its adapter is not the only active one and called ``default``, a
            trained weight is not in what is saved, the base has no name, it is quantised otherwise than to plain NF4, or a
            layer computes otherwise than its class does.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    _check_layers(module)
    if isinstance(module, PeftModel):
        _check_adapter(module)
        base: Any = module.get_base_model()
        config: Any = module.peft_config[THE_ADAPTER]
        name = base_model or config.base_model_name_or_path
        if not name:
            raise BundleError("the adapter's base has no name.", fix="pass base_model, its path or hub name.")
        if Path(name).expanduser().exists():
            name = str(Path(name).expanduser().absolute())
        return KeptModel(module, _source(base, name), is_adapter=True)
    if not isinstance(module, PreTrainedModel):
        raise BundleError(
            f"the model is a {type(module).__name__}, which nothing says how to save and load.",
            fix="pass the transformers or peft model itself.",
        )
    source = _source(module, f"{IN_FOLDER}{MODEL}")
    if source.load_in_4bit:
        raise BundleError("the whole model is quantised.", fix="train an adapter over it, or weights in 16 or 32 bits.")
    return KeptModel(module, source, is_adapter=False)


def _check_layers(module: nn.Module) -> None:
    """A model that is loaded has the layers of its class; where one was given another forward, numbers would be others.

    Wrappers around a whole model's forward are the trainer's autocast or its fused loss, which a probe does not go through.
    """
    for name, part in module.named_modules():
        if (
            "forward" in vars(part)
            and not hasattr(part, "_hf_hook")
            and any(True for _ in part.parameters(recurse=False))
        ):
            raise BundleError(
                f"the forward of '{name}' was replaced after the model was made (a cast, or a library's kernel), and that of a "
                "model which is loaded is its class's: the step's number would be another one.",
                fix="train without it (in TRL cast_lm_head_to_fp32, use_liger_kernel) to keep steps.",
            )


def _check_adapter(module: PeftModel) -> None:
    from peft import get_peft_model_state_dict

    active = module.active_adapters
    if list(active) != [THE_ADAPTER]:
        raise BundleError(
            f"the active adapters are {list(active)}; when the step is read there is one, called '{THE_ADAPTER}'.",
            fix=f"train one adapter under the name '{THE_ADAPTER}'.",
        )
    saved = get_peft_model_state_dict(module, adapter_name=THE_ADAPTER, save_embedding_layers=False)
    places = {tensor.data_ptr() for tensor in saved.values()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in places:
            raise BundleError(
                f"'{name}' is trained and no part of the adapter, so it would not be saved.",
                fix="name its module in modules_to_save of the adapter's configuration, or freeze it.",
            )


def _source(base: PreTrainedModel, name: str) -> ModelSource:
    """How to load it: in the widest dtype it has, from which the others are cast."""
    found = {str(p.dtype).removeprefix("torch.") for p in base.parameters() if p.is_floating_point()}
    dtype = next((own for own in WIDEST_FIRST if own in found), None)
    if found - set(get_args(DtypeName)) or dtype is None:
        raise BundleError(
            f"the model has weights in {', '.join(sorted(found))}.", fix=f"use {', '.join(get_args(DtypeName))}."
        )
    device = str(next(base.parameters()).device)
    quantised: Any = getattr(base.config, "quantization_config", None)
    settings = {} if quantised is None else quantised if isinstance(quantised, dict) else quantised.to_dict()
    if settings:
        plain = settings.get("bnb_4bit_quant_type") == "nf4" and not settings.get("bnb_4bit_use_double_quant")
        if not (settings.get("load_in_4bit") and plain):
            raise BundleError(
                f"the base is quantised ({settings.get('quant_method', 'in an unknown way')}) otherwise than to plain NF4.",
                fix="load it as NF4 without double quantisation, or in 16 or 32 bits.",
            )
        dtype = str(settings["bnb_4bit_compute_dtype"]).removeprefix("torch.")
    elif not all(p.is_floating_point() for p in base.parameters()):
        raise BundleError(
            "the base has weights in whole numbers, and its configuration does not say how they were quantised.",
            fix="load it with from_pretrained and a quantization_config.",
        )
    checkpointing = bool(getattr(base, "is_gradient_checkpointing", False))
    return ModelSource(name, _dtype_name(dtype), bool(settings), checkpointing, device)


def _dtype_name(dtype: str) -> DtypeName:
    for known in get_args(DtypeName):
        if known == dtype and isinstance(getattr(torch, known), torch.dtype):
            name: DtypeName = known
            return name
    raise BundleError(f"the quantised base computes in {dtype}.", fix=f"use {', '.join(get_args(DtypeName))}.")
