"""Forecasts in a loop of one's own with accelerate, two micro-batches a step (random tokens; seconds on a CPU)."""

import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM

from entropy_fast import EstimateOptions, Rollouts, RunOptions
from entropy_fast.integrations.loops import forecast_step

PROMPTS, RESPONSES, PROMPT_LENGTH, BUDGET, VOCABULARY = 6, 4, 5, 8, 64


def sample(model: torch.nn.Module) -> Rollouts:
    """Responses of the policy, rewarded for every occurrence of token 7."""
    prompts = torch.randint(2, VOCABULARY, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(RESPONSES, 0)
    with torch.no_grad():
        ids = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=BUDGET,
            min_new_tokens=BUDGET, pad_token_id=0,
        )  # fmt: skip
    loss_mask = (torch.arange(ids.shape[1]) >= PROMPT_LENGTH).long().expand_as(ids)
    return Rollouts(
        input_ids=ids, attention_mask=torch.ones_like(ids), loss_mask=loss_mask,
        group_ids=torch.arange(PROMPTS).repeat_interleave(RESPONSES),
        rewards=(ids[:, PROMPT_LENGTH:] == 7).sum(-1).double(), max_lengths=BUDGET, temperature=1.0, top_p=1.0,
    )  # fmt: skip


def main() -> None:
    """Three steps, each from two micro-batches."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=2)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step in range(3):
        rollouts = sample(accelerator.unwrap_model(model))
        for rows in torch.arange(rollouts.n_sequences).chunk(2):
            with accelerator.accumulate(model):
                part = rollouts.select_rows(rows)
                logits = model(input_ids=part.input_ids, attention_mask=part.attention_mask).logits[:, :-1]
                logprobs = logits.log_softmax(-1).gather(-1, part.input_ids[:, 1:, None]).squeeze(-1)
                loss = -(part.advantages * (logprobs * part.loss_mask[:, 1:]).sum(-1) / BUDGET).mean()
                accelerator.backward(loss)
                if not accelerator.sync_gradients:
                    continue
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                # All micro-batches are in the gradient now, and the forecast is of all of them.
                with forecast_step(
                    model, optimizer, rollouts, estimate=EstimateOptions(parts=("direct",)), run=RunOptions()
                ) as forecast:
                    optimizer.step()
                optimizer.zero_grad()
                print(f"step {step}: {forecast.result}")


if __name__ == "__main__":
    main()
