"""Bad rollouts files: the message gives file, line or row, what is wrong and what to do."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from entropy_fast.errors import RolloutsError, RolloutsFileError
from entropy_fast.rollouts import parquet_metadata, read_rollouts
from entropy_fast.rollouts import rows as rows_module

Write = Callable[[list[dict[str, Any]]], Path]
At = Callable[[int], str]
GOOD: dict[str, Any] = {"group_id": 1, "input_ids": [5, 6, 7], "loss_mask": [0, 0, 1], "advantage": 0.5}
IDS: dict[str, Any] = {"group_id": 1, "prompt_token_ids": [5], "response_token_ids": [6], "advantage": 0.5}
TEXT: dict[str, Any] = {"group_id": 1, "prompt": "a", "response": "b", "advantage": 0.5}


def failure(path: Path, problem: str, fix: str) -> RolloutsFileError:
    with pytest.raises(RolloutsFileError) as caught:
        read_rollouts(path)
    assert caught.value.problem.startswith(str(path))
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    return caught.value


# Each is put into every row, so that Parquet columns have one type; the first row is reported.
VALUES: list[tuple[dict[str, Any], str, Any, str, str]] = [
    (GOOD, "group_id", True, "`group_id` is True; expected a 64-bit integer or a string", "same id"),
    (GOOD, "group_id", 1.0, "`group_id` is 1.0; expected", "same id"),
    (GOOD, "input_ids", [5.0, 6.0, 7.0], "`input_ids` is [5.0, 6.0, 7.0]; expected a list of int", "unpadded"),
    (GOOD, "input_ids", ["5", "6", "7"], "`input_ids` is ['5', '6', '7']; expected a list of integers", "unpadded"),
    (GOOD, "input_ids", [True, False, True], "found elements of type bool", "unpadded"),
    (GOOD, "input_ids", [5, -100, 7], "expected token ids of at least 0, found -100", "-100 included"),
    (GOOD, "input_ids", 5, "`input_ids` is 5; expected a list of integers", "unpadded"),
    (GOOD, "input_ids", [[5, 6, 7]], "found elements of type list", "unpadded"),
    (GOOD, "input_ids", [5, None, 7], "found elements of type", "unpadded"),
    (GOOD, "input_ids", [5, 6], "`input_ids` has 2 entries and `loss_mask` 3", "one 0 or 1 per token"),
    (GOOD, "loss_mask", [0, 0, 1, 1], "`input_ids` has 3 entries and `loss_mask` 4", "one 0 or 1 per token"),
    (GOOD, "loss_mask", [0, 0, 2], "`loss_mask` is [0, 0, 2]; expected a list of 0 and 1", "1 at response tokens"),
    (GOOD, "loss_mask", [0.0, 0.0, 0.5], "expected a list of 0 and 1, found elements of type float", "1 at response"),
    (GOOD, "loss_mask", [1, 0, 0], "the first token is a response token", "BOS token"),
    (IDS, "prompt_token_ids", [], "the first token is a response token", "BOS token"),
    (IDS, "response_token_ids", [-1], "`response_token_ids` is [-1]; expected token ids of at least 0", "unpadded"),
    (IDS, "prompt_token_ids", "five", "`prompt_token_ids` is 'five'; expected a list of integers", "unpadded"),
    (GOOD, "advantage", "0.5", "`advantage` is '0.5'; expected a number", "finite number"),
    (GOOD, "advantage", True, "`advantage` is True; expected a number", "finite number"),
    (GOOD, "advantage", None, "`advantage` is null; expected a number", "finite number"),
    (GOOD, "reward", [1.0], "`reward` is [1.0]; expected a number", "leave `reward` out of every row"),
    (GOOD, "max_length", 8.0, "`max_length` is 8.0; expected an integer of at least 1", "leave the key out"),
    (GOOD, "max_length", 0, "`max_length` is 0; expected an integer of at least 1", "leave the key out"),
    (GOOD, "old_logprobs", -1.0, "`old_logprobs` is -1.0; expected a list of numbers", "log-prob (nats) of every response"),
    (GOOD, "old_logprobs", ["-1"], "`old_logprobs` is ['-1']; expected a list of numbers", "in order"),
    (GOOD, "old_logprobs", [True], "`old_logprobs` is [True]; expected a list of numbers", "in order"),
    (GOOD, "old_logprobs", [[-1.0]], "`old_logprobs` is [[-1.0]]; expected a list of numbers", "in order"),
    (GOOD, "old_logprobs", [-1.0, -2.0], "`old_logprobs` has 2 entries, and the response has 1 tokens", "none for the prompt"),
    (GOOD, "temperature", False, "`temperature` is False; expected a number", "leave the key out"),
    (GOOD, "top_p", "0.9", "`top_p` is '0.9'; expected a number", "leave the key out"),
    (GOOD, "top_k", 50.0, "`top_k` is 50.0; expected an integer of at least 1", "leave the key out"),
    (GOOD, "top_k", -2, "`top_k` is -2; expected an integer of at least 1", "leave the key out"),
    (GOOD, "min_p", "0.1", "`min_p` is '0.1'; expected a number", "leave the key out"),
    (GOOD, "prompt", 3, "`prompt` is 3; expected a string", "leave the key out of every row"),
    (GOOD, "response", ["b"], "`response` is ['b']; expected a string", "leave the key out of every row"),
    (GOOD, "rewards", 1.0, "unknown keys: `rewards`", "did you mean `reward`? Rename or drop them"),
    (GOOD, "xyz", 1.0, "unknown keys: `xyz`", "Rename or drop them; known keys: group_id, input_ids"),
    (GOOD, "prompt_token_ids", [5], "tokens are given in two forms", "keep one of them"),
    (GOOD, "response_token_ids", [5], "tokens are given in two forms", "keep one of them"),
    (TEXT, "response", "b", "no tokenizer was passed", "tokenizer=..."),
]  # fmt: skip


@pytest.mark.parametrize(("row", "key", "value", "problem", "fix"), VALUES)
def test_a_bad_value_is_named(
    row: dict[str, Any], key: str, value: Any, problem: str, fix: str, write_rows: Write, at: At
) -> None:
    error = failure(write_rows([row | {key: value}] * 2), problem, fix)
    assert f", {at(0)}: " in error.problem


@pytest.mark.parametrize(
    ("row", "key"),
    [(GOOD, key) for key in GOOD] + [(IDS, key) for key in IDS] + [(TEXT, key) for key in TEXT],
)
def test_a_missing_key_is_named(row: dict[str, Any], key: str, write_rows: Write, at: At) -> None:
    fields = {name: value for name, value in row.items() if name != key}
    error = failure(
        write_rows([fields] * 2), f"`{key}`", "give" if key == "advantage" else "every row needs `group_id`"
    )
    assert f", {at(0)}: missing keys: " in error.problem


def test_rows_without_any_tokens_are_refused(write_rows: Write, at: At) -> None:
    row = GOOD | {"input_ids": [], "loss_mask": []}
    assert at(0) in failure(write_rows([row, GOOD]), "there is no token at all", "leave the row out").problem


# The first two rows are good; the third is not, by itself or beside the others.
THIRD: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (GOOD, {"input_ids": [5, 6, -1]}, "found -1", "unpadded"),
    (GOOD, {"loss_mask": [0, 1]}, "3 entries and `loss_mask` 2", "one 0 or 1"),
    (GOOD, {"loss_mask": [0, 0, 3]}, "[0, 0, 3]; expected a list of 0 and 1", "1 at response tokens"),
    (GOOD | {"temperature": 1.0}, {"temperature": 0.5}, "`temperature` is 0.5, but in {0} it is 1.0", "separate files"),
    (
        GOOD | {"top_p": 1.0},
        {"top_p": 0.5},
        "`top_p` is 0.5, but in {0} it is 1.0; Rollouts hold one",
        "separate files",
    ),
    (GOOD | {"top_k": 50}, {"top_k": 40}, "`top_k` is 40, but in {0} it is 50", "separate files"),
    (GOOD | {"min_p": 0.5}, {"min_p": 0.1}, "`min_p` is 0.1, but in {0} it is 0.5", "separate files"),
    (GOOD | {"max_length": 4}, {"max_length": 5}, "`max_length` differs from the one in {0}", "share its `max_len"),
    (GOOD | {"max_length": 1}, {"loss_mask": [0, 1, 1]}, "`max_length` is 1, but the response has 2 tokens", "budget"),
    (
        GOOD | {"old_logprobs": [-1.0]},
        {"old_logprobs": []},
        "has 0 entries, and the response has 1 tokens",
        "one number per response token",
    ),
    (GOOD | {"prompt": "a"}, {"prompt": "b"}, "`prompt` differs from the one in {0}, which has the same", "share"),
]


@pytest.mark.parametrize(("base", "change", "problem", "fix"), THIRD)
def test_the_row_that_is_bad_is_the_one_reported(
    base: dict[str, Any], change: dict[str, Any], problem: str, fix: str, write_rows: Write, at: At
) -> None:
    error = failure(write_rows([base, base, base | change]), problem.format(at(0).split(" (")[0]), fix)
    assert f", {at(2)}: " in error.problem


def test_a_log_prob_above_zero_is_refused(write_rows: Write) -> None:
    failure(write_rows([GOOD | {"old_logprobs": [0.3]}] * 2), "`old_logprobs` is 0.3", "nats (not probabilities)")


def test_errors_of_the_container_are_passed_on_with_the_file_in_front(write_rows: Write) -> None:
    path = write_rows([GOOD, GOOD | {"input_ids": [5, 9, 7]}])
    error = failure(path, ": Rollouts: rows 0 and 1 have the same group id but different prompts", "own group id")
    assert isinstance(error.__cause__, RolloutsError)
    path = write_rows([GOOD | {"temperature": 0.0}])
    assert isinstance(failure(path, "`temperature` is 0.0", "greedy decoding").__cause__, RolloutsError)


def lines(tmp_path: Path, *rows: Any) -> Path:
    """A JSON Lines file of bytes as they are and of dictionaries written as JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


