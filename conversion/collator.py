"""Batches for fine-tuning an exported model in transformers: prompts are marked as prefix.

    SFTTrainer(model, data_collator=PrefixCollator(tokenizer.pad_token_id), ...)

Trainers pass `input_ids`, `attention_mask` and `labels` alone, and a model that is not told where
the prompt ends reads it causally. docs/finetuning.md has a whole example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_LABEL = -100
SCORE_COLUMNS = ("completion_mask", "assistant_masks")  # of rows without labels: 1 is scored


@dataclass(frozen=True)
class PrefixCollator:
    """Pads rows on the right and adds `token_type_ids`: 1 for what comes before the first answer.

    A row has `input_ids`, and `labels` (-100: not scored) or one of the columns of 0 and 1 by which
    trl says it. Where it has `token_type_ids` too these are kept. ValueError for rows of which
    nothing is scored, or all.
    """

    pad_token_id: int | None
    max_length: int | None = None  # longer rows are refused: a cut answer teaches to stop nowhere

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns = [_columns(row) for row in rows]
        lengths = [len(each["input_ids"]) for each in columns]
        longest = max(lengths)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a row of {longest} tokens is longer than max_length={self.max_length}; leave it "
                "out of the data, or raise max_length"
            )
        if self.pad_token_id is None and min(lengths) != longest:
            raise ValueError(
                "the tokenizer has no padding token, so that rows of different lengths cannot be "
                "in one batch; use per_device_train_batch_size=1, or a tokenizer that has one"
            )
        fills = {"input_ids": self.pad_token_id or 0, "labels": IGNORE_LABEL}
        return {
            name: torch.tensor(
                [
                    [*each[name], *[fills.get(name, 0)] * (longest - len(each[name]))]
                    for each in columns
                ]
            )
            for name in ("input_ids", "attention_mask", "labels", "token_type_ids")
        }


def _columns(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """All columns of one row; ValueError where it does not say what is scored, or nothing is."""
    ids = list(row["input_ids"])
    labels = _labels(row, ids)
    if len(labels) != len(ids):
        raise ValueError(f"a row has {len(ids)} input_ids and {len(labels)} labels")
    first = next((at for at, label in enumerate(labels) if label != IGNORE_LABEL), None)
    if not first:
        what = "nothing of a row is scored" if first is None else "a row has no prompt: all scored"
        raise ValueError(f"{what}; give rows of a prompt and an answer that has labels")
    types = list(row.get("token_type_ids") or [1] * first + [0] * (len(ids) - first))
    if any(kind and label != IGNORE_LABEL for kind, label in zip(types, labels, strict=True)):
        raise ValueError("token_type_ids mark scored tokens as prefix: what is seen is not learned")
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": labels,
        "token_type_ids": types,
    }


def _labels(row: Mapping[str, Any], ids: Sequence[int]) -> list[int]:
    if row.get("labels") is not None:
        return list(row["labels"])
    for column in SCORE_COLUMNS:
        if row.get(column) is not None:
            scored = zip(ids, row[column], strict=True)
            return [token if is_scored else IGNORE_LABEL for token, is_scored in scored]
    raise ValueError(
        f"a row of {', '.join(sorted(row))} does not say what is scored; it needs labels, or "
        f"{' or '.join(SCORE_COLUMNS)} (trl makes them of prompt and completion)"
    )
