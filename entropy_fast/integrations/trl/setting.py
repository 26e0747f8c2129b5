"""How a TRL trainer trains, as far as a forecast depends on it: what is refused, in which dtype it computes, how it samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from entropy_fast.checks.sharding import refuse_sharded
from entropy_fast.errors import ConfigError
from entropy_fast.sharded.fsdp2 import fsdp2_modules

__all__ = ["Sampling", "autocast_of", "refuse_setting", "sampling_of", "scaler_of", "sharded_by_fsdp2"]

# Generation options that leave alone from what every token is drawn, whichever engine generates.
_HARMLESS = frozenset({
    "bos_token_id", "cache_implementation", "detokenize", "disable_compile", "eos_token_id", "ignore_eos",
    "include_stop_str_in_output", "logprobs", "max_length", "max_new_tokens", "max_tokens", "n", "num_return_sequences",
    "pad_token_id", "prompt_logprobs", "return_dict_in_generate", "seed", "skip_special_tokens", "stop", "stop_strings",
    "stop_token_ids", "use_cache",
})  # fmt: skip
# What a model's own generation config may say beside: a value of 0 or 1, or none, leaves the distribution alone.
_OF_THE_CONFIG = (
    "bad_words_ids", "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
    "guidance_scale", "min_length", "min_new_tokens", "no_repeat_ngram_size", "sequence_bias", "suppress_tokens", "top_h",
    "typical_p", "watermarking_config",
)  # fmt: skip
_TOP_K_OF_TRANSFORMERS = 50
_WITHOUT = (
    "train without it, in one process, with DistributedDataParallel or with FSDP2, to have forecasts; or probe consolidated "
    "checkpoints with `entropy-fast probe`."
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What responses are drawn from.

    Attributes:
        temperature, top_p, top_k, min_p: as `Rollouts` have them.
        others: names of further options that change it.
    """

    temperature: float
    top_p: float
    top_k: int | None
    min_p: float | None
    others: tuple[str, ...]

    @property
    def truncates(self) -> bool:
        """Whether it is less, or something else, than the policy at a temperature."""
        return self.top_p < 1 or (self.top_k or 0) > 0 or (self.min_p or 0) > 0 or bool(self.others)


def refuse_setting(trainer: Any) -> None:
    """Raise for ways of training whose steps cannot be forecast.

    Raises:
        ConfigError: it is no trainer, trains with DeepSpeed, FSDP1, a fused loss, or in several processes by other means than
            DistributedDataParallel and FSDP2.
        ModelStateError: its model is sharded by other means.
    """
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None:
        raise ConfigError(
            f"a {type(trainer).__name__} is no trainer.", fix="pass the GRPOTrainer that the callback is added to."
        )
    kind = str(getattr(accelerator, "distributed_type", ""))
    by_accelerate = bool(getattr(accelerator, "is_fsdp2", False))
    for name, said, what in (
        (
            "is_deepspeed_enabled",
            "DEEPSPEED",
            "DeepSpeed steps inside the backward, so that no gradient stands before its step",
        ),
        ("is_fsdp_enabled", "FSDP", "FSDP1 keeps parameters as flattened shards"),
        ("is_megatron_lm_enabled", "MEGATRON_LM", "Megatron-LM splits parameters over ranks"),
    ):
        if (getattr(trainer, name, False) or kind.endswith(said)) and not (said == "FSDP" and by_accelerate):
            raise ConfigError(f"EntropyForecastCallback: {what}.", fix=_WITHOUT)
    fused = next((name for name, held in vars(trainer).items() if _of_liger(held)), None)
    if fused is not None:
        raise ConfigError(
            f"EntropyForecastCallback: the trainer's {fused} is a {type(vars(trainer)[fused]).__name__}: Liger's fused loss "
            "makes gradients in its forward, and log-probs with a graph are nowhere to be listened to.",
            fix="train with use_liger_kernel=False (its loss; TRL 1.16 takes Liger's layers alone, which may stay).",
        )
    if accelerator.num_processes > 1 and not (by_accelerate or kind.rpartition(".")[2].startswith("MULTI_")):
        raise ConfigError(
            f"EntropyForecastCallback: {accelerator.num_processes} processes by {kind}, which is neither "
            "DistributedDataParallel nor FSDP2.",
            fix=_WITHOUT,
        )
    own = fsdp2_modules(trainer.model)
    for model in (trainer.model, getattr(trainer, "model_wrapped", None)):
        if model is not None and not (own and fsdp2_modules(model)):
            refuse_sharded(model)


def sharded_by_fsdp2(trainer: Any) -> bool:
    """Whether FSDP2 shards the trainer's model: now, or by accelerate once the training begins."""
    return bool(getattr(trainer.accelerator, "is_fsdp2", False)) or bool(fsdp2_modules(trainer.model))


def autocast_of(trainer: Any) -> Literal["bfloat16", "float16"] | None:
    """What the trainer's forwards really run in: accelerate leaves fp16 out on a CPU without a word."""
    accelerator = trainer.accelerator
    # accelerate gives FSDP2's own casts in place of autocast to what it shards.
    if not accelerator.native_amp or getattr(accelerator, "is_fsdp2", False):
        return None
    return "float16" if accelerator.mixed_precision == "fp16" else "bfloat16"


def scaler_of(trainer: Any) -> Any:
    """The gradient scaler of fp16; None where there is none, or it is off."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def sampling_of(trainer: Any) -> Sampling:
    """What the trainer draws responses from: by its ``generation_kwargs``, its arguments, and the model's generation config."""
    given: Mapping[str, Any] = getattr(trainer.args, "generation_kwargs", None) or {}
    # What transformers is not told it takes from the model's own config, and then from defaults of which one truncates.
    ours = not getattr(trainer, "use_vllm", False)
    config = getattr(trainer.model, "generation_config", None) if ours else None

    def said(name: str, default: object = None) -> Any:
        for found in (given.get(name), getattr(trainer, name, None), getattr(config, name, None)):
            if found is not None:
                return found
        return default

    known = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample"}
    others = {name for name in given if name not in _HARMLESS | known and not name.startswith("output_")}
    others |= {name for name in _OF_THE_CONFIG if getattr(config, name, None) not in (None, 0, 1.0, [])} - set(given)
    if said("repetition_penalty", 1.0) != 1:
        others.add("repetition_penalty")
    if not given.get("do_sample", True):
        others.add("do_sample")
    if not ours and getattr(trainer.args, "vllm_structured_outputs_regex", None):
        others.add("vllm_structured_outputs_regex")
    return Sampling(
        float(said("temperature", 1.0)),
        float(said("top_p", 1.0)),
        said("top_k", _TOP_K_OF_TRANSFORMERS if ours else None),
        said("min_p"),
        tuple(sorted(others)),
    )


def _of_liger(held: object) -> bool:
    return type(held).__module__.split(".")[0] == "liger_kernel"