GOOD_LINE = json.dumps(GOOD).encode()
LINES: list[tuple[bytes, str, str]] = [
    (b"{'group_id': 1}", "it is not JSON (Expecting property name", "one complete JSON object per line"),
    (GOOD_LINE[:-10], "The file ends within this line: it may be cut off", "one complete JSON object per line"),
    (GOOD_LINE + b" " + GOOD_LINE, "it is not JSON (Extra data", "one complete JSON object per line"),
    (b"[1, 2]", "it holds list, not an object", "one complete JSON object per line"),
    (b"null", "it holds NoneType, not an object", "one complete JSON object per line"),
    (b'{"a": "\xff"}', "it is not UTF-8 (byte 8 of the line)", "in UTF-8"),
    (GOOD_LINE.replace(b"0.5", b"NaN"), "it holds NaN, which is not a JSON number", "finite numbers only"),
    (GOOD_LINE.replace(b"0.5", b"Infinity"), "it holds Infinity, which is not", "finite numbers only"),
    (GOOD_LINE.replace(b"0.5", b"-Infinity"), "it holds -Infinity, which is not", "finite numbers only"),
    (GOOD_LINE.replace(b"0.5", b"1e999"), "`advantage` is inf; expected a finite number", "write a finite number"),
    (
        GOOD_LINE.replace(b"0.5", b"1" + b"0" * 400),
        "expected a number that fits a 64-bit float",
        "write a finite number",
    ),
    (GOOD_LINE.replace(b"0.5", b"1" * 5000), "it cannot be parsed", "one complete JSON object per line"),
    (GOOD_LINE.replace(b"[5", b"[" + b"[" * 100_000), "it cannot be parsed", "one complete JSON object per line"),
    (GOOD_LINE.replace(b"5, 6", b"5, 99999999999999999999"), "expected 64-bit integers", "unpadded"),
    (GOOD_LINE.replace(b"1,", b"99999999999999999999,", 1), "expected a 64-bit integer or a string", "same id"),
    (GOOD_LINE[:-1] + b', "advantage": 1.0}', "the key `advantage` is there twice", "every key once"),
    (GOOD_LINE.replace(b"[0, 0, 1]", b"[0, false, 1]"), "found elements of type bool", "1 at response tokens"),
    (GOOD_LINE.replace(b"5, 6", b"null, 6"), "found elements of type null", "unpadded"),
    (GOOD_LINE[:-1] + b', "reward": 1.0}', "it has `reward`, which line 1 has not", "every row the same keys"),
    (GOOD_LINE[:-1] + b', "rewrd": 1.0}', "unknown keys: `rewrd`", "did you mean `reward`?"),
    (GOOD_LINE.replace(b"loss_mask", b"prompt"), "missing keys: `loss_mask`", "every row needs"),
    (json.dumps(IDS).encode(), "it misses `input_ids`, `loss_mask`, which line 1 has", "every row the same keys"),
    (GOOD_LINE.replace(b"1", b'"one"', 1), "`group_id` is 'one', but in line 1 it is 1", "strings in every row"),
]


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """One line runs out of stack on purpose, and garbage of other tests cannot be finalised at that depth."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize(("line", "problem", "fix"), LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: bytes, problem: str, fix: str) -> None:
    path = lines(tmp_path, GOOD, b"", line)  # the blank line counts
    assert ", line 3 (lines are counted from 1): " in failure(path, problem, fix).problem


def test_an_error_before_the_last_line_does_not_blame_the_end_of_the_file(tmp_path: Path) -> None:
    error = failure(lines(tmp_path, GOOD_LINE[:-1], GOOD), "it is not JSON", "one complete JSON object")
    assert "line 1 " in error.problem
    assert "cut off" not in error.problem


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    failure(lines(tmp_path, content), ": the file holds no rollouts", "one response per row")


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path)
    failure(path, ": the file holds no rollouts", "one response per row")


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    assert isinstance(failure(path, "No such file or directory", "existing").__cause__, FileNotFoundError)
    path.mkdir()
    assert isinstance(failure(path, "Is a directory", "existing").__cause__, IsADirectoryError)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    os.mkfifo(path)
    failure(path, "not a regular file but a pipe", "existing, readable file")


def test_long_and_many_unknown_keys_are_cut(tmp_path: Path) -> None:
    row = GOOD | {"x" * 10_000: 1} | {f"key{n}": 1 for n in range(50)}
    error = failure(lines(tmp_path, row), "x...`, `key0`", "Rename or drop them")
    assert "and 43 others" in error.problem
    assert len(error.problem) < 500


def test_names_from_the_file_are_shown_escaped(tmp_path: Path) -> None:
    row = GOOD | {"\x1b[2Jkey\n  What to do: run this": 1}
    error = failure(lines(tmp_path, row), r"`\x1b[2Jkey\n  What to do: run this`", "Rename or drop them")
    assert "\x1b" not in str(error)
    assert str(error).count("\n") == 1


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), path)
    whole = path.read_bytes()
    for content in (b"", b"garbage", whole[:-20], whole[: len(whole) // 2], b"PAR1" + b"\0" * 40 + b"PAR1"):
        path.write_bytes(content)
        failure(path, ": it cannot be read as Parquet (", "cut off")


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("group_id", pa.array([1, None, 1]), "`group_id` is null"),
        ("advantage", pa.array([0.5, None, 0.5]), "`advantage` is null"),
        ("advantage", pa.array([0.5, float("nan"), 0.5]), "`advantage` is nan; expected a finite number"),
        ("input_ids", pa.array([[5, 6, 7], None, [5, 6, 7]]), "`input_ids` is null"),
        ("input_ids", pa.array([[5, 6, 7], [5, None, 7], [5, 6, 7]]), "found elements of type null"),
        ("input_ids", pa.array([[5, 6, 7], [5, 2**64 - 1, 7], [5, 6, 7]], pa.list_(pa.uint64())), "64-bit integers"),
        ("loss_mask", pa.array([[0, 0, 1], None, [0, 0, 1]]), "`loss_mask` is null"),
        ("old_logprobs", pa.array([[-1.0], None, [-1.0]]), "`old_logprobs` is null"),
        ("old_logprobs", pa.array([[-1.0], [None], [-1.0]]), "expected a list of numbers"),
        ("old_logprobs", pa.array([[-1.0], [float("nan")], [-1.0]]), "expected a list of finite numbers"),
    ],
)
def test_a_bad_parquet_cell_is_named_by_its_row(tmp_path: Path, column: str, values: pa.Array, problem: str) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([GOOD | {"old_logprobs": [-1.0]}] * 3)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)
    assert ", row 1 (rows are counted from 0): " in failure(path, problem, "").problem


def test_a_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    text = pa.array([b"\xff"]).view(pa.string())
    pq.write_table(pa.Table.from_pylist([GOOD]).append_column("response", text), path)
    failure(path, ": it cannot be read as Parquet (", "write the file anew")


@pytest.mark.parametrize("column", ["group_id", "advantage", "input_ids", "extra"])
@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.date32(), pa.date64(), pa.time64("ns"), pa.duration("ns"),
        pa.decimal128(5, 2), pa.decimal256(70, 2), pa.binary(), pa.binary(4), pa.struct([("a", pa.int64())]),
        pa.map_(pa.string(), pa.int64()), pa.list_(pa.timestamp("ns")), pa.list_(pa.struct([("a", pa.date32())])),
        pa.list_(pa.list_(pa.decimal128(3, 1))),
    ],
)  # fmt: skip
def test_a_parquet_column_of_a_type_that_no_field_has(tmp_path: Path, column: str, kind: pa.DataType) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([GOOD])
    if column in table.column_names:
        table = table.drop_columns(column)
    pq.write_table(table.append_column(column, pa.nulls(1, kind)), path)
    stored = pq.read_schema(path).field(column).type  # some types become another in the file
    failure(path, f": the column `{column}` is of type {stored}; expected numbers, texts, or lists of", "cast it")


def test_dates_no_calendar_holds_are_refused_like_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    values = pa.array([2**62], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.Table.from_pylist([GOOD]).append_column("reward", values), path)
    failure(path, "the column `reward` is of type timestamp[us]", "double")


@pytest.mark.parametrize("key", ["input_ids", "response"])
def test_a_small_parquet_file_that_asks_for_much_is_refused_before_it_is_read(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one value, and a page that shrinks to nothing."""
    path = tmp_path / "rows.parquet"
    row = GOOD | {"response": "x", key: [0] * 1_200_000 if key == "input_ids" else "x" * 9_600_000}
    pq.write_table(pa.Table.from_pylist([row]), path, compression="zstd", use_dictionary=["input_ids"])
    assert path.stat().st_size < 2**13
    monkeypatch.setattr(parquet_metadata, "LARGEST_ARRAY_BYTES", 2**23)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda self: pytest.fail("it was read"))
    failure(path, f"the column `{key}` asks for 0.0 GiB; at most 0 GiB are read", "split the file")


