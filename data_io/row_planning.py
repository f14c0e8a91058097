"""How the examples of a run become rows, and what that comes to: steps, slots, padding.

Owns the plan, counted from the packing itself (`multipack_sampler`); `dataset_new` makes the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_io.sampled_format import CHUNK, EpochIndex, SampledData
from multipack_sampler import MultipackSampler, count_epoch

SLOT_MULTIPLE = 64  # S is rounded up to this, so that few runs differ in shape


@dataclass(frozen=True, slots=True)
class RowPacking:
    """How examples become rows: the same on every rank."""

    batch_max_length: int  # T: tokens of one rank's row
    num_replicas: int  # rows of a global batch, one for each rank
    drop_last_batch: bool  # leave out the global batch that reaches the end of the epoch
    target_only: bool  # score responses only, and not instructions too
    micro_batch_size: int | None = None  # tokens; rows are split into batches of at most that

    @classmethod
    def of_training(
        cls, global_batch_size: int, num_replicas: int, *, target_only: bool, micro: int | None
    ) -> RowPacking:
        """The rows of a training run; ValueError where ranks cannot share its global batch."""
        if global_batch_size % num_replicas:
            raise ValueError(
                f"{global_batch_size=} is not divisible by the {num_replicas} ranks; "
                f"use e.g. {-(-global_batch_size // num_replicas) * num_replicas}"
            )
        return cls(
            batch_max_length=global_batch_size // num_replicas,
            num_replicas=num_replicas,
            drop_last_batch=True,
            target_only=target_only,
            micro_batch_size=micro,
        )

    @property
    def batch_tokens(self) -> int:
        """T: tokens of one batch as the model sees it, padding included."""
        return min(self.micro_batch_size or self.batch_max_length, self.batch_max_length)


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """What the epochs of a run come to, counted from the packing itself."""

    steps: tuple[int, ...]  # global batches of each epoch
    examples: tuple[int, ...]  # of each epoch, consumed when it ends
    num_slots: int  # S: holds the examples of any row of the run
    padding_share: float  # of all tokens in all rows
    mean_keys: float  # tokens that a token attends to, on average over the data


def plan_epochs(
    data: SampledData, packing: RowPacking, epochs: int, *, epoch: int = 0, cursor: int = 0
) -> EpochPlan:
    """Plans epochs 0 to `epochs - 1`, or what is left of them from (epoch, cursor) on."""
    data.require_epochs(epochs)
    steps, examples, max_row_examples, filled_tokens, pairs, tokens = [], [], 1, 0, 0, 0
    for number in range(epoch, epochs):
        index = data.epoch(number)
        lengths = index.row_lengths()
        longest = int(lengths.argmax())
        if packing.micro_batch_size and lengths[longest] > packing.batch_tokens:
            raise ValueError(
                f"epoch {number} of {data.folder}: example {longest} takes {lengths[longest]} "
                f"tokens, more than micro_batch_size={packing.micro_batch_size}; make "
                "micro-batches at least that long"
            )
        count = count_epoch(
            lengths,
            batch_max_length=packing.batch_max_length,
            num_replicas=packing.num_replicas,
            drop_last_batch=packing.drop_last_batch,
            cursor=cursor if number == epoch else 0,
        )
        if count.final_cursor == 0:
            raise ValueError(
                f"epoch {number} of {data.folder} makes no step: its {len(lengths)} examples are "
                f"too few for a global batch of num_replicas={packing.num_replicas} rows of "
                f"batch_max_length={packing.batch_max_length} tokens"
                f"{', or it is the last one, which is dropped' * packing.drop_last_batch}; use "
                "fewer tokens in a batch, or more data"
            )
        steps.append(count.num_batches)
        examples.append(count.final_cursor)
        max_row_examples = max(max_row_examples, count.max_row_examples)
        filled_tokens += count.filled_tokens
        pairs += _attended_pairs(index)
        tokens += int(lengths.sum(dtype=np.int64))
    row_tokens = sum(steps) * packing.num_replicas * packing.batch_max_length
    return EpochPlan(
        steps=tuple(steps),
        examples=tuple(examples),
        num_slots=-(-max_row_examples // SLOT_MULTIPLE) * SLOT_MULTIPLE,
        padding_share=1 - filled_tokens / max(1, row_tokens),
        mean_keys=pairs / max(1, tokens),
    )


def heaviest_cursors(data: SampledData, packing: RowPacking) -> tuple[int, int]:
    """Where the two global batches of epoch 0 begin that cost attention most (or one, twice)."""
    lengths = data.epoch(0).row_lengths()
    sampler = MultipackSampler(
        lengths,
        batch_max_length=packing.batch_max_length,
        num_replicas=packing.num_replicas,
        rank=0,
        drop_last_batch=packing.drop_last_batch,
    )
    costs = {
        row.start_cursor: np.square(
            lengths[row.start_cursor : row.next_cursor], dtype=np.int64
        ).sum()
        for row in sampler
    }
    first, *others = sorted(costs, key=lambda cursor: -costs[cursor])
    return first, (others or [first])[0]


def _attended_pairs(index: EpochIndex) -> int:
    """Pairs of tokens of which the first attends to the second, over a whole epoch."""
    pairs = 0
    for at in range(0, len(index), CHUNK):
        prefix_lens = index.inst_len[at : at + CHUNK].astype(np.int64)
        causal_lens = index.resp_len[at : at + CHUNK].astype(np.int64) - 1
        seen = prefix_lens * (prefix_lens + causal_lens) + causal_lens * (causal_lens + 1) // 2
        pairs += int(seen.sum())
    return pairs
