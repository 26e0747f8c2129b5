"""Rollouts files: what is written reads back, every form of a row reads the same, a failing writer harms nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from entropy_fast.errors import RolloutsFileError
from entropy_fast.rollouts import jsonl, read_rollouts, write_rollouts
from entropy_fast.rollouts.container import Rollouts
from entropy_fast.rollouts.fields import TOKEN_FIELDS

Write = Callable[[list[dict[str, Any]]], Path]
SAME_FOLDER = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stripped(rollouts: Rollouts, field: str) -> list[list[int]]:
    """The rows of a [N, T] field without padding."""
    values = getattr(rollouts, field)
    return [row[mask.bool()].tolist() for row, mask in zip(values, rollouts.attention_mask, strict=True)]


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    for field in ("input_ids", "loss_mask"):
        assert stripped(found, field) == stripped(expected, field), field
    assert found.group_ids.tolist() == expected.group_ids.tolist()
    for field in ("advantages", "rewards"):
        value, other = getattr(found, field), getattr(expected, field)
        assert (value is None) == (other is None), field
        if other is not None:
            assert value.dtype == torch.float64
            # Bit for bit, the sign of zero included.
            assert torch.equal(value.view(torch.int64), other.double().view(torch.int64)), field
    assert found.max_lengths_given == expected.max_lengths_given
    assert found.length_budgets.tolist() == expected.length_budgets.tolist()
    rows = torch.arange(expected.n_sequences)
    for field in TOKEN_FIELDS:
        values, others = found.of_response_tokens(field, rows), expected.of_response_tokens(field, rows)
        assert (values is None) == (others is None)
        if values is not None:
            assert getattr(found, field).dtype == torch.float64
            assert torch.equal(values, others)
    for field in ("temperature", "top_p", "top_k", "min_p", "prompts", "responses"):
        assert getattr(found, field) == getattr(expected, field), field


@st.composite
def any_rollouts(draw: st.DrawFn) -> Rollouts:
    """Ragged, interleaved groups, multi-turn masks, padding on both sides, any optional field present or not."""
    groups = draw(st.lists(st.sampled_from([-(2**63), -1, 0, 3, 2**63 - 1]), min_size=1, max_size=6))
    token = st.integers(0, 2**40)
    prompt = {group: draw(st.lists(token, min_size=1, max_size=3)) for group in set(groups)}
    rows = []
    for group in groups:
        answer = draw(st.lists(st.tuples(token, st.integers(0, 1)), max_size=5))
        mask = [1 if index == 0 else kept for index, (_, kept) in enumerate(answer)]
        ids = [*prompt[group], *(entry for entry, _ in answer)]
        rows.append((draw(st.integers(0, 2)), ids, [0] * len(prompt[group]) + mask))
    width = max(left + len(ids) for left, ids, _ in rows) + draw(st.integers(0, 2))
    pad = draw(st.integers(0, 9))
    n, b = len(groups), len(prompt)

    def padded(left: int, values: list[int], fill: int) -> list[int]:
        return [fill] * left + values + [fill] * (width - left - len(values))

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    number = st.floats(-(2.0**120), 2.0**120, width=32).filter(lambda value: value == 0 or abs(value) > 1e-36)
    numbers = st.lists(number, min_size=n, max_size=n).map(
        lambda values: torch.tensor(values, dtype=dtype) / (3 if dtype == torch.float64 else 1)
    )
    logprobs = st.lists(st.floats(-1e3, 0, width=32), min_size=n * width, max_size=n * width).map(
        lambda values: torch.tensor(values, dtype=dtype).view(n, width) / (3 if dtype == torch.float64 else 1)
    )
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    return Rollouts(
        torch.tensor([padded(left, ids, pad) for left, ids, _ in rows]),
        torch.tensor([padded(left, [1] * len(ids), 0) for left, ids, _ in rows]),
        torch.tensor([padded(left, mask, 0) for left, _, mask in rows]),
        torch.tensor(groups),
        advantages=draw(numbers),
        rewards=maybe(numbers),
        max_lengths=maybe(st.lists(st.integers(5, 2**62), min_size=b, max_size=b).map(torch.tensor)),
        old_logprobs=maybe(logprobs),
        temperature=maybe(st.floats(1e-6, 1e6)),
        top_p=maybe(st.floats(1e-6, 1.0)),
        top_k=maybe(st.integers(1, 2**63 - 1)),
        min_p=maybe(st.floats(0.0, 1.0, exclude_max=True)),
        prompts=maybe(st.lists(text, min_size=b, max_size=b)),
        responses=maybe(st.lists(text, min_size=n, max_size=n)),
    )


@SAME_FOLDER
@given(rollouts=any_rollouts())
def test_what_is_written_reads_back(tmp_path: Path, suffix: str, rollouts: Rollouts) -> None:
    path = tmp_path / f"rollouts.{suffix}"
    write_rollouts(rollouts, path)
    found = read_rollouts(path)
    assert_same(found, rollouts)
    first = path.read_bytes()
    write_rollouts(found, path)
    assert path.read_bytes() == first, "writing what was read must give the same file"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_rows_that_differ_in_padding_only_make_the_same_file(tmp_path: Path, suffix: str) -> None:
    common: dict[str, Any] = {"group_ids": torch.tensor([0, 0]), "advantages": torch.tensor([1.0, 2.0])}

    def build(ids: list[list[int]], attention: list[list[int]], loss: list[list[int]]) -> Rollouts:
        return Rollouts(torch.tensor(ids), torch.tensor(attention), torch.tensor(loss), **common)

    right = build([[1, 2, 3, 9], [1, 4, 9, 9]], [[1, 1, 1, 0], [1, 1, 0, 0]], [[0, 1, 1, 0], [0, 1, 0, 0]])
    left = build([[1, 2, 3], [0, 1, 4]], [[1, 1, 1], [0, 1, 1]], [[0, 1, 1], [0, 0, 1]])
    paths = [tmp_path / f"{name}.{suffix}" for name in ("right", "left")]
    for rollouts, path in zip((right, left), paths, strict=True):
        write_rollouts(rollouts, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = read_rollouts(paths[0])
    assert found.input_ids.tolist() == [[1, 2, 3], [1, 4, 0]]
    assert found.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert found.loss_mask.tolist() == [[0, 1, 1], [0, 1, 0]]


def test_prompt_and_response_ids_are_joined(write_rows: Write) -> None:
    rows = [
        {
            "group_id": 4,
            "prompt_token_ids": [1, 2],
            "response_token_ids": [3],
            "reward": 1.0,
            "prompt": "a",
            "response": "b",
        },
        {
            "group_id": 4,
            "prompt_token_ids": [1, 2],
            "response_token_ids": [],
            "reward": 0.0,
            "prompt": "a",
            "response": "",
        },
    ]
    found = read_rollouts(write_rows(rows))
    assert stripped(found, "input_ids") == [[1, 2, 3], [1, 2]]
    assert stripped(found, "loss_mask") == [[0, 0, 1], [0, 0]]
    assert found.group_ids.tolist() == [4, 4]
    assert found.advantages.tolist() == [0.5, -0.5]  # type: ignore[union-attr]
    assert (found.prompts, found.responses) == (("a",), ("b", ""))


def test_group_names_become_numbers_in_order_of_appearance(write_rows: Write) -> None:
    rows = [{"group_id": name, "input_ids": [1, 2], "loss_mask": [0, 1], "advantage": 0} for name in "zaz"]
    assert read_rollouts(write_rows(rows)).group_ids.tolist() == [0, 1, 0]


def test_a_boolean_loss_mask_is_a_mask(write_rows: Write) -> None:
    path = write_rows([{"group_id": 0, "input_ids": [1, 2], "loss_mask": [False, True], "advantage": 0.0}])
    assert read_rollouts(path).loss_mask.tolist() == [[0, 1]]


def test_budgets_and_sampling_are_read(write_rows: Write) -> None:
    row = {"input_ids": [1, 2], "loss_mask": [0, 1], "advantage": 1.0, "temperature": 1, "top_p": 0.9}
    found = read_rollouts(write_rows([row | {"group_id": 5, "max_length": 8}, row | {"group_id": 2, "max_length": 4}]))
    assert found.max_lengths_given
    assert found.length_budgets.tolist() == [8, 4]
    assert (found.temperature, found.top_p) == (1.0, 0.9)
    assert (found.top_k, found.min_p) == (None, None), "files from before there were such keys"


@pytest.mark.parametrize(("written", "kept"), [(50, 50), (1, 1), (0, None), (-1, None)])
def test_top_k_and_min_p_are_read(write_rows: Write, written: int, kept: int | None) -> None:
    row = {"group_id": 0, "input_ids": [1, 2], "loss_mask": [0, 1], "advantage": 1.0, "top_k": written, "min_p": 0.25}
    found = read_rollouts(write_rows([row, row]))
    assert (found.top_k, found.min_p) == (kept, 0.25)
    assert type(found.top_k) is type(kept)
    assert found.truncated_by == (*([] if kept is None else [f"top-k {kept}"]), "min-p 0.25")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 3), pa.list_(pa.uint64())]
)
def test_parquet_lists_of_any_integer_type_are_read_across_row_groups(tmp_path: Path, kind: pa.DataType) -> None:
    ids = [[1, index, index + 1] for index in range(5)]
    columns = {"group_id": pa.array(range(5)), "input_ids": pa.array(ids, kind), "advantage": pa.array([0.5] * 5)}
    columns["loss_mask"] = pa.array([[0, 1, 1]] * 5)
    columns["prompt"] = pa.array(["p"] * 5).dictionary_encode()
    pq.write_table(pa.table(columns), tmp_path / "r.parquet", row_group_size=2)
    found = read_rollouts(tmp_path / "r.parquet")
    assert found.input_ids.tolist() == ids
    assert found.prompts == ("p",) * 5


def test_folder_names_add_no_columns(tmp_path: Path) -> None:
    folder = tmp_path / "reward=3"
    folder.mkdir()
    write_rollouts(some_rollouts(), folder / "r.parquet")
    assert read_rollouts(folder / "r.parquet").rewards is None


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path: Path) -> None:
    line = b'{"group_id": 0, "input_ids": [1, 2], "loss_mask": [0, 1], "advantage": 1, "response": "a\xe2\x80\xa8b"}'
    path = tmp_path / "r.JSONL"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    found = read_rollouts(str(path))
    assert found.n_sequences == 2
    assert found.responses == ("a\u2028b",) * 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["[BOS]", "[EOS]", "[UNK]", "two", "plus", "is", "four", "five"])}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    special = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)  # type: ignore[no-untyped-call]


def test_texts_are_tokenised_with_special_tokens_on_the_prompt_only(
    write_rows: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    answers = ["four [EOS]", "five", ""]
    rows = [{"group_id": "q", "prompt": "two plus two is", "response": text, "advantage": 0.0} for text in answers]
    found = read_rollouts(write_rows(rows), tokenizer=tokenizer)
    prompt = [0, 3, 4, 3, 5]
    assert stripped(found, "input_ids") == [[*prompt, 6, 1], [*prompt, 7], prompt]
    assert found.response_lengths.tolist() == [2, 1, 0]
    assert found.prompts == ("two plus two is",)
    assert found.responses == tuple(answers)


@pytest.mark.parametrize(
    "template", ["$A", "[BOS] $A", "$A [EOS]", "[BOS] $A [EOS]", "[BOS] $A [SEP]", "[BOS] [SEP] $A [EOS]"]
)
@pytest.mark.parametrize("own", ["", "[BOS] ", "[EOS] "])
@pytest.mark.parametrize("text", ["two plus two is", "two [EOS]", ""])
def test_no_second_beginning_and_nothing_between_prompt_and_response(
    write_rows: Write, template: str, own: str, text: str
) -> None:
    """The right sequence is written down by hand: beginning (once), text, response."""
    words = ["[BOS]", "[EOS]", "[SEP]", "[UNK]", "two", "plus", "is", "four"]
    number = {word: index for index, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(number, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(words[:4])
    special = [(word, number[word]) for word in words[:3]]
    model.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=model, bos_token="[BOS]", eos_token="[EOS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    prompt = (own + text).split()
    beginning = template.split("$A")[0].split()
    if prompt and prompt[0] in beginning:
        beginning = []
    expected = [*beginning, *prompt, "four", "[EOS]"]
    rows = [{"group_id": 0, "prompt": own + text, "response": "four [EOS]", "advantage": 0.0}]
    path = write_rows(rows)
    if expected[0] == "four":
        with pytest.raises(RolloutsFileError, match="the first token is a response token"):
            read_rollouts(path, tokenizer=fast)
        return
    found = read_rollouts(path, tokenizer=fast)
    assert [words[token] for token in found.input_ids[0].tolist()] == expected
    assert found.response_lengths.tolist() == [2]


def test_pages_are_written_with_checksums_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_rollouts(some_rollouts(advantages=torch.full((3,), 0.123456789, dtype=torch.float64)), path)
    content = path.read_bytes()
    value = np.float64(0.123456789).tobytes()
    assert value in content
    path.write_bytes(content.replace(value, np.float64(0.123456788).tobytes()))
    with pytest.raises(RolloutsFileError, match=r"could not verify page integrity|checksum"):
        read_rollouts(path)


def some_rollouts(n: int = 3, **fields: Any) -> Rollouts:
    mask = torch.ones(n, 4, dtype=torch.int64)
    loss_mask = torch.tensor([0, 1, 1, 1]).expand(n, 4)
    fields = {"advantages": torch.zeros(n)} | fields
    return Rollouts(mask, mask, loss_mask, torch.zeros(n, dtype=torch.int64), **fields)


@pytest.mark.parametrize("exists", [True, False])
def test_a_writer_that_fails_midway_leaves_the_old_file(
    tmp_path: Path, suffix: str, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"r.{suffix}"
    if exists:
        write_rollouts(some_rollouts(2), path)
    before = path.read_bytes() if exists else None
    written: list[int] = []

    def dumps(value: Any, **options: Any) -> str:
        if written:
            raise OSError(28, "No space left on device")
        written.append(1)
        return json.dumps(value, **options)

    def write_table(table: Any, where: Path, **options: Any) -> None:
        written.append(where.write_bytes(b"PAR1 and then"))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "json", type("Json", (), {"dumps": staticmethod(dumps)}))
        patch.setattr(pq, "write_table", write_table)
        with pytest.raises(OSError, match="No space left"):
            write_rollouts(some_rollouts(5), path)
    assert written, "the failure must come after something was written"
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if exists else [])
    assert (path.read_bytes() if exists else None) == before


def test_a_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    rollouts = some_rollouts(1, responses=["\ud800"])
    write_rollouts(rollouts, tmp_path / "r.jsonl")
    assert read_rollouts(tmp_path / "r.jsonl").responses == ("\ud800",)
    with pytest.raises(RolloutsFileError, match=r"r\.parquet: a prompt or response text cannot be stored in UTF-8"):
        write_rollouts(rollouts, tmp_path / "r.parquet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("name", ["r.json", "r", "r.jsonl.gz", "r.csv"])
def test_other_suffixes_are_refused_both_ways(tmp_path: Path, name: str) -> None:
    for call in (lambda path: write_rollouts(some_rollouts(), path), read_rollouts):
        with pytest.raises(RolloutsFileError, match=r"names no rollouts format[\s\S]*use \.jsonl or \.parquet"):
            call(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.parquet"
    write_rollouts(some_rollouts(), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: read_rollouts(path), lambda: write_rollouts(some_rollouts(), path)):
        with pytest.raises(RolloutsFileError, match=r"need pyarrow[\s\S]*or use the \.jsonl format"):
            call()
