"""Runs with everything that a report can show, with ordinary and with hostile texts."""

from __future__ import annotations

from typing import Any

from saved_results import Text, made_responses, made_result, made_run

from entropy_fast.run_folder.run_reading import SavedRun
from entropy_fast.truth import EntropyLedger, RealisedChange, Symmetric, Validation

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</style></p></div><svg onload=alert(1)><img src=https://example.org/x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)",
    "{{ 7 * 7 }}{% include 'page.html' %}",
    "<!-- --><![CDATA[ ]]>&lt;b&gt;&#x202e;",
    "\u202eright to left\u2066\u2069\u200f\u061c",
    "\x00\x07\x1b[31m\x7f\x85\ud800\ufeff",
    "javascript:alert(1)",
    "a" * 10_000,
    "\n\r\n\t  \n",
    "\u0600\u0301" * 300,
    "https://example.org/",
    "שלום עולם",
]


def ledger() -> EntropyLedger:
    book = EntropyLedger()
    for step in range(10):
        for part in ("direct", "total"):
            numbers = {"forecast": -0.1 * step, "std_error": 0.02, "realised": -0.11 * step, "realised_error": 0.01}
            book.record(step, part=part, **numbers)
    return book


def validation(**changes: Any) -> Validation:
    nan, inf = float("nan"), float("inf")
    point = RealisedChange(
        0.1, -1e-3, nan, nan, nan, Symmetric(-1e-3, nan, nan), 1e-5, nan, nan, fresh=False, below_floor=False
    )
    fields = {
        "forecast": (-1e-2, nan, nan), "points": (point,), "unit": "nats per token", "level": 1.0, "floor": 1e-7,
        "learning_rate": 1e-4, "geometry": "next_step", "slope": 0.99, "r_squared": 0.9, "smallest_ratio": 0.99,
        "own_ratio": 1.0, "total_slope": nan, "total_slope_error": nan, "ten_percent_off": inf, **changes,
    }  # fmt: skip
    return Validation(**fields)


def full_run(
    text: Text = lambda n, i: f"What is {n}?", piece: Text = lambda i, t: f" word{t}", path: str = "runs/made"
) -> SavedRun:
    run = made_run(made_result(5, text=text), made_responses(5, text=text, piece=piece), path)
    return SavedRun(run.path, run.result, (ledger(),), (), {path: validation()})


def hostile_run() -> SavedRun:
    def text(n: int, i: int) -> str:
        return HOSTILE[n % len(HOSTILE)] + HOSTILE[(n + 1) % len(HOSTILE)]

    def piece(i: int, t: int) -> str:
        return HOSTILE[(i + t) % len(HOSTILE)]

    return full_run(text, piece, path="runs/" + HOSTILE[0].replace("/", "") + HOSTILE[7])
