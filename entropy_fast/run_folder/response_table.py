"""``responses.parquet``: every response of a result's batches with its text, its tokens, and their shares where they are known.

One row a response, in the rows of the rollouts. Lists are in the order of the response's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_fast.errors import ResultError
from entropy_fast.estimates.attribution import Role
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.rollouts import Rollouts
from entropy_fast.run_folder.token_texts import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SavedResponse", "TokenShares", "response_table", "responses_of"]

SHARES = ("total", "direct", "visitation")
SCHEMA = pa.schema(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("group_id", pa.int64(), nullable=False),
        pa.field("advantage", pa.float64(), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("token_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("tokens", pa.list_(pa.string())),
        *(pa.field(name, pa.list_(pa.float64())) for name in SHARES),
    ]
)


@dataclasses.dataclass(frozen=True)
class TokenShares:
    """A response's tokens as ones whose log-prob and entropy change, in the unit of δH₁; [L] each.

    Attributes:
        total: share of the forecast.
        direct: of the part at prefixes that are visited today; None where the result has no parts.
        visitation: of the part by which prefixes are visited; None likewise, and where it was not asked for.
    """

    total: tuple[float, ...]
    direct: tuple[float, ...] | None
    visitation: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class SavedResponse:
    """One response; texts are as the model made them and are to be escaped where they are shown.

    Attributes:
        role: of its batch: ``both``, ``entropy`` or ``update``.
        row: in the rollouts of that batch.
        group_id: of its prompt.
        advantage: as the update had it.
        reward: None where the rollouts have none.
        prompt: text of the prompt; None where neither the rollouts nor a tokenizer gave it.
        response: text of the response, likewise.
        token_ids: [L] of the response tokens that are scored.
        tokens: [L] what each adds to the text; None without a tokenizer.
        shares: of its tokens; None where they were not asked for, and for an update batch.
    """

    role: Role
    row: int
    group_id: int
    advantage: float
    reward: float | None
    prompt: str | None
    response: str | None
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...] | None
    shares: TokenShares | None


def response_table(
    result: DeltaH1Result, batches: Mapping[Role, Rollouts], tokenizer: PreTrainedTokenizerBase | None = None
) -> pa.Table:
    """The table of a result.

    Args:
        result: of these batches.
        batches: as the probe was given them, with rows that have no response tokens: ``both``, or ``entropy`` and ``update``.
        tokenizer: of the policy; None leaves tokens without texts.

    Raises:
        ResultError: the result is of other batches.
    """
    texts = None if tokenizer is None else TokenTexts(tokenizer)
    rows: list[dict[str, Any]] = []
    for role, rollouts in batches.items():
        tables = _share_tables(result) if role != "update" else {}
        for name, table in tables.items():
            if table.shape != rollouts.input_ids.shape:
                raise ResultError(
                    f"shares of tokens ({name}) are {list(table.shape)}, and the {role} batch is "
                    f"{list(rollouts.input_ids.shape)}.",
                    fix="pass the rollouts that were probed.",
                )
        rows += [_row(role, row, rollouts, tables, texts) for row in range(rollouts.n_sequences)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def responses_of(table: pa.Table) -> tuple[SavedResponse, ...]:
    """What `response_table` made, back.

    Raises:
        ResultError: the table is none of these, or its lists do not fit one another.
    """
    if not table.schema.equals(SCHEMA):
        raise ResultError(f"responses.parquet has columns {table.schema.names}.", fix="run the probe again.")
    return tuple(_response(row) for row in table.to_pylist())


def _share_tables(result: DeltaH1Result) -> dict[str, Tensor]:
    split = result.split
    parts = {} if split is None else {"direct": split.direct, "visitation": split.visitation}
    known = {name: found.by_token for name, found in ({"total": result.forecast} | parts).items()}
    return {name: table for name, table in known.items() if table is not None}


def _row(
    role: Role, row: int, rollouts: Rollouts, tables: Mapping[str, Tensor], texts: TokenTexts | None
) -> dict[str, Any]:
    mask, real = (t[row].cpu() == 1 for t in (rollouts.loss_mask, rollouts.attention_mask))
    ids, columns = rollouts.input_ids[row].cpu(), mask.nonzero().squeeze(-1).tolist()
    prompt_index = int(rollouts.prompt_index[row])
    start = columns[0] if columns else len(mask)
    prompt_ids = ids[:start][real[:start]].tolist()
    token_ids = ids[mask].tolist()
    assert rollouts.advantages is not None
    prompt = None if rollouts.prompts is None else rollouts.prompts[prompt_index]
    response = None if rollouts.responses is None else rollouts.responses[row]
    if texts is not None:
        prompt = texts.text(prompt_ids) if prompt is None else prompt
        response = texts.text(token_ids) if response is None else response
    return {
        "role": role,
        "row": row,
        "group_id": int(rollouts.group_ids[row]),
        "advantage": float(rollouts.advantages[row]),
        "reward": None if rollouts.rewards is None else float(rollouts.rewards[row]),
        "prompt": prompt,
        "response": response,
        "token_ids": token_ids,
        "tokens": None if texts is None else texts.pieces(prompt_ids[-1] if prompt_ids else None, token_ids),
        **{name: tables[name][row].cpu()[mask].to(torch.float64).tolist() for name in tables},
    }


def _response(row: dict[str, Any]) -> SavedResponse:
    count = len(row["token_ids"])
    for name in ("tokens", *SHARES):
        if row[name] is not None and len(row[name]) != count:
            raise ResultError(
                f"responses.parquet: `{name}` of row {row['row']} ({row['role']}) has {len(row[name])} entries for {count} "
                "tokens.",
                fix="run the probe again.",
            )
    shares = None
    if row["total"] is not None:
        shares = TokenShares(*(None if row[name] is None else tuple(row[name]) for name in SHARES))  # type: ignore[arg-type]
    fields = {name: row[name] for name in ("role", "row", "group_id", "advantage", "reward", "prompt", "response")}
    tokens = None if row["tokens"] is None else tuple(row["tokens"])
    return SavedResponse(**fields, token_ids=tuple(row["token_ids"]), tokens=tokens, shares=shares)
