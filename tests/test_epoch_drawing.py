"""The draws: those of `Generator.permutation`, epoch by epoch, source by source."""

from __future__ import annotations

import numpy as np
import pytest

from data_io.epoch_drawing import EpochDraws, SourceDraws


def plainly(
    num_rows: list[int], wanted: list[int], seed: int, epochs: int
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """(orders, rows that each source gave per epoch), with whole permutations and lists."""
    generator = np.random.Generator(np.random.Philox(seed=seed))
    running: list[list[int]] = [[] for _ in num_rows]
    orders, given = [], []
    for _ in range(epochs):
        epoch, first = [], 0
        for source, count in enumerate(num_rows):
            taken: list[int] = []
            while len(taken) < wanted[source]:
                if not running[source]:
                    running[source] = generator.permutation(count).tolist()
                taken.append(first + running[source].pop(0))
            epoch.append(taken)
            first += count
        drawn = [row for taken in epoch for row in taken]
        orders.append([drawn[at] for at in generator.permutation(len(drawn))])
        given.append(epoch)
    return orders, given


CASES = [
    ([5, 8], [5, 8], 3),
    ([5, 8, 1], [3, 16, 1], 4),
    ([5, 8], [12, 3], 5),
    ([7], [3], 1),
    ([4, 6], [2, 4], 2),
]


@pytest.mark.parametrize(("num_rows", "wanted", "epochs"), CASES)
def test_the_order_is_that_of_plain_permutations(
    num_rows: list[int], wanted: list[int], epochs: int
) -> None:
    draws = EpochDraws(num_rows, wanted, seed=5)
    orders = [order.tolist() for order in draws.epochs(epochs)]
    assert orders == plainly(num_rows, wanted, 5, epochs)[0]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_stored_type_changes_no_draw(dtype: type[np.signedinteger]) -> None:
    source = SourceDraws(100, 1000, np.dtype(dtype))
    drawn = np.empty(1000, dtype)
    source.draw(np.random.Generator(np.random.Philox(seed=3)), drawn)
    expected = np.random.Generator(np.random.Philox(seed=3)).permutation(1000) + 100
    assert drawn.tolist() == expected.tolist()


@pytest.mark.parametrize(("num_rows", "wanted", "epochs"), CASES)
def test_what_was_drawn_is_told_row_by_row(
    num_rows: list[int], wanted: list[int], epochs: int
) -> None:
    draws = EpochDraws(num_rows, wanted, seed=5)
    for _ in draws.epochs(epochs):
        pass
    for number, source in enumerate(draws.sources):
        rows = [row for epoch in plainly(num_rows, wanted, 5, epochs)[1] for row in epoch[number]]
        counts = np.bincount(np.array(rows) - source.first, minlength=num_rows[number])
        drawn = source.drawn()
        told = drawn.rounds + (0 if drawn.once_more is None else drawn.once_more)
        assert np.array_equal(np.broadcast_to(told, counts.shape), counts)
        used = np.ones(len(counts), np.bool_) if drawn.used is None else drawn.used
        assert np.array_equal(used, counts > 0)


@pytest.mark.parametrize(("num_rows", "wanted", "epochs"), CASES)
def test_the_first_epoch_tells_which_rows_all_epochs_use(
    num_rows: list[int], wanted: list[int], epochs: int
) -> None:
    draws = EpochDraws(num_rows, wanted, seed=5)
    orders = draws.epochs(epochs)
    next(orders)
    foretold = [
        source.used_after((epochs - 1) * count)
        for source, count in zip(draws.sources, wanted, strict=True)
    ]
    for _ in orders:
        pass
    for source, used in zip(draws.sources, foretold, strict=True):
        found = source.drawn().used
        assert (used is None or used.all()) == (found is None or found.all())
        if used is not None and found is not None:
            assert used.tolist() == found.tolist()
