"""The lowest held-out loss of a run: which step had it, and whether to hope for a lower one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

METRICS = ("val_ema/loss", "val/loss")  # the first of these that a run has


class LowestLoss:
    """Follows the losses of a run, those before it was continued included.

    `patience`: how many scores in a row may be no lower; None: any number.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]], patience: int | None) -> None:
        self.patience = patience
        self.step, self.loss, self.metric = 0, float("inf"), ""
        self.num_worse = 0  # scores since
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> bool:
        """Takes a line of metrics.jsonl in; whether its loss is lower than all before it.

        A loss that is not a number is not, and lines without a loss do not count.
        """
        metric = next((name for name in METRICS if name in line), None)
        if metric is None:
            return False
        if not line[metric] < self.loss:
            self.num_worse += 1
            return False
        self.step, self.loss, self.metric, self.num_worse = line["step"], line[metric], metric, 0
        return True

    def spent(self) -> str | None:
        """Why to stop; None: go on."""
        if self.patience is None or self.num_worse < self.patience:
            return None
        lowest = f"no {self.metric} below {self.loss:.4g} of step {self.step:,}" * bool(self.metric)
        return f"val_data.patience={self.patience}: {lowest or 'no loss that is a number'}"
