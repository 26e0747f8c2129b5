"""TRL's own losses as updates: the gradient from our coefficients against the gradient that its trainer's backward leaves.

`GRPOTrainer._compute_loss` is called once with leaves in the place of the policy's log-probs and entropies, as a user
writes it to forecast a TRL step, and once with the policy itself, followed by an ordinary backward.

Legend: s_t log-prob and H_t entropy of completion token t, a_t and e_t their coefficients.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_options import options_of
from torch import Tensor

from entropy_fast import ProbeComponents, Rollouts, fast_delta_h1
from entropy_fast.columns import Side, TokenScores, Wanted, columns_of
from entropy_fast.columns.given import coefficients_of_loss
from entropy_fast.engines.resolving import resolved_context
from entropy_fast.step import AdamState

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

PROMPTS, RESPONSES, T_PROMPT, T_COMPLETION, VOCABULARY = 3, 4, 4, 6, 24
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
# By name the arguments of the trainer's configuration, and what is special about its inputs.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{loss: ({"loss_type": loss}, ()) for loss in LOSSES},
    **{f"{loss} off policy": ({"loss_type": loss}, ("old",)) for loss in LOSSES},
    **{
        f"{loss} by sequence": ({"loss_type": loss, "importance_sampling_level": "sequence"}, ("old",))
        for loss in ("grpo", "luspo", "dapo")
    },
    **{f"{loss} with KL": ({"loss_type": loss, "beta": 0.04}, ("old", "ref")) for loss in ("grpo", "dapo", "sapo")},
    "KL without correction": ({"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": False}, ("old", "ref")),
    "cispo with a higher limit": ({"loss_type": "cispo", "epsilon_high": 5.0}, ("old",)),
    "two-sided clipping": ({"loss_type": "grpo", "delta": 1.1}, ("old",)),
    "surprising tokens": ({"loss_type": "dapo", "top_entropy_quantile": 0.3}, ("old",)),
    "entropy bonus": ({"loss_type": "dapo", "entropy_coef": 0.01}, ()),
    "bonus on surprising tokens": ({"loss_type": "grpo", "entropy_coef": 0.01, "top_entropy_quantile": 0.5}, ()),
    "adaptive bonus": (
        {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.01},
        (),
    ),
    "off-policy mask": ({"loss_type": "dapo", "off_policy_mask_threshold": 0.05}, ("old",)),
    "tool mask": ({"loss_type": "bnpo", "beta": 0.04}, ("old", "ref", "tool")),
    "temperature": ({"loss_type": "grpo", "temperature": 0.7}, ("old",)),
    "an empty completion": ({"loss_type": "grpo"}, ("empty",)),
    "advantages by token": ({"loss_type": "dapo"}, ("old", "by token")),
}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Makes trainers of a tiny Qwen2 in fp64."""
    from datasets import Dataset
    from probe_oracle.models import double_precision_norm
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from trl import GRPOConfig, GRPOTrainer

    words = ["<pad>", "<eos>", "<unk>", *(str(n) for n in range(VOCABULARY - 3))]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, eos_token_id=1, pad_token_id=0, attention_dropout=0.0,
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("trl")
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).double().save_pretrained(folder / "model")
    patch = pytest.MonkeyPatch()
    patch.setattr(Qwen2RMSNorm, "forward", double_precision_norm)

    def make(**options: Any) -> Any:
        arguments = GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=PROMPTS * RESPONSES, num_generations=RESPONSES,
            max_completion_length=T_COMPLETION, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            gradient_checkpointing=False, save_strategy="no", **options,
        )  # fmt: skip
        model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "1 2 3"}] * 12),
            processing_class=tokenizer,
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer._last_world_entropy = 0.0  # as after a step whose entropy was below the target
        trainer.model.train()
        return trainer

    yield make
    patch.undo()


def scored(trainer: Any, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """s and H [N, T_completion] with their graph, in the model's own dtype (the trainer's function goes through fp32)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -T_COMPLETION - 1 : -1] / trainer.temperature
    log_p = logits.log_softmax(-1)
    s = log_p.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    return s, -(log_p.exp() * log_p).sum(-1)


def trainer_s_loss(trainer: Any, inputs: dict[str, Tensor], s: Tensor, h: Tensor) -> Tensor:
    """What `_compute_loss` says with these in the place of what the policy says; the trainer's state is put back."""
    kept = trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (s, h, None))
        loss: Tensor = trainer._compute_loss(trainer.model, inputs)
    trainer.entropy_coef, trainer._last_world_entropy, trainer._entropy_window_stats = kept
    return loss


