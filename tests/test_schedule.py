"""The schedules are the published ones, up to their end; after it they stay where they ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from net_cases import NETS, read_case, tiny_config

from training.schedule import backprop_steps_at, check_schedule, lr_at, published_total_steps


def lr_settings(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "lr": case["lr"],
        "min_ratio": case["lr_min_ratio"],
        "warmup_steps": case["lr_warmup_steps"],
        "total_steps": case["total_steps"],
    }


def steps_of(case: dict[str, Any]) -> range:
    first = case["step_first"]
    return range(first, first + len(case["values"]))


def test_golden_learning_rates(golden_schedules: Path) -> None:
    for case in read_case(golden_schedules)["lr"]:
        total, warmup = case["total_steps"], case["lr_warmup_steps"]
        is_refused = warmup >= total
        for step, expected in zip(steps_of(case), case["values"], strict=True):
            if expected is None:  # the original divides by zero
                assert is_refused and step >= warmup
            elif step < warmup or (step <= total and not is_refused):
                found = lr_at(step, **lr_settings(case))
                assert found == pytest.approx(expected, rel=0, abs=1e-12), (case["lr"], step)


def test_golden_schedules_that_end_before_their_warm_up_are_refused(golden_schedules: Path) -> None:
    for case in read_case(golden_schedules)["lr"]:
        total, warmup = case["total_steps"], case["lr_warmup_steps"]
        if warmup < total:
            check_schedule(warmup_steps=warmup, total_steps=total)
            continue
        with pytest.raises(ValueError, match=rf"lr_warmup_steps={warmup} is not shorter than .*"):
            check_schedule(warmup_steps=warmup, total_steps=total)


def test_golden_learning_rates_stay_at_the_minimum_past_the_end(golden_schedules: Path) -> None:
    """The original's cosine rises again there."""
    for case in read_case(golden_schedules)["lr"]:
        total, settings = case["total_steps"], lr_settings(case)
        if case["lr_warmup_steps"] >= total:
            continue
        minimum = case["lr"] * case["lr_min_ratio"]
        for step in (total, total + 1, total + 7, 2 * total, 100 * total):
            assert lr_at(step, **settings) == pytest.approx(minimum, rel=0, abs=1e-12)


def test_golden_numbers_of_gradient_carrying_calls(golden_schedules: Path) -> None:
    for case in read_case(golden_schedules)["bp"]:
        names = ("bp_warmup_ratio", "bp_min_steps", "bp_max_steps")
        config = tiny_config("hrm", **{name: case[name] for name in names})
        found = [backprop_steps_at(step, case["total_steps"], config) for step in steps_of(case)]
        assert found == case["values"]


def test_the_message_names_both_numbers_and_a_way_out() -> None:
    with pytest.raises(ValueError, match="run of 30 steps; lower it, or train longer"):
        check_schedule(warmup_steps=30, total_steps=30)


def test_without_warm_up_the_first_step_is_on_the_cosine() -> None:
    settings = {"lr": 1.0, "min_ratio": 0.0, "warmup_steps": 0, "total_steps": 2}
    assert [lr_at(step, **settings) for step in (1, 2)] == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("net", [net for net in NETS if not net.startswith("hrm")])
def test_other_nets_have_a_fixed_number_of_gradient_carrying_calls(net: str) -> None:
    assert backprop_steps_at(1, 100, NETS[net]) is None


def test_hrm_without_warm_up_of_its_gradients_starts_with_all_calls() -> None:
    config = tiny_config("hrm", bp_min_steps=1, bp_max_steps=8)
    assert {backprop_steps_at(step, 10, config) for step in range(1, 20)} == {8}


def test_published_number_of_steps_ignores_packing_losses() -> None:
    assert published_total_steps(4, 15_020_000_000, 196_608) == 305_582
    assert published_total_steps(3, 560, 96) == 17
