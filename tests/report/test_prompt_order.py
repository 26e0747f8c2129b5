"""Prompts that act alike are neighbours."""

from __future__ import annotations

import numpy as np

from entropy_fast.report.prompt_order import clustered_order


def test_prompts_that_act_alike_are_neighbours():
    generator = np.random.default_rng(0)
    group = generator.permutation(np.repeat(np.arange(3), 4))
    shares = np.where(group[:, None] == group, 1.0, -0.2) * (1 + group) + 0.05 * generator.normal(size=(12, 12))
    np.fill_diagonal(shares, np.nan)
    ordered = group[clustered_order(shares)]
    assert (np.diff(ordered) != 0).sum() == 2
    assert sorted(clustered_order(shares)) == list(range(12))
    assert clustered_order(np.full((2, 2), np.nan)) == [0, 1]


def test_effects_need_not_be_mutual():
    group = np.array([0, 1, 2, 0, 0, 1, 2, 1, 0])
    shares = np.random.default_rng(1).normal(size=(3, 3))[np.ix_(group, group)]
    np.fill_diagonal(shares, np.nan)
    assert (np.diff(group[clustered_order(shares)]) != 0).sum() == 2


def test_prompts_without_any_effect_have_a_place():
    shares = np.zeros((6, 6))
    shares[0, 3], shares[3, 0] = 1.0, 2.0
    np.fill_diagonal(shares, np.nan)
    assert sorted(clustered_order(shares)) == list(range(6))
