"""Verifiers and prompt files."""

from __future__ import annotations

import json
import os

import pytest

from entropy_fast.errors import SamplingError
from entropy_fast.sampling import VERIFIERS, PromptTask, read_tasks
from entropy_fast.sampling.verifiers import number_in


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 42.", "42"),
        ("4 * 5 = 20", "20"),
        ("-7", "-7"),
        ("3-5", "5"),
        ("it is 3, then 1,234", "1234"),
        ("pi is 3.14", "3.14"),
        ("x = -0.5!", "-0.5"),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number_of_a_text(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("so 4 * 5 = 20", "20", 1.0),
        ("20.0", "20", 1.0),
        ("20 or 21", "20", 0.0),
        ("120", "20", 0.0),
        ("twenty", "20", 0.0),
        ("-4", "4", 0.0),
    ],
)
def test_last_number_rewards_only_the_right_number(response, answer, reward):
    assert VERIFIERS["last-number"](response, PromptTask("?", answer)) == reward


def test_exact_text():
    verifier = VERIFIERS["exact-text"]
    assert verifier(" yes \n", PromptTask("?", "yes")) == 1.0
    assert verifier("yes.", PromptTask("?", "yes")) == 0.0


def test_verifiers_refuse_tasks_they_cannot_judge():
    with pytest.raises(SamplingError, match="not a number"):
        VERIFIERS["last-number"]("4", PromptTask("?", "four"))
    with pytest.raises(SamplingError, match="not a number"):
        VERIFIERS["last-number"]("4", PromptTask("?"))
    with pytest.raises(SamplingError, match="no answer"):
        VERIFIERS["exact-text"]("4", PromptTask("?"))


def test_read_tasks(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n\n{"prompt": "b"}\n')
    assert read_tasks(path) == [PromptTask("a", "1"), PromptTask("b", None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "line 2: it is not JSON"),
        ('{"prompt": 3}', "line 1: expected an object"),
        ('{"prompt": "a", "anwser": "1"}', "line 1: expected an object"),
        ('["a"]', "line 1: it holds list, not an object"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: the key `prompt` is there twice"),
        ('{"prompt": "a"}\n{"prompt": ' + "[" * 100_000 + "}", "line 2: it cannot be parsed"),
        ('{"prompt": "\\ud800"}', "line 1: `prompt` holds half of a surrogate pair"),
        ('{"prompt": "a", "answer": NaN}', "line 1: it holds NaN"),
        ('{"prompt": "a", "answer": 4}', "line 1: `answer` is not a string"),
        ("\n", "holds no prompt"),
    ],
)
def test_read_tasks_names_the_line(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(SamplingError, match=message):
        read_tasks(path)


def test_only_a_line_feed_ends_a_line_of_tasks(tmp_path):
    path = tmp_path / "prompts.jsonl"
    text = "a\u2028b\x85c\u2029d\x0be"
    line = json.dumps({"prompt": text, "answer": "1"}, ensure_ascii=False)
    assert "\u2028" in line
    path.write_text(line + "\r\n" + '{"prompt": "b"}', encoding="utf-8", newline="")
    assert read_tasks(path) == [PromptTask(text, "1"), PromptTask("b", None)]


def test_tasks_that_are_not_utf8_are_named_by_their_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(SamplingError, match=r"line 2: it is not UTF-8 \(byte 13"):
        read_tasks(path)


def test_a_pipe_of_tasks_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "prompts.jsonl")
    with pytest.raises(SamplingError, match="not a regular file but a pipe"):
        read_tasks(tmp_path / "prompts.jsonl")


def test_read_tasks_missing_file(tmp_path):
    with pytest.raises(SamplingError, match="cannot be read"):
        read_tasks(tmp_path / "none.jsonl")
