"""The report: shares of the whole, categories by the name up to `__`."""

from __future__ import annotations

from data_io.sampling_report import Amount, Coverage, sampling_report

SOURCES = [
    Coverage("a__x.jsonl", Amount(10, 60, 40), Amount(20, 120, 80), Amount(10, 60, 40)),
    Coverage("a__y.jsonl", Amount(5, 10, 10), Amount(2, 4, 4), Amount(1, 2, 2)),
    Coverage("b|c", Amount(1_000, 2_000, 880), Amount(10, 22, 10), Amount(10, 22, 10)),
]


def cells(report: str, name: str) -> list[list[str]]:
    lines = [line for line in report.splitlines() if line.startswith(f"| **{name}**")]
    return [line.strip("| ").split(" | ")[1:] for line in lines]


def test_shares_are_of_the_whole() -> None:
    report = sampling_report(SOURCES)
    assert cells(report, "GLOBAL")[0][:3] == ["1,015 (100.0%)", "3,000 (100.0%)", "32 (100.0%)"]
    assert cells(report, "a") == [
        ["15 (1.5%)", "120 (4.0%)", "22 (68.8%)", "208 (86.7%)", "124 (84.9%)", "84 (89.4%)"]
    ]
    assert len(cells(report, "a__x.jsonl")) == 1
    assert "Tokens Sampled:** 136 out of 3,000 (4.53%)" in report
    assert "Rows Sampled:** 21 out of 1,015 (2.07%)" in report


def test_a_name_stays_in_its_cell() -> None:
    assert "| **b\\|c** | 1,000" in sampling_report(SOURCES)


def test_nothing_is_no_division_by_zero() -> None:
    assert "0 out of 0 (0.00%)" in sampling_report([Coverage("a")])
