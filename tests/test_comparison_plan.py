"""Entries as they are written, and how many steps each net gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import composed, write_tiny_data

from evaluation.comparison.plan import (
    Entry,
    Match,
    Planned,
    Settings,
    parse_entries,
    parse_settings,
    plan_all,
    run_name,
    training_flops,
)
from models.flops import core_parameters, training_flops_per_token

STEPS = 40
SHAPE = {"arch.hidden_size": "16", "arch.num_heads": "2", "arch.intermediate_size": "24"}


def compose(settings: Settings) -> dict[str, Any]:
    words = (f"{key}={value}" for key, value in settings.items())
    return composed("--config-name", "cfg_quickstart", *words)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data") / "tiny", examples=1500, epochs=1)


def plan(
    data: Path, nets: str, match: Match = "flops", others: Settings | None = None
) -> list[Planned]:
    common = {**SHAPE, "data.path": str(data), "global_batch_size": "64", **(others or {})}
    return plan_all(parse_entries(nets), common, match=match, steps=STEPS, compose=compose)


def test_an_entry_is_a_net_with_settings_of_its_own() -> None:
    entries = parse_entries("hrm,transformer:arch.n_layers=6:lr=4e-3")
    assert entries == [
        Entry("hrm", {}),
        Entry("transformer", {"arch.n_layers": "6", "lr": "4e-3"}),
    ]
    assert [entry.label for entry in entries] == ["hrm", "transformer n_layers=6 lr=4e-3"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hrm,gru", "arch/net@arch=gru does not exist"),
        ("hrm,hrm", "names an entry twice"),
        ("hrm:arch.n_layer=2", "did you mean arch.n_layers?"),
        ("hrm:seed=3", "seed cannot be set here"),
        ("hrm:n_layers", "is no override"),
    ],
)
def test_a_wrong_entry_is_told(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        parse_entries(text)


@pytest.mark.parametrize("setting", ["lr=1e-3", "max_steps=5", "run_name=x", "epochs=2"])
def test_what_the_comparison_sets_is_not_free(setting: str) -> None:
    with pytest.raises(ValueError, match="the comparison sets it for each run"):
        parse_settings([setting])


def test_equal_flops_are_equal_up_to_one_step(data: Path) -> None:
    nets = "hrm,transformer,trm,trm_match_recurrence,rins,ut,transformer:arch.n_layers=12"
    first, *others = plan(data, nets)
    assert first.steps == STEPS
    budget = first.flops_at(STEPS)
    for each in others:
        one_more = training_flops(each.arch, each.workload, each.steps + 1, each.steps + 1)
        assert each.flops_at(each.steps) <= budget < one_more
    assert others[0].steps > 2 * STEPS
    assert others[-1].steps == STEPS  # hrm of 2 + 2 layers at bp 5: 36 layers' worth, as 3 * 12


def test_the_bp_schedule_is_counted(data: Path) -> None:
    warm, whole = plan(
        data, "hrm,hrm:arch.bp_warmup_ratio=0.0", others={"arch.bp_warmup_ratio": "0.5"}
    )
    workload = warm.workload
    per_token = {
        steps: training_flops_per_token(
            warm.arch, workload.vocab_size, backprop_steps=steps, mean_keys=workload.mean_keys
        )
        for steps in (2, 3, 4, 5)
    }
    # 2 + int(3 * step / 20) gradient calls in steps 1 to 19, 5 from then on
    expected = 6 * per_token[2] + 7 * per_token[3] + 6 * per_token[4] + 21 * per_token[5]
    assert warm.flops_at(STEPS) == pytest.approx(expected * workload.tokens_per_step)
    assert whole.steps < STEPS


def test_equal_tokens_are_equal_steps(data: Path) -> None:
    assert {each.steps for each in plan(data, "hrm,transformer,ut", "tokens")} == {STEPS}


def test_equal_parameters_choose_the_layers(data: Path) -> None:
    first, same, half = plan(data, "transformer,rins,trm_match_recurrence", "parameters")
    assert core_parameters(first.arch) == core_parameters(same.arch) == core_parameters(half.arch)
    assert (same.arch.n_layers, half.arch.n_layers) == (4, 8)
    assert half.settings["arch.n_layers"] == "8"
    with pytest.raises(ValueError, match=r"chooses arch.n_layers itself"):
        plan(data, "hrm,transformer:arch.n_layers=2", "parameters")


def test_too_few_prepared_epochs_are_told_with_the_number_needed(data: Path) -> None:
    with pytest.raises(ValueError, match=r"prepared epochs make [\d,]+; make the data with epochs"):
        plan_all(
            parse_entries("hrm"),
            {**SHAPE, "data.path": str(data), "global_batch_size": "64"},
            match="flops",
            steps=100_000,
            compose=compose,
        )


def test_runs_of_other_settings_have_other_names(data: Path) -> None:
    (one,) = plan(data, "hrm:arch.attn_type=causal")
    (other,) = plan(data, "hrm:arch.attn_type=causal", others={"weight_decay": "0.0"})
    names = {run_name(one, 1e-3, 0), run_name(one, 1e-3, 1), run_name(one, 2e-3, 0)}
    assert len(names | {run_name(other, 1e-3, 0)}) == 4
    (given,) = plan(data, "hrm:arch.attn_type=causal:lr=1e-3")
    assert run_name(given, 1e-3, 0) == run_name(one, 1e-3, 0)  # however it was come by
    assert run_name(one, 1e-3, 0).startswith("hrm_attn_type-causal_lr-0.001_seed-0_")
