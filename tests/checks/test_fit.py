"""What is refused before any forward: tokens, placeholders and models that cannot be probed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from entropy_fast.checks.fit import check_rollouts_fit_model
from entropy_fast.errors import ModelStateError, RolloutsError
from entropy_fast.rollouts import Rollouts


def rollouts(token: int = 7) -> Rollouts:
    """Two rows; 60 stands in padding alone."""
    ids = torch.tensor([[5, 6, 7, 60], [5, 6, token, 8]])
    attention = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    return Rollouts(
        ids, attention, attention * torch.tensor([0, 0, 1, 1]), torch.zeros(2, dtype=torch.long), [1.0, -1.0]
    )  # type: ignore[arg-type]


class Model(nn.Module):
    """A model that counts its forwards."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 2)
        if config is not None:
            self.config = config

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked before any forward")


@pytest.mark.parametrize(
    "config", [None, {"image_token_id": 7}, "text", SimpleNamespace(), SimpleNamespace(n_positions=4)]
)
def test_models_without_a_config_of_transformers_are_taken(config: Any) -> None:
    check_rollouts_fit_model(rollouts(), Model(config))


def test_ids_beyond_the_embedding_and_positions_beyond_the_table() -> None:
    with pytest.raises(RolloutsError, match="token id 100, the model's embedding has 100 rows"):
        check_rollouts_fit_model(rollouts(100), Model())
    with pytest.raises(RolloutsError, match="longest sequence has 4 tokens, the model has 3 learned positions"):
        check_rollouts_fit_model(rollouts(), Model(SimpleNamespace(n_positions=3)))


@pytest.mark.parametrize("kind", ["image", "video", "audio", "speech", "vision"])
@pytest.mark.parametrize("end", ["id", "index"])
@pytest.mark.parametrize("part", [None, "thinker_config"])
def test_placeholders_without_pixels_or_sound_are_refused(kind: str, end: str, part: str | None) -> None:
    config = PretrainedConfig(**{f"{kind}_token_{end}": 60})
    model = Model(config if part is None else PretrainedConfig(**{part: config}))
    check_rollouts_fit_model(rollouts(), model)  # 60 under padding is no token
    with pytest.raises(RolloutsError, match=f"`input_ids` holds token 60 in row 1, the model's {kind}_token_{end}"):
        check_rollouts_fit_model(rollouts(60), model)


TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
}
T5: dict[str, Any] = {"vocab_size": 100, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
BART: dict[str, Any] = {
    "vocab_size": 100, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1,
    "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**T5)), "encoder-decoder"),
        (lambda: BertForMaskedLM(BertConfig(**TINY)), "both directions (bert"),
        (lambda: BertLMHeadModel(BertConfig(**TINY)), "both directions (bert"),
        (lambda: RobertaForCausalLM(RobertaConfig(**TINY)), "both directions (roberta"),
    ],
)  # fmt: skip
def test_what_is_no_causal_language_model_is_refused(model: Any, found: str) -> None:
    with pytest.raises(ModelStateError) as caught:
        check_rollouts_fit_model(rollouts(), model())
    assert found in caught.value.problem
    assert "probe a causal language model" in caught.value.fix


@pytest.mark.parametrize(
    "model",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
        lambda: BertLMHeadModel(BertConfig(**TINY, is_decoder=True)),
        lambda: BartForCausalLM(BartConfig(**BART)),
    ],
)
def test_causal_models_of_such_families_are_taken(model: Any) -> None:
    check_rollouts_fit_model(rollouts(), model())
