"""Prompts to sample from, with what a verifier needs to reward a response."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from entropy_fast.errors import SamplingError
from entropy_fast.rollouts.jsonl import JsonLineError, json_lines
from entropy_fast.rollouts.tokenizing import LONE_SURROGATE, prompt_token_ids, token_ids

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
    tasks = []
    try:
        for number, row in json_lines(path):
            if not row.keys() <= {"prompt", "answer"} or not isinstance(row.get("prompt"), str):
                raise JsonLineError(
                    number,
                    "expected an object with `prompt` and optionally `answer`.",
                    'write lines such as {"prompt": "What is 2 + 3?", "answer": "5"}.',
                )
            if not isinstance(row.get("answer"), (str, type(None))):
                raise JsonLineError(number, "`answer` is not a string.", "quote it.")
            if LONE_SURROGATE.search(row["prompt"]):
                raise JsonLineError(number, "`prompt` holds half of a surrogate pair.", "write the text as UTF-8.")
            tasks.append(PromptTask(row["prompt"], row.get("answer")))
    except OSError as error:
        raise SamplingError(
            f"prompts file {path} cannot be read ({error.strerror or error}).", fix="pass a UTF-8 JSONL file."
        ) from error
    except JsonLineError as error:
        raise SamplingError(f"{path}, line {error.line}: {error.problem}", fix=error.fix) from error
    if not tasks:
        raise SamplingError(f"prompts file {path} holds no prompt.", fix="write one JSON object per line.")
    return tasks


def format_prompt(task: PromptTask, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt: through the tokenizer's chat template where it has one, as plain text otherwise.

    Raises:
        SamplingError: there are none.
    """
    if tokenizer.chat_template is not None:
        message = [{"role": "user", "content": task.prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = token_ids(tokenizer, [str(text)])[0]
    else:
        ids = prompt_token_ids(tokenizer, [task.prompt])[0]
    if not ids:
        raise SamplingError(
            f"sampling: the tokenizer makes no token of the prompt {task.prompt[:60]!r} (its vocabulary has {len(tokenizer)} "
            "entries).",
            fix="write a prompt, and pass the tokenizer that belongs to the model.",
        )
    return ids
