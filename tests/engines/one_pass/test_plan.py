"""How a plan reads."""

from __future__ import annotations

from entropy_fast.engines.one_pass.plan import OnePassPlan


def test_a_plan_in_words() -> None:
    plan = OnePassPlan(
        way="packed",
        captured="3 of 4 parameters captured",
        kernel_kept=True,
        microbatches=6,
        largest_microbatch=1234,
        sweeps=1,
        backwards=1,
        prompt_forwards=1,
        prompt_backwards=2,
        operations=5.5e9,
        stored_bytes=3 * 2**30,
        activation_bytes=1000,
        reasons=("first", "second"),
    )
    assert str(plan) == (
        "packed; 3 of 4 parameters captured; every unit's gradients kept; 6 microbatch(es) of at most 1234 tokens; "
        "1 sweep(s) of one forward and one backward (and 2 through the prompts' tokens); about 5.5 billion operations, "
        "3 GiB of gradients and 1000 bytes of activations. first; second."
    )
    others = {**vars(plan), "kernel_kept": False, "prompt_backwards": 1, "stored_bytes": 3 * 2**19}
    assert "a second sweep for projections; 6" in str(OnePassPlan(**others))
    assert "one backward; about" in str(OnePassPlan(**others))
    assert "1.5 MiB of gradients" in str(OnePassPlan(**others))
    by_token = {**vars(plan), "backwards": 2}
    assert "one forward and 2 backwards; columns whose coefficients differ from token to token" in str(
        OnePassPlan(**by_token)
    )
    in_row = {**vars(plan), "prompt_forwards": 2}
    assert "one backward, with the prompts' tokens in it 2 times, once for every column; about" in str(
        OnePassPlan(**in_row)
    )
    refused = {**vars(plan), "not_taken": ("packed: its masks", "hidden states: its head")}
    assert str(OnePassPlan(**refused)).endswith("first; second. Not taken: packed: its masks; hidden states: its head.")