def test_two_long_rows_among_short_ones_are_refused_before_the_rectangle_is_made(
    write_rows: Write, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "LARGEST_ARRAY_BYTES", 8 * 4 * 100)
    long = GOOD | {"input_ids": [5, 6] * 50, "loss_mask": [0, 0] + [1] * 98}
    assert read_rollouts(write_rows([GOOD, long, GOOD, GOOD])).input_ids.shape == (4, 100)
    error = failure(write_rows([GOOD, long, GOOD, GOOD, long]), "it has 100 tokens; 5 rows padded", "file of their own")
    assert at(1) in error.problem


def test_prompts_that_a_row_marks_as_such_must_be_the_same(write_rows: Write, at: At) -> None:
    """Where the boundary is written down, a shared beginning is not enough."""
    path = write_rows([IDS, IDS | {"prompt_token_ids": [5, 7]}])
    assert at(1) in failure(path, "its prompt has other tokens than that of", "`loss_mask` of 0").problem


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([GOOD])
    pq.write_table(table.append_column("advantage", table.column("advantage")), path)
    failure(path, "several columns are called advantage", "every column once")


def test_half_of_a_surrogate_pair_cannot_be_tokenised(tmp_path: Path) -> None:
    path = lines(tmp_path, TEXT, TEXT | {"response": "\ud800"})
    with pytest.raises(RolloutsFileError, match=r"line 2 .*`response` cannot be tokenised"):
        read_rollouts(path, tokenizer=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["two plus two is", "[EOS] two"])
def test_a_tokenizer_without_a_vocabulary_is_named_as_the_cause(tmp_path: Path, prompt: str) -> None:
    """What AutoTokenizer makes of some model folders without tokenizer files: only special tokens are known."""
    empty = Tokenizer(models.BPE())
    empty.add_special_tokens(["[EOS]"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="[EOS]")  # type: ignore[no-untyped-call]
    path = lines(tmp_path, TEXT | {"prompt": prompt})
    with pytest.raises(RolloutsFileError, match=r"line 1 .* makes no token of a text .* 1 entries") as caught:
        read_rollouts(path, tokenizer=tokenizer)
    assert "folder without tokenizer files" in caught.value.fix
