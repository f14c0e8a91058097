"""What a plan says is what a step takes: kept tensors, allocated bytes, speed, what fits."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, assert_refused, files_in, resolved, run_pretrain, write_tiny_data
from planning_cases import NETS, Step, net, saved_bytes

from data_io.sampled_format import SampledData
from models.attention.sdpa import SdpaAttention
from models.flops import total_parameters, training_flops_per_token
from models.language_model import LanguageModel
from training.distributed import stop_world
from training.planning import Examples, Plan, make_plan
from training.planning_activations import kept_by_block, kept_tensors
from training.planning_devices import GPUS
from training.planning_heap import LOADED_BYTES, MAPPED_FROM, resident_bytes
from training.planning_memory import extents, memory_moments, parameters, peak
from training.planning_speed import Fleet, mean_flops, nodes_table, traffic
from training.planning_text import plan_figures, plan_lines
from training.schema import RunConfig

EXAMPLES = Examples.made_up(300, 4096, 0.5)


@pytest.fixture(autouse=True)
def left_world() -> Any:
    yield
    stop_world()


def planned(fleet: Fleet, size: str = "XL", **settings: Any) -> Plan:
    """The published run with other settings, in 305,000 steps."""
    config = published(size).model_copy(update=settings)
    return make_plan(config, fleet, EXAMPLES, vocab_size=65536, total_steps=305_000, mfu=0.4)


@cache
def published(size: str) -> RunConfig:
    return resolved(f"arch/size@arch={size}")


def fleet(gpu: str, size: int = 1, **settings: Any) -> Fleet:
    return Fleet(GPUS[gpu], size, **settings)


@pytest.mark.parametrize("norm_type", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_keeps_what_is_planned(norm_type: str, dtype: torch.dtype) -> None:
    deep, flat = (
        Step(net("transformer", norm_type=norm_type, n_layers=n), dtype=dtype) for n in (2, 1)
    )
    stack = flat.config.stacks()["stack"]
    wanted = sum(map(sum, kept_tensors(stack, flat.rows, flat.kernels)))
    if not flat.kernels.writes_blocks_out(stack):
        wanted += 64 * dtype.itemsize  # attention has one row more than the batch
    assert saved_bytes(deep) - saved_bytes(flat) == wanted


ALLOCATED = {
    "hrm": Step(net("hrm")),
    "large vocabulary": Step(net("hrm"), vocab_size=16384),
    "micro-batches": Step(net("hrm", hidden_size=256), tokens=128, num_micro=3),
    "bf16": Step(net("hrm", hidden_size=128), dtype=torch.bfloat16),
    "bf16 weights": Step(net("hrm", hidden_size=256), tokens=64, num_micro=2, dtype=torch.bfloat16),
    "blocks again": Step(net("ut", n_layers=6), recomputed="block"),
    "attention again": Step(net("transformer", n_layers=6), recomputed="attention"),
    "no average": Step(net("rins", hidden_size=256), tokens=128, ema=None),
    "post-norm": Step(net("trm", norm_type="post"), length=64),
}
QUICK = ("bf16 weights",)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALLOCATED],
)
def test_a_step_allocates_what_is_planned(name: str) -> None:
    step = ALLOCATED[name]
    assert peak(memory_moments(step.case)).total == pytest.approx(step.allocated(), rel=0.05)


@pytest.mark.parametrize("name", NETS)
def test_weights_are_counted_as_the_model_has_them(name: str) -> None:
    config = net(name)
    model = LanguageModel(config, 512, SdpaAttention())
    assert [n for _, n in parameters(config, 512)] == [p.numel() for p in model.parameters()]


def test_shards_divide_what_is_sharded_and_nothing_else() -> None:
    alone = replace(Step(net("hrm"), dtype=torch.bfloat16).case, is_wrapped=True)
    shared = replace(alone, shards=4)
    one, four = (memory_moments(case)[0].parts for case in (alone, shared))
    for part in ("weights", "moments", "averages"):
        assert one[part] == 4 * four[part]
    assert one["activations"] == four["activations"]
    assert one["compute copy"] == four["compute copy"] == 2 * alone.num_parameters


def test_state_in_host_memory_is_not_on_the_device() -> None:
    plan, moved = (
        planned(fleet("h200"), micro_batch_size=4096, offload_optimizer=each)
        for each in (False, True)
    )
    parts, rest = (each.moments[0].parts for each in (plan, moved))
    assert moved.host_bytes - plan.host_bytes == parts["moments"] + parts["averages"]
    assert rest["moments"] == rest["averages"] == 0
    assert moved.speed.step_s > plan.speed.step_s


def test_the_published_run_fits_its_gpus_and_takes_its_time() -> None:
    """16 H100, 46 hours (README): at the 40 % of the FLOPs that follow from them."""
    plan = planned(fleet("h100", 16), compile="stack")
    assert plan.fits and plan.micro_tokens == 12288
    assert plan.hours == pytest.approx(46, rel=0.06)
    assert not planned(fleet("a100_40", 16), compile="stack").fits


def test_xl_fits_on_one_card_of_24_gb_with_three_settings() -> None:
    settings = {"micro_batch_size": 4096, "activation_checkpointing": "block"}
    for gpu in ("rtx3090", "rtx4090"):
        assert planned(fleet(gpu), **settings, offload_optimizer=True).fits
        assert not planned(fleet(gpu), **settings).fits


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not() -> None:
    largest = planned(fleet("h200")).largest_micro
    assert largest is not None and largest % 256 == 0
    assert planned(fleet("h200"), micro_batch_size=largest).fits
    assert not planned(fleet("h200"), micro_batch_size=largest + 256).fits
    hopeless = planned(fleet("rtx4090"), "XXL")
    assert hopeless.largest_micro is None and not hopeless.fits
    assert any("DOES NOT FIT" in line for line in plan_lines(hopeless))


def test_a_heap_keeps_the_room_of_each_part_and_large_blocks_give_theirs_back() -> None:
    """Tables of more than 32 MiB are large, here; the rest is the same."""
    limit = MAPPED_FROM // (4 * 64)
    small, large = (Step(net("hrm"), vocab_size=size).case for size in (limit, limit + 256))
    kept = [
        resident_bytes(case, moments) - LOADED_BYTES - peak(moments).total
        for case, moments in ((case, memory_moments(case)) for case in (small, large))
    ]
    assert kept[0] > kept[1] > 0


def test_a_block_that_is_computed_again_leaves_holes() -> None:
    """Its projection of gate and up is the largest tensor; every second of the 6 blocks has one."""
    step = Step(net("transformer", n_layers=6), recomputed="block")
    case, stack = step.case, step.config.stacks()["stack"]
    room = extents(case)
    passing = kept_by_block(stack, step.rows, step.kernels).backward
    assert room["activations"].passing == passing
    expected = LOADED_BYTES + case.state_bytes + 2 * 4 * case.num_parameters  # and gradients
    expected += room["activations"].lasting + 2 * passing
    expected += max(room["loss"].lasting, room["loss"].passing)
    expected += 3 * 2 * step.tokens * stack.mlp_size * 4
    assert resident_bytes(case, memory_moments(case)) == expected


def test_calls_with_gradient_grow_as_in_the_run() -> None:
    config = published("B").arch
    fewest, most = (
        training_flops_per_token(config, 512, backprop_steps=steps, mean_keys=100.0)
        for steps in (2, 5)
    )
    assert fewest < mean_flops(config, 512, 100.0) < most
    whole = config.model_copy(update={"bp_warmup_ratio": 0.0})
    assert mean_flops(whole, 512, 100.0) == pytest.approx(most)


def test_sending_takes_what_its_bytes_and_hops_say() -> None:
    within, between = fleet("h100", 8), fleet("h100", 16)
    gigabyte = 1e9
    assert within.collective_s(gigabyte, 1, 1) == 0
    expected = 7 / 8 / (0.8 * 450) + 7 * 2e-6
    assert within.collective_s(gigabyte, 8, 1) == pytest.approx(expected)
    expected = 15 / 16 / (0.8 * 400) + 15 * 6e-6  # eight links of 50 GB/s a node
    assert between.collective_s(gigabyte, 16, 1) == pytest.approx(expected)
    expected = 1 / 2 / (0.8 * 50) + 6e-6  # eight rings at a time, one link each
    assert between.collective_s(gigabyte, 2, 8) == pytest.approx(expected)


def test_many_nodes_hide_less_and_groups_gather_within_a_node() -> None:
    config = published("XL").arch
    rows = nodes_table(fleet("h100"), config, 65536, nodes=[1, 2, 64], step_seconds=0.5)
    assert [row[:2] for row in rows] == [(1, 1), (2, 1), (2, 2), (64, 1), (64, 64)]
    one, *_, flat, grouped = (sent for _, _, sent in rows)
    assert one.exposed_s == 0 and grouped.gather_s == one.gather_s < flat.gather_s
    several = traffic(fleet("h100", 8), config, 65536, 0.5, num_micro=2)
    assert several.reduce_s == pytest.approx(one.reduce_s * 65 / 33)  # 32 layers twice, and root
    assert several.gather_s == one.gather_s


@pytest.mark.parametrize(
    ("size", "replicas", "attention", "told"),
    [
        (7, 1, "auto", "is not divisible by the 7 devices; use e.g. 196609"),
        (8, 3, "auto", "fsdp_replicas=3 does not divide the 8 devices"),
        (8, 1, "dense", "attention=dense is for tests"),
    ],
)
def test_what_cannot_run_is_not_planned(
    size: int, replicas: int, attention: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        planned(fleet("h100", size, replicas=replicas), attention=attention)


def test_examples_are_those_of_the_data(tmp_path: Path) -> None:
    data = SampledData.open(write_tiny_data(tmp_path / "data"))
    found, index = Examples.of_data(data, target_only=True), data.epoch(0)
    assert sorted(found.lengths) == sorted(index.row_lengths().tolist())
    assert sum(found.filling(100)) == 100
    assert 0.3 < found.scored_share < 0.8
    assert 1 < found.mean_keys < max(found.lengths)


def test_figures_are_those_of_the_text_and_can_be_written() -> None:
    plan = planned(fleet("h100", 16), compile="stack")
    figures = json.loads(json.dumps(plan_figures(plan)))
    assert figures["peak_bytes"] == max(sum(m.values()) for m in figures["moments"].values())
    assert figures["parameters"] == total_parameters(plan.config.arch, 65536)
    text = "\n".join(plan_lines(plan, gpu_hour=2.0))
    assert f"{figures['peak_bytes'] / 2**30:.2f} GiB" in text
    assert f"{figures['hours'] * 32:,.0f} at 2 a device and hour" in text


@pytest.mark.slow
def test_a_planned_run_leaves_nothing(tmp_path: Path) -> None:
    folder = write_tiny_data(tmp_path / "work/data").parent
    before = files_in(folder)
    done = run_pretrain(*TINY, "data.path=data", "epochs=2", "plan=true", cwd=folder).check()
    for part in ("weights", "activations", "together", "largest     micro_batch_size=64 fits"):
        assert f"\n{part}" in done.stdout
    assert "data, mean length 13" in done.stdout and "for 27 steps" in done.stdout
    assert files_in(folder) == before


@pytest.mark.slow
def test_a_plan_needs_data_that_is_there(tmp_path: Path) -> None:
    told = ("nowhere is no folder of sampled data",)
    (tmp_path / "work").mkdir()
    assert_refused(tmp_path / "work", *TINY, "data.path=nowhere", "plan=true", told=told)
