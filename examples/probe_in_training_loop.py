"""Forecast each step of a small GRPO loop, and look what it did (random tokens and rewards; seconds on a CPU)."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from entropy_fast import Rollouts
from entropy_fast.integrations.loops import forecast_step

PROMPTS, RESPONSES, PROMPT_LENGTH, BUDGET, VOCABULARY = 6, 4, 5, 12, 64

torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def sample() -> Rollouts:
    """Responses from the current policy, rewarded for every occurrence of token 7."""
    prompts = torch.randint(1, VOCABULARY, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(RESPONSES, 0)
    # top_k=0: generate's default of 50 would cut the distribution. A least number of tokens is for this toy alone.
    with torch.inference_mode():
        sequences = model.generate(
            input_ids=prompts, do_sample=True, top_k=0, max_new_tokens=BUDGET, min_new_tokens=BUDGET, pad_token_id=0
        )
    sequences = sequences.view(PROMPTS, RESPONSES, -1)
    return Rollouts.from_dict(
        {
            "sequences": sequences,
            "attention_masks": torch.ones_like(sequences),
            "prompt_lens": torch.full((PROMPTS,), PROMPT_LENGTH),
            "rewards": (sequences[:, :, PROMPT_LENGTH:] == 7).sum(-1).double(),
            "max_lengths": torch.full((PROMPTS,), BUDGET),
            "temperature": 1.0,
            "top_p": 1.0,
        }
    )


for step in range(5):
    rollouts = sample()
    logits = model(rollouts.input_ids).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)
    sequence_logprobs = (logprobs * rollouts.loss_mask[:, 1:]).sum(-1)
    loss = -(rollouts.advantages * sequence_logprobs / BUDGET).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # The gradient is there, of whatever loss: the forecast is of the step that optimizer.step() takes from it.
    with forecast_step(model, optimizer, rollouts, held_out=sample() if step % 2 else None) as forecast:
        optimizer.step()
    print(f"step {step}: {forecast.result}")
    found = forecast.realised
    if found is not None:
        print(f"  on other responses of the policy before it: {found.total:+.2e} ± {found.total_error:.1e}")
