"""The lowest held-out loss of a run, and when to hope for no lower one."""

from __future__ import annotations

import math

from training.lowest_loss import LowestLoss


def lines(*losses: float, name: str = "val/loss") -> list[dict[str, float]]:
    return [{"step": 10 * number, name: loss} for number, loss in enumerate(losses, 1)]


def test_the_lowest_is_found_and_told() -> None:
    watch = LowestLoss([], None)
    assert [watch.add(line) for line in lines(3.0, 2.0, 2.0, 2.5, 1.0)] == [
        *(True, True, False, False, True)
    ]
    assert (watch.step, watch.loss, watch.metric, watch.num_worse) == (50, 1.0, "val/loss", 0)
    assert watch.spent() is None


def test_averaged_weights_count_where_they_are_kept() -> None:
    both = [{"step": 1, "val/loss": 1.0, "val_ema/loss": 2.0}]
    both.append({"step": 2, "val/loss": 2.0, "val_ema/loss": 1.5})
    assert LowestLoss(both, None).step == 2


def test_patience_ends_with_so_many_in_a_row() -> None:
    watch = LowestLoss(lines(3.0, 2.0, 2.5, 2.4), patience=3)
    assert watch.spent() is None
    assert not watch.add({"step": 50, "val/loss": 2.3})
    assert watch.spent() == "val_data.patience=3: no val/loss below 2 of step 20"
    assert LowestLoss(lines(3.0, 2.0, 2.5, 2.4, 1.9, 2.0, 2.0), patience=3).spent() is None


def test_lines_without_a_loss_do_not_count() -> None:
    watch = LowestLoss([{"step": 5, "train/loss": 1.0}], patience=1)
    assert not watch.add({"step": 10, "eval/ARC/acc": 0.2})
    assert watch.spent() is None and watch.step == 0


def test_no_number_is_never_the_lowest() -> None:
    watch = LowestLoss(lines(math.nan, math.inf), patience=2)
    assert watch.spent() == "val_data.patience=2: no loss that is a number"
    assert watch.add({"step": 30, "val/loss": 1.0}) and watch.spent() is None
