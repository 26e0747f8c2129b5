"""A tokenizer of words with a BOS token in front and a small chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("[UNK]", "[BOS]", "[EOS]", "<user>", "<assistant>", *(f"w{number}" for number in range(20)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """w0 to w19 are ids 5 to 24."""
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=model, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]", chat_template=template
    )
