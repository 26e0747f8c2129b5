"""What TRL trains with and this machine has not: an engine that samples, images, tools; as small as it gets.

The trainers around them are TRL's own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tiny_trl import WORDS, even_numbers, tiny_tokenizer, tiny_trainer


class OtherEngine:
    """In the place of `trl.generation.vllm_generation.VLLMGeneration`: samples from weights that are a little off.

    An engine of its own computes in other kernels and dtypes than the training, which is why TRL corrects for it.
    """

    noise = 0.05

    def __init__(
        self, *, model: Any, processing_class: Any, temperature: float, max_completion_length: int, **_: Any
    ) -> None:
        self._model, self._temperature, self._length = model, temperature, max_completion_length
        self._eos = processing_class.eos_token_id

    def sync_weights(self) -> None:
        self._own = copy.deepcopy(self._model).eval()
        for module in self._own.modules():
            module.__dict__.pop("forward", None)  # TRL's and accelerate's would still call the model that was copied
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self._own.parameters():
                parameter.mul_(1 + self.noise * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], **_: Any
    ) -> tuple[Any, list[list[int]], list[list[list[float | None]]], None]:
        """Prompts, completions, of every token the log-probs of the likeliest and of itself, and their ids."""
        completions, logprobs = [], []
        for ids in prompts:
            row, said = list(ids), list[list[float | None]]()
            while len(said) < self._length and (len(said) == 0 or row[-1] != self._eos):
                of_next = (self._own(torch.tensor([row])).logits[0, -1] / self._temperature).log_softmax(-1)
                row.append(int(torch.multinomial(of_next.exp(), 1)))
                said.append([float(of_next[row[-1]])])
            completions.append(row[len(ids) :])
            logprobs.append(said)
        logprobs[0][0][0] = None  # as where vLLM has a NaN
        return prompts, completions, logprobs, None


def image_trainer(folder: Path, *, images: bool, **options: Any) -> Any:
    """A trainer of a vision-language model, on prompts with or without an image."""
    from PIL import Image
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers import LlavaProcessor, Qwen2Config  # isort: skip

    words = [*WORDS, "<image>"]
    tokenizer = tiny_tokenizer(words, extra_special_tokens={"image_token": "<image>"})
    size = {"height": 8, "width": 8}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size), tokenizer=tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }} {% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endif %}{% endfor %}",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                           image_size=8, patch_size=4, projection_dim=16),
            text_config=Qwen2Config(vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
                                    initializer_range=0.3),
            image_token_id=len(words) - 1,
        )
    )  # fmt: skip
    rows = [
        {"prompt": [{"role": "user", "content": f"{a} plus {b} is"}]}
        | ({"image": Image.new("RGB", (8, 8), (10 * a, 20 * b, 30))} if images else {})
        for a in range(5)
        for b in range(5)
    ]
    return tiny_trainer(folder, model=model, reward=of_last_message, rows=rows, tokenizer=processor, **options)


def of_last_message(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    return even_numbers([" ".join(m.get("content", "") for m in c if m["role"] == "assistant") for c in completions])


def double(n: int) -> str:
    """Twice a number.

    Args:
        n: the number.

    Returns:
        twice as much.
    """
    return f"{2 * n % 30} is"


def tool_trainer(folder: Path, **options: Any) -> Any:
    """A trainer whose policy calls a tool wherever its response begins with an even number; counts ``words_of_tools``."""
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOTrainer

    class Counts(GRPOTrainer):
        words_of_tools = 0

        def _tool_call_loop(self, *args: Any) -> Any:
            found = super()._tool_call_loop(*args)
            self.words_of_tools += sum(mask.count(0) for mask in found[0])
            return found

    class CallsTools(PreTrainedTokenizerFast):
        def parse_response(self, ids: list[int], **_: Any) -> dict[str, Any]:
            text = self.decode(ids, skip_special_tokens=True)
            first = text.split()[0] if text.split() else ""
            said: dict[str, Any] = {"role": "assistant", "content": text}
            if first.isdigit() and int(first) % 2 == 0:
                function = {"name": "double", "arguments": {"n": int(first)}}
                said["tool_calls"] = [{"type": "function", "function": function}]
            return said

    tokenizer = tiny_tokenizer(kind=CallsTools)
    tokenizer.response_template = {"fields": {}}  # that there is one; what it would say, parse_response above does
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% for call in m.get('tool_calls') or [] %}"
        "{{ call['function']['name'] }} {{ call['function']['arguments'] }} {% endfor %}{% endfor %}"
    )
    rows = [{"prompt": [{"role": "user", "content": f"{a} plus {b} is"}]} for a in range(5) for b in range(5)]
    options = {"reward": of_last_message, "rows": rows, "max_completion_length": 20, **options}
    return tiny_trainer(folder, kind=Counts, tokenizer=tokenizer, extra={"tools": [double]}, **options)


def with_an_environment(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A rollout function: of two responses in three, words of an environment that the policy has not sampled."""
    asked = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    sampled, _ = trainer._generate_single_turn(asked, None, {}, trainer.num_generations)
    completions, masks = [], []
    for number, own in enumerate(sampled):
        said = [WORDS.index("is"), WORDS.index(str(number % 7))] if number % 3 else []
        completions.append(own[:2] + said + own[2:])
        masks.append([1] * len(own[:2]) + [0] * len(said) + [1] * len(own[2:]))
    return {"prompt_ids": asked, "completion_ids": completions, "logprobs": None, "env_mask": masks}
