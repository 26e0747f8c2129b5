"""One-digit arithmetic from reasoning-gym: small enough that a 135M model is right a fifth of the time, not always."""

from __future__ import annotations

import reasoning_gym

from entropy_fast.sampling import PromptTask

__all__ = ["arithmetic_tasks"]


def arithmetic_tasks(count: int, seed: int) -> list[PromptTask]:
    """``count`` products of two one-digit numbers, no two alike as long as there are enough of them.

    Args:
        count: number of tasks.
        seed: of the dataset.
    """
    pool = reasoning_gym.create_dataset(
        "products", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=8 * count, seed=seed
    )
    unique = dict.fromkeys((str(entry["question"]), str(entry["answer"])) for entry in pool)
    tasks = [PromptTask(question, answer) for question, answer in unique]
    repeats = -(-count // len(tasks))
    return (tasks * repeats)[:count]
