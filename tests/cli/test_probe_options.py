"""Options of a probe on the command line: one for every field, and what is typed is what the field gets."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re

import pytest

from entropy_fast.cli.app import run
from entropy_fast.cli.probe_options import changed_options
from entropy_fast.config import EstimateOptions, RunOptions, option_fields
from entropy_fast.errors import ConfigError

FIELDS = [*option_fields(EstimateOptions), *option_fields(RunOptions)]
# Another value than the default: as typed, and as the field has it.
WORDS = {field.name: next(word for word in field.choices if word != field.default) for field in FIELDS if field.choices}
TYPED = {name: (word, word) for name, word in WORDS.items()} | {
    "blocks": ("3", 3),
    "learning_rate": ("1e-5", 1e-5),
    "parts": ("direct", ("direct",)),
    "policy_temperature": ("0.6", 0.6),
    "kl_coefficient": ("0.05", 0.05),
    "entropy_bonus": ("-0.01", -0.01),
    "max_grad_norm": ("1", 1.0),
    "engine": ("two_pass", "two_pass"),
    "memory_budget": ("8GiB", "8GiB"),
    "prompts_per_microbatch": ("2", 2),
    "max_excluded_share": ("0.25", 0.25),
    "rank_timeout": ("30", 30.0),
    "checkpoint": ("runs/kept", "runs/kept"),
}


@pytest.fixture(scope="module")
def help_text():
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("COLUMNS", "250")
        patch.setenv("TERMINAL_WIDTH", "250")
        assert run(["probe", "--help"]) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_an_option_with_its_words(field, help_text):
    flag = "--" + field.name.replace("_", "-")
    line = next(line for line in help_text.splitlines() if f"{flag} " in line)
    assert field.help in " ".join(help_text.replace("│", " ").split())
    if field.kind is bool:
        assert f"--no-{flag[2:]}" in line
    for word in field.choices:
        assert word in line


def changed(**given):
    return changed_options(EstimateOptions(), RunOptions(), given)


@pytest.mark.parametrize("name", TYPED)
def test_what_is_typed_is_what_the_field_gets(name):
    typed, expected = TYPED[name]
    found = [options for options in changed(**{name: typed}) if hasattr(options, name)]
    assert [getattr(options, name) for options in found] == [expected]
    assert found[0].changed() == (name,)


def test_every_field_is_tried():
    switches = {field.name for field in FIELDS if field.kind is bool}
    assert {field.name for field in FIELDS} == {
        *TYPED,
        *switches,
        "clip_range",
        "dual_clip",
        "sample",
        "relative_error",
        "checkpoint_seconds",
    }
    for name in switches:
        assert changed(**{name: True})[1] == dataclasses.replace(RunOptions(), **{name: True})


@pytest.mark.parametrize(
    ("typed", "expected"), [("0.2", (0.2, 0.2)), ("0.2,0.28", (0.2, 0.28)), (" 0, 3 ", (0.0, 3.0))]
)
def test_clip_range(typed, expected):
    assert changed(clip_range=typed, importance_ratio="token")[0].clip_range == expected


def test_what_is_not_given_is_the_folder_s_and_none_undoes_it():
    stored = EstimateOptions(importance_ratio="token", clip_range=(0.1, 0.2), blocks=4), RunOptions(strict=True)
    assert changed_options(*stored, {}) == stored
    assert changed_options(*stored, dict.fromkeys((field.name for field in FIELDS), None)) == stored
    estimate, options = changed_options(
        *stored, {"importance_ratio": "none", "clip_range": "none", "blocks": "none", "strict": False}
    )
    assert (estimate, options) == (EstimateOptions(), RunOptions())
    with pytest.raises(ConfigError, match="--clip-range none"):
        changed_options(*stored, {"importance_ratio": "none"})


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("blocks", "2.5"),
        ("blocks", "1"),
        ("blocks", "two"),
        ("learning_rate", "fast"),
        ("max_excluded_share", "nan"),
        ("max_excluded_share", "none"),
        ("memory_budget", "much"),
        ("weighting", "none"),
        ("autocast_dtype", "int8"),
        ("clip_range", "0.2,0.3,0.4"),
    ],
)
def test_what_no_field_takes_is_refused_by_the_field(name, typed):
    with pytest.raises(ConfigError, match=name):
        changed(**{name: typed, **({"importance_ratio": "token"} if name == "clip_range" else {})})
