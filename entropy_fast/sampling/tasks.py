"""Prompts to sample from, with what a verifier needs to reward a response."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from entropy_fast.errors import SamplingError

__all__ = ["PromptTask", "format_prompt", "read_tasks"]


@dataclasses.dataclass(frozen=True)
class PromptTask:
    """One prompt.

    Attributes:
        prompt: what the user asks, plain text.
        answer: the reference answer, None where the verifier needs none.
    """

    prompt: str
    answer: str | None = None


def read_tasks(path: Path) -> list[PromptTask]:
    """Tasks from a JSONL file of objects with ``prompt`` and, optionally, ``answer`` (both strings).

    Raises:
        SamplingError: the file is missing, empty, or a line is not such an object; the message gives the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SamplingError(f"prompts file {path} cannot be read: {error}", fix="pass a UTF-8 JSONL file.") from error
    tasks = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SamplingError(
                f"{path}, line {number}: not JSON ({error.msg}).", fix="one object per line."
            ) from error
        if (
            not isinstance(row, dict)
            or not row.keys() <= {"prompt", "answer"}
            or not isinstance(row.get("prompt"), str)
        ):
            raise SamplingError(
                f"{path}, line {number}: expected an object with `prompt` and optionally `answer`.",
                fix='write lines such as {"prompt": "What is 2 + 3?", "answer": "5"}.',
            )
        if not isinstance(row.get("answer"), (str, type(None))):
            raise SamplingError(f"{path}, line {number}: `answer` is not a string.", fix="quote it.")
        tasks.append(PromptTask(row["prompt"], row.get("answer")))
    if not tasks:
        raise SamplingError(f"prompts file {path} holds no prompt.", fix="write one JSON object per line.")
    return tasks


def format_prompt(task: PromptTask, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt: through the tokenizer's chat template where it has one, as plain text otherwise."""
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": task.prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(task.prompt)["input_ids"])
