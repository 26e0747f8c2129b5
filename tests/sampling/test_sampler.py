"""Sampling: the distribution that is sampled, what is recorded, and what comes back untouched."""

from __future__ import annotations

import pytest
import torch
from small_policy import WORDS, digit_count, policy, tasks, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from entropy_fast.errors import SamplingError
from entropy_fast.sampling import PromptTask, SamplingSettings, sample_rollouts
from entropy_fast.sampling.tasks import format_prompt


def first_token_frequencies(model, settings, draws=4000):
    task = PromptTask("3 plus 4 is")
    settings = SamplingSettings(responses_per_prompt=draws, max_new_tokens=1, **settings)
    rollouts = sample_rollouts(model, tokenizer(), [task], lambda text, task: 0.0, settings)
    tokens = rollouts.input_ids[rollouts.loss_mask == 1]
    return torch.bincount(tokens, minlength=len(WORDS)).double() / draws


def probabilities(model, temperature=1.0):
    ids = torch.tensor([format_prompt(PromptTask("3 plus 4 is"), tokenizer())])
    with torch.no_grad():
        return torch.softmax(model(ids).logits[0, -1].double() / temperature, -1)


def chi_square(frequencies, expected, draws=4000):
    return float((draws * (frequencies - expected).square() / expected.clamp_min(1e-9)).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_itself_is_sampled_at_the_given_temperature(temperature):
    model = policy()
    found = first_token_frequencies(model, {"temperature": temperature})
    # 18 degrees of freedom: 99.9th percentile 42.3.
    assert chi_square(found, probabilities(model, temperature)) < 42.3
    other = 0.7 if temperature == 1.0 else 1.0
    assert chi_square(found, probabilities(model, other)) > 42.3


def test_settings_in_the_models_own_generation_config_do_not_change_what_is_sampled():
    model = policy()
    own = GenerationConfig(top_k=1, min_p=0.9, repetition_penalty=3.0, suppress_tokens=[4, 5, 6], eos_token_id=0)
    model.generation_config = own
    assert chi_square(first_token_frequencies(model, {}), probabilities(model)) < 42.3
    assert model.generation_config is own


def test_top_p_cuts_the_tail():
    model = policy()
    found = first_token_frequencies(model, {"top_p": 0.3})
    order = probabilities(model).sort(descending=True)
    kept = int((order.values.cumsum(0) < 0.3).sum()) + 1
    assert int((found > 0).sum()) <= kept


def test_top_k_and_min_p_cut_the_tail():
    model = policy()
    likely = probabilities(model).sort(descending=True).values
    assert int((first_token_frequencies(model, {"top_k": 3}) > 0).sum()) <= 3
    kept = int((likely >= 0.8 * likely[0]).sum())
    assert 0 < kept < len(likely)
    assert int((first_token_frequencies(model, {"min_p": 0.8}) > 0).sum()) <= kept


@pytest.mark.parametrize("off", [None, 0, -1])
def test_top_k_off(off):
    assert SamplingSettings(top_k=off).top_k is None
    rollouts = sample_rollouts(policy(), tokenizer(), tasks(1), digit_count, SamplingSettings(2, 3, top_k=off))
    assert (rollouts.top_k, rollouts.min_p, rollouts.truncated_by) == (None, 0.0, ())


def test_what_is_recorded():
    settings = SamplingSettings(
        responses_per_prompt=3, max_new_tokens=5, temperature=0.9, top_p=0.8, top_k=6, min_p=0.05
    )
    rollouts = sample_rollouts(policy(), tokenizer(), tasks(), digit_count, settings)
    assert (rollouts.temperature, rollouts.top_p, rollouts.top_k, rollouts.min_p) == (0.9, 0.8, 6, 0.05)
    assert rollouts.length_budgets.tolist() == [5] * 4
    assert rollouts.max_lengths_given
    assert rollouts.n_sequences == 12
    for row in range(12):
        task = tasks()[row // 3]
        ids = rollouts.input_ids[row][rollouts.attention_mask[row] == 1].tolist()
        prompt = format_prompt(task, tokenizer())
        response = rollouts.input_ids[row][rollouts.loss_mask[row] == 1].tolist()
        assert ids == prompt + response
        assert 1 <= len(response) <= 5
        assert 0 not in response[:-1]  # nothing after the end-of-sequence token
        assert rollouts.responses[row] == tokenizer().decode(response, skip_special_tokens=True)
        assert float(rollouts.rewards[row]) == digit_count(rollouts.responses[row], task)
        assert rollouts.prompts[row // 3] == task.prompt


def test_end_of_sequence_is_part_of_the_response():
    settings = SamplingSettings(responses_per_prompt=64, max_new_tokens=20)
    rollouts = sample_rollouts(policy(), tokenizer(), tasks(1), digit_count, settings)
    ends = [rollouts.input_ids[row][rollouts.loss_mask[row] == 1].tolist() for row in range(64)]
    stopped = [response for response in ends if len(response) < 20]
    assert stopped
    assert all(response[-1] == 0 for response in stopped)


def test_a_stop_string_ends_the_response():
    settings = SamplingSettings(responses_per_prompt=64, max_new_tokens=20, stop=("stop",))
    rollouts = sample_rollouts(policy(), tokenizer(), tasks(1), digit_count, settings)
    stop = WORDS.index("stop")
    responses = [rollouts.input_ids[row][rollouts.loss_mask[row] == 1].tolist() for row in range(64)]
    assert any(response[-1] == stop for response in responses)
    assert all(stop not in response[:-1] for response in responses)


def test_deterministic_for_a_seed_and_the_callers_random_state_is_left_alone():
    model = policy()
    before = torch.random.get_rng_state()

    def sampled(seed):
        settings = SamplingSettings(responses_per_prompt=3, max_new_tokens=6, seed=seed)
        return sample_rollouts(model, tokenizer(), tasks(), digit_count, settings).responses

    assert sampled(5) == sampled(5)
    assert sampled(5) != sampled(6)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_flags_and_generation_config_come_back_also_after_an_error():
    model = policy().train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    own = model.generation_config

    def broken(**kwargs):
        raise RuntimeError("out of memory")

    model.forward = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_rollouts(model, tokenizer(), tasks(), digit_count, SamplingSettings(max_new_tokens=2))
    assert [m.training for m in model.modules()] == flags
    assert model.generation_config is own


def test_tensors_can_be_used_by_autograd():
    rollouts = sample_rollouts(policy(), tokenizer(), tasks(2), digit_count, SamplingSettings(2, 3))
    assert not rollouts.input_ids.is_inference()


@pytest.mark.parametrize(
    "options",
    [
        {"responses_per_prompt": 1},
        {"max_new_tokens": 0},
        {"prompts_per_batch": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"top_k": 2.5},
        {"min_p": 1.0},
        {"min_p": -0.5},
    ],
)
def test_settings_that_cannot_be_used(options):
    with pytest.raises(SamplingError, match=next(iter(options))):
        SamplingSettings(**options)


def test_no_prompt_and_no_end_token():
    with pytest.raises(SamplingError, match="no prompt"):
        sample_rollouts(policy(), tokenizer(), [], digit_count, SamplingSettings())
    without_end = tokenizer()
    without_end.eos_token = None
    with pytest.raises(SamplingError, match="end-of-sequence"):
        sample_rollouts(policy(), without_end, tasks(), digit_count, SamplingSettings())


def test_chat_template_is_used_where_there_is_one():
    chat = tokenizer()
    chat.chat_template = (
        "{% for m in messages %}plus {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}is{% endif %}"
    )
    ids = format_prompt(PromptTask("3 times 4"), chat)
    assert chat.decode(ids) == "plus 3 times 4 is"


def test_nothing_is_appended_to_a_prompt_and_nothing_stands_in_front_twice():
    appending = tokenizer()
    appending.backend_tokenizer.add_special_tokens(["<pad>", "<eos>"])
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 1), ("<eos>", 0)]
    )
    expected = [WORDS.index(word) for word in ["<pad>", "3", "times", "4"]]
    assert format_prompt(PromptTask("3 times 4"), appending) == expected
    assert format_prompt(PromptTask("<pad> 3 times 4"), appending) == expected


def test_a_prompt_without_tokens_is_named():
    with pytest.raises(SamplingError, match=r"no token of the prompt ' ' \(its vocabulary has 19 entries"):
        sample_rollouts(policy(), tokenizer(), [PromptTask(" ")], digit_count, SamplingSettings())


def test_every_decoding_step_is_told_and_changes_nothing():
    settings = SamplingSettings(responses_per_prompt=3, max_new_tokens=6, prompts_per_batch=3)
    told: list[tuple[str, int, int]] = []
    plain, watched = (
        sample_rollouts(policy(), tokenizer(), tasks(4), digit_count, settings, on_progress)
        for on_progress in (None, lambda *reported: told.append(reported))
    )
    assert plain.input_ids.tolist() == watched.input_ids.tolist()
    assert {(stage, total) for stage, _, total in told} == {("sampling", 12)}  # two batches
    done = [count for _, count, _ in told]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 12 and done.count(12) == 1
    longest = [int(plain.response_lengths[rows].max()) for rows in (slice(0, 9), slice(9, 12))]
    assert len(done) == sum(longest) + 3  # each batch begins with a report, and all ends with one
