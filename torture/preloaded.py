"""What the process does once that all runs are forked from: it reads code that was compiled."""

from __future__ import annotations

from multipack_sampler import MultipackSampler, count_epoch

_ROWS = {"batch_max_length": 4, "num_replicas": 1, "drop_last_batch": False}
count_epoch([1, 2, 3], **_ROWS)
list(MultipackSampler([1, 2, 3], rank=0, **_ROWS))
