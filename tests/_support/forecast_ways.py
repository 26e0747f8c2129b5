"""The ways to a forecast that a question has to come out of alike: which small model, and which options of a run."""

from __future__ import annotations

from typing import Any

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "two_pass": ("tiny", {"engine": "two_pass"}),
    "own logits": ("tiny", {"engine": "one_pass"}),
    "packed": ("qwen2", {"engine": "one_pass"}),
    "in parts": ("qwen2", {"engine": "one_pass", "prompts_per_microbatch": 2}),
    "second sweep": ("qwen2", {"engine": "one_pass", "memory_budget": 1}),
}
