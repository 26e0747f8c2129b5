"""Ready updates to compare with the one that is planned, for ``fast_delta_h1(updates={name: ...})``.

>>> updates = {"with a bonus": entropy_bonus(0.01), "negatives alone": reweighted(positive=0)}
"""

from __future__ import annotations

from entropy_fast.columns.candidates import (
    Candidate,
    clip_cov,
    clip_higher,
    entropy_bonus,
    kl_cov,
    reweighted,
)

__all__ = ["Candidate", "clip_cov", "clip_higher", "entropy_bonus", "kl_cov", "reweighted"]
