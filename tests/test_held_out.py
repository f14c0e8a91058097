"""What is held out depends on the question and the seed alone."""

from __future__ import annotations

from data_io.held_out import HeldOut
from data_io.records import Row

RECORDS = [Row("direct", f"question {number}", "answer") for number in range(2000)]


def test_a_share_is_held_out() -> None:
    chosen = {seed: [HeldOut.share(0.1, seed).has(each) for each in RECORDS] for seed in (0, 1)}
    assert chosen[0] != chosen[1]
    assert all(140 < sum(each) < 260 for each in chosen.values())  # 200 expected, deviation 13
    assert not any(HeldOut.share(0, 0).has(each) for each in RECORDS)


def test_a_number_is_held_out() -> None:
    for count in (1, 7, 2000):
        held_out = HeldOut.count(count, 3, RECORDS)
        assert sum(map(held_out.has, RECORDS)) == count
    assert not any(map(HeldOut.count(5, 0, []).has, RECORDS))


def test_another_answer_to_a_question_goes_along() -> None:
    held_out = HeldOut.share(0.5, 0)
    for record in RECORDS[:50]:
        again = Row("cot", f" {record.instruction}\n", "another")
        assert held_out.has(again) == held_out.has(record)
