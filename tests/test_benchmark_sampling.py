"""The benchmark of sampling: both sides give the same rows; memory stays within its bound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.benchmark_sampling import main

MOST_BYTES = 32  # of anonymous memory, per row


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def test_both_sides_give_the_same_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = measured(capsys, "rows=3001", "sources=4", "epochs=2", f"work={tmp_path}")
    assert out.startswith("3,001 rows in 4 sources")
    assert "same rows: True" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_row_takes_at_most_32_bytes_of_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The interpreter and its packages, 40 MB, count in: with more rows it is less."""
    out = measured(capsys, "rows=20_000_000", "epochs=2", "plain=false", f"work={tmp_path}")
    (found,) = re.findall(r"([\d.]+) bytes per row", out)
    assert float(found) <= MOST_BYTES
