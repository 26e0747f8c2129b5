"""SkyRL's `TrainingInputBatch`.

Read from skyrl 0.3.0 (PyPI) and NovaSky-AI/SkyRL at 0446435c: ``skyrl/backends/skyrl_train/training_batch.py``; at 38337015:
``skyrl/train/dataset/preprocess.py``; ``skyrl/train/trainer.py`` of 0.3.0.

``sequences`` [N, T]; everything by response is [N, R] and covers the last R columns, whether responses are aligned to the right
(now) or padded on the right (earlier): column j belongs to the token in column T - R + j. Rows that only even out the number of
rows are copies of others with ``loss_mask`` 0 and uids of their own ("pad0"); they stay, as rows without response tokens.
"""

from __future__ import annotations

from typing import Any

from entropy_fast.errors import RolloutsError
from entropy_fast.integrations.readers.fields import Fields
from entropy_fast.integrations.readers.options import Reader, ReaderOptions
from entropy_fast.integrations.readers.sequences import assemble, in_last_columns, unpadded_rows
from entropy_fast.rollouts import Rollouts

__all__ = ["READER"]

NAME = "skyrl"
BY_RESPONSE = {
    "old_logprobs": ("action_log_probs", "rollout_logprobs"),
    "ref_logprobs": ("base_action_log_probs",),
    "advantages": ("advantages",),
}


def read(batch: Any, options: ReaderOptions) -> Rollouts:
    """Rollouts of a batch with ``metadata`` beside its tensors.

    Raises:
        RolloutsError: a field is missing or does not fit.
    """
    fields = Fields(NAME, batch)
    metadata = Fields(NAME, getattr(batch, "metadata", None) or fields.get("metadata") or {})
    ids = fields.matrix("sequences")
    rows, width = ids.shape
    attention = fields.matrix("attention_mask", rows, width)
    name, value = fields.first("loss_mask", "response_mask")
    mask = fields.matrix(name, rows, value=value)
    size = mask.shape[1]
    stated = metadata.get("response_length")
    if size > width or stated not in (None, size):
        expected = f"at most {width}" if stated is None else f"`response_length` {stated}"
        fields.misshapen(name, mask.shape, [rows, expected])
    if fields.get("response_mask") is not None:
        response = fields.matrix("response_mask", rows, size)
        outside = (mask != 0) & (response == 0)
        if bool(outside.any()):
            row, column = (int(i) for i in outside.nonzero()[0])
            raise RolloutsError(
                f"{NAME}: `loss_mask` is set at row {row}, column {column}, where `response_mask` is 0.",
                fix="pass masks of one batch.",
            )
    by_token = {}
    for field, names in BY_RESPONSE.items():
        name, value = fields.first(*names)
        if value is not None:
            by_token[field] = in_last_columns(fields.matrix(name, rows, size), width)
    rewards = fields.optional_matrix("rewards", rows, size)
    return assemble(
        NAME,
        unpadded_rows(NAME, ids, attention, in_last_columns(mask, width), by_token),
        options,
        group_ids=metadata.get("uids"),
        group_field="`metadata['uids']`",
        advantage_field="`advantages` or `rewards`",
        rewards=None if rewards is None else rewards.double().sum(-1),
    )


READER = Reader(
    NAME,
    read,
    {
        "group ids, where `metadata` was not selected": "groups",
        "advantages, before they are computed": "advantages",
        "the sampling temperature": "temperature",
    },
)
