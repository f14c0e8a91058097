"""Which learning rate is chosen, and when the grid grows."""

import pytest

from evaluation.comparison.tuning import lr_beyond, settled


@pytest.mark.parametrize(
    ("tried", "beyond"),
    [
        ({1e-3: 0.1, 2e-3: 0.3, 4e-3: 0.2}, None),
        ({1e-3: 0.1, 2e-3: 0.2, 4e-3: 0.3}, 8e-3),
        ({1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.1}, 5e-4),
        ({2e-3: 0.2, 4e-3: 0.2}, 1e-3),
    ],
)
def test_the_grid_grows_where_the_best_is_at_its_edge(tried: dict, beyond: float | None) -> None:
    assert lr_beyond(tried) == beyond


def test_a_tie_takes_the_smallest_and_says_so() -> None:
    chosen = settled({1e-3: 0.1, 4e-3: 0.5, 2e-3: 0.5, 8e-3: 0.4})
    assert (chosen.lr, chosen.note) == (2e-3, "tie of 0.002, 0.004")
    assert list(chosen.tried) == [1e-3, 2e-3, 4e-3, 8e-3]


def test_an_optimum_at_the_edge_is_told() -> None:
    assert settled({1e-3: 0.1, 2e-3: 0.5}).note == "at the edge of the grid"
    assert settled({1e-3: 0.1, 2e-3: 0.5, 4e-3: 0.2}).note == ""