def make_inputs(trainer: Any, special: tuple[str, ...], *, padding: tuple[int, ...]) -> dict[str, Tensor]:
    """A batch as `_generate_and_score_completions` gives it.

    The trainer passes no positions, so prompts that are padded on the left stand elsewhere; rotary embeddings make nothing of
    that but rounding, in fp32 whatever the model's dtype.
    """
    generator = torch.Generator().manual_seed(1)
    count = PROMPTS * RESPONSES
    prompt = torch.randint(3, VOCABULARY, (PROMPTS, T_PROMPT), generator=generator).repeat_interleave(RESPONSES, 0)
    prompt_mask = (torch.arange(T_PROMPT) >= torch.tensor(padding)[:, None]).long().repeat_interleave(RESPONSES, 0)
    lengths = torch.randint(1, T_COMPLETION + 1, (count,), generator=generator)
    if "empty" in special:
        lengths[2] = 0
    mask = (torch.arange(T_COMPLETION) < lengths[:, None]).long()
    inputs = {
        "prompt_ids": torch.where(prompt_mask == 1, prompt, 0),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, VOCABULARY, mask.shape, generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(count, generator=generator, dtype=torch.float64),
        "num_items_in_batch": mask.sum(),
    }
    if "by token" in special:
        inputs["advantages"] = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    if "tool" in special:
        inputs["tool_mask"] = torch.randint(0, 2, mask.shape, generator=generator)
        inputs["tool_mask"][:, 0] = 1
    s = scored(trainer, trainer.model, inputs)[0].detach()
    noise = (torch.randn(s.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    for name, key in (("old", "old_per_token_logps"), ("ref", "ref_per_token_logps")):
        spread = next(noise)
        if name in special:
            inputs[key] = s + 0.3 * spread
    return inputs


def rollouts_of(inputs: dict[str, Tensor]) -> Rollouts:
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    advantages = inputs["advantages"]
    return Rollouts(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        loss_mask=torch.cat([torch.zeros_like(inputs["prompt_mask"]), mask], 1),
        group_ids=torch.arange(PROMPTS).repeat_interleave(RESPONSES),
        advantages=advantages if advantages.dim() == 1 else advantages.sum(1),
        max_lengths=T_COMPLETION,
    )


def flat(trainer: Any) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_in_the_trainer_s_own_precision(trainers: Callable[..., Any], case: str) -> None:
    """In fp32, with log-probs and entropies from the trainer's own function, over one graph."""
    options, special = CASES[case]
    trainer = trainers(**options)
    inputs = {
        k: v.float() if v.is_floating_point() else v
        for k, v in make_inputs(trainer, special, padding=(0, 2, 1)).items()
    }
    trainer.model.float()
    s, h, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        T_COMPLETION,
        compute_entropy=True,
    )
    assert s.dtype == torch.float32
    rollouts = rollouts_of(inputs)
    mask = rollouts.loss_mask[:, T_PROMPT:] == 1
    known = TokenScores(*(torch.nn.functional.pad(torch.where(mask, t.detach(), 0.0), (T_PROMPT, 0)) for t in (s, h)))

    def loss(s: Tensor, h: Tensor) -> Tensor:
        return trainer_s_loss(trainer, inputs, s[:, T_PROMPT:], h[:, T_PROMPT:])

    shape = (len(mask), T_PROMPT + T_COMPLETION)
    a, e = coefficients_of_loss(loss, known, torch.arange(len(mask)), shape, rollouts)
    parameters = list(trainer.model.parameters())
    of_columns = -((a[:, T_PROMPT:].float() * s).sum() + (e[:, T_PROMPT:].float() * h).sum())
    of_trainer = trainer_s_loss(trainer, inputs, s, h)
    found, expected = (
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, parameters, retain_graph=True)]).double()
        for total in (of_columns, of_trainer)
    )
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.filterwarnings("ignore:.*without response tokens were left out")
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_trainer_s(trainers: Callable[..., Any], case: str) -> None:
    options, special = CASES[case]
    trainer = trainers(**options)
    inputs = make_inputs(trainer, special, padding=(0, 0, 0))
    trainer.model.zero_grad()
    s, h = scored(trainer, trainer.model, inputs)
    trainer_s_loss(trainer, inputs, s, h).backward()
    expected = flat(trainer)
    assert float(expected.norm()) > 1e-6

    def loss(s: Tensor, h: Tensor) -> Tensor:
        return trainer_s_loss(trainer, inputs, s[:, T_PROMPT:], h[:, T_PROMPT:])

    rollouts = rollouts_of(inputs)
    batch = rollouts.without_empty_responses()[0]
    estimate = options_of(policy_temperature=trainer.temperature)["estimate"]
    components = ProbeComponents(trainer.model, adam_state(trainer.model), estimate)
    columns = columns_of(estimate, Wanted(update=loss), rollouts, rollouts)
    components.context = resolved_context(
        dataclasses.replace(components.context, columns=columns), batch, batch, components.score
    )
    found = components._gradient_sum(Side.UPDATE, batch, range(PROMPTS)).tensors
    total = torch.cat([t.reshape(-1) for t in found]) / PROMPTS
    assert float((total + expected).norm()) <= 1e-10 * float(expected.norm())
    if "bonus" in case:
        assert components.context.columns.of_side(Side.UPDATE).needs_entropies


def test_a_whole_forecast(trainers: Callable[..., Any]) -> None:
    """The loss goes to `fast_delta_h1` as it stands; DAPO on its own policy is the described update with pooled weights."""
    trainer = trainers(loss_type="dapo")
    inputs = make_inputs(trainer, (), padding=(0, 0, 0))
    rollouts, state = rollouts_of(inputs), adam_state(trainer.model)
    options = options_of(update_weighting="pooled", engine="one_pass")
    expected = fast_delta_h1(trainer.model, state, rollouts, **options)

    def loss(s: Tensor, h: Tensor) -> Tensor:
        return trainer_s_loss(trainer, inputs, s[:, T_PROMPT:], h[:, T_PROMPT:])

    found = fast_delta_h1(trainer.model, state, rollouts, update=loss, **options_of(engine="one_pass"))
    assert abs(found.delta_h1 - expected.delta_h1) <= 1e-9 * abs(expected.delta_h1)


def adam_state(model: Any) -> AdamState:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    with torch.no_grad():
        for p, kept in zip(model.parameters(), before, strict=True):
            p.copy_(kept)
            p.grad = None
    return AdamState.from_optimizer(optimizer, model)
