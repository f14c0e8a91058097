"""Bootstrap intervals against what is known of them."""

import numpy as np
import pytest

from evaluation.comparison.intervals import Interval, accuracies, differences


def answers(share: float, *, seeds: int = 1, items: int = 400, spread: float = 0.0) -> np.ndarray:
    """Random right and wrong answers of nets whose accuracy varies by `spread`."""
    random = np.random.default_rng(0)
    shares = share + spread * random.standard_normal((seeds, 1))
    return (random.random((seeds, items)) < shares).astype(float)


def test_one_seed_gives_the_binomial_interval() -> None:
    table = answers(0.7)
    found = accuracies({"task": table})["task"]
    value = table.mean()
    reach = 1.96 * (value * (1 - value) / table.size) ** 0.5
    assert found.value == value
    assert found.low == pytest.approx(value - reach, abs=0.006)
    assert found.high == pytest.approx(value + reach, abs=0.006)


def test_seeds_that_differ_widen_it() -> None:
    alike = np.tile(answers(0.5), (5, 1))
    differing = np.repeat([[0.0], [0.25], [0.5], [0.75], [1.0]], 400, axis=1)
    narrow, wide = (accuracies({"task": table})["task"] for table in (alike, differing))
    assert narrow.high - narrow.low < 0.11
    # the standard error of the mean of 0 to 1 in quarters: 0.395 / sqrt(5) = 0.177
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 0.177, abs=0.1)


def test_two_seeds_reach_from_one_to_the_other() -> None:
    found = accuracies({"task": np.repeat([[0.25], [0.75]], 400, axis=1)})["task"]
    assert (found.low, found.high) == pytest.approx((0.25, 0.75))


def test_the_mean_weighs_tasks_equally() -> None:
    found = accuracies({"few": np.ones((2, 10)), "many": np.zeros((2, 1000))})
    mean = found["mean"]
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.5, 0.5, 0.5))


def test_items_pair_two_nets() -> None:
    easy = np.repeat([[1.0] * 200 + [0.0] * 200], 3, axis=0)
    better = easy.copy()
    better[:, 200:220] = 1.0  # right wherever the other is, and on 20 items more
    paired = differences({"task": better}, {"task": easy})["task"]
    assert paired.value == pytest.approx(0.05)
    assert paired.excludes_zero and paired.high - paired.low < 0.05
    alone = accuracies({"task": easy})["task"]
    assert alone.high - alone.low > 0.09


def test_equal_nets_do_not_differ() -> None:
    table = answers(0.6, seeds=4, spread=0.1)
    other = answers(0.6, seeds=3, spread=0.1)
    assert not differences({"task": table}, {"task": other})["task"].excludes_zero


def test_it_gives_the_same_interval_again() -> None:
    table = {"a": answers(0.6, seeds=3), "b": answers(0.2, seeds=3)}
    assert accuracies(table) == accuracies(table)
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
