"""A GRPO run of TRL's with forecasts: two lines more, and a warning before entropy is gone (seconds on a CPU)."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from entropy_fast.integrations.early_warning import EntropyFloor
from entropy_fast.integrations.trl import EntropyForecastCallback

STEPS = int(os.environ.get("STEPS", "40"))
WORDS = ["<pad>", "<eos>", "<unk>", *(str(n) for n in range(30)), "plus", "is"]


def count_sevens(completions: list[str], **_: object) -> list[float]:
    """A reward that a policy can have without end: collapse is what it asks for."""
    return [float(text.split().count("7")) for text in completions]


def main() -> None:
    """Train, and print what every step was forecast to do."""
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=Qwen2ForCausalLM(config),
            reward_funcs=count_sevens,
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=64, num_generations=8, max_completion_length=10,
                max_steps=STEPS, learning_rate=2e-3, lr_scheduler_type="constant", logging_steps=1, report_to="none",
                save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=0,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"{a} plus {b} is"} for a in range(20) for b in range(20)]),
            processing_class=tokenizer,
        )  # fmt: skip
        floor = EntropyFloor(1.0, within=20, on_warning=lambda warning: print(f"WARNING {warning}"))
        # These are the two lines. On so small a policy forecasts cost more than steps, so that their time is not limited here.
        forecasts = EntropyForecastCallback(trainer, budget=None, on_forecast=[floor])
        trainer.add_callback(forecasts)
        trainer.train()
    for row in trainer.state.log_history:
        if "entropy_fast/total" in row:
            print(
                f"step {row['step']:3d}: entropy {row['entropy']:.3f}, forecast {row['entropy_fast/total']:+.4f} ± "
                f"{row['entropy_fast/total_error']:.4f}, step before {row['entropy_fast/realised'] or float('nan'):+.4f}, "
                f"slope {row['entropy_fast/slope'] or float('nan'):.2f}"
            )
    print(forecasts.forecaster.ledger.calibration("direct").verdict)


if __name__ == "__main__":
    main()
