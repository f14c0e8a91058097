"""What the records of the nets say: sizes, orders of calls, FLOPs, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from net_cases import NETS, build, read_case, tiny_config
from pydantic import ValidationError

from models import HRMConfig
from models.flops import core_parameters, total_parameters, training_flops_per_token
from models.transformer import NetConfig, StackConfig
from training.export_format import ARCH_ADAPTER

CONFIG = Path(__file__).parents[1] / "config" / "arch"
PUBLISHED_VOCAB = 65536
# weights of the stacks, and all with embedding and head
PUBLISHED_SIZES = {
    "B": (166_723_584, 300_941_312),
    "L": (526_909_440, 694_681_600),
    "XL": (981_467_136, 1_182_793_728),
    "XXL": (3_038_773_248, 3_273_654_272),
    "XXL_wide": (2_747_269_120, 3_082_813_440),
}


def published_hrm(size: str) -> NetConfig:
    """The net hrm in that size, as config/ has it."""
    settings: dict[str, Any] = {}
    for file in ("size/_base", f"size/{size}", "net/hrm"):
        settings |= yaml.safe_load((CONFIG / f"{file}.yaml").read_text(encoding="utf-8"))
    settings.pop("defaults", None)
    return ARCH_ADAPTER.validate_python(settings)


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_a_published_size_has_the_published_parameters(size: str) -> None:
    config = published_hrm(size)
    assert (
        core_parameters(config),
        total_parameters(config, PUBLISHED_VOCAB),
    ) == PUBLISHED_SIZES[size]
    with torch.device("meta"):
        model = build(config, PUBLISHED_VOCAB)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_SIZES[size][1]


@pytest.mark.parametrize("net", NETS)
def test_counted_parameters_are_those_of_the_model(net: str) -> None:
    model = build(NETS[net])
    counted = total_parameters(NETS[net], vocab_size=256)
    assert counted == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
@pytest.mark.parametrize("bp", [2, 3, 4, 5])
def test_hrm_flops_are_those_of_the_published_formula(size: str, bp: int) -> None:
    config = published_hrm(size)
    core, width, keys = PUBLISHED_SIZES[size][0], config.hidden_size, 190.0
    attention = 4 * width * keys * (config.n_layers // 2) * (8 + 2 * bp)
    expected = (8 + 2 * bp) * core + 6 * width * PUBLISHED_VOCAB + attention
    counted = training_flops_per_token(config, PUBLISHED_VOCAB, backprop_steps=bp, mean_keys=keys)
    assert counted == pytest.approx(expected, rel=1e-12)


def test_golden_gradient_reach(golden_schedules: Path) -> None:
    cases = read_case(golden_schedules).get("grad_reach", [])
    for case in cases:
        config = tiny_config("hrm", H_cycles=case["H_cycles"], L_cycles=case["L_cycles"])
        for steps, reach in case["reach"].items():
            calls = list(config.applications(int(steps)))
            for stack in "HL":
                keeps = [call.keeps_gradient for call in calls if call.stack == f"{stack}_module"]
                assert keeps == reach[f"{stack}_grad"], (case["H_cycles"], steps, stack)


# what each call reads and writes, and the last calls that carry gradient
ORDERS = {
    "hrm": "L:z_L_init+x L:z_L+x L:z_L+x H:x+z_L* L:z_L+z_H* L:z_L+z_H* L:z_L+z_H* H:z_H+z_L*",
    "trm": "L:z_L_init+x L:x+z_L* L:z_L+z_H* L:z_H+z_L*",
    "rins": "L:z_L_init+x L:z+x L:z+x L:z+x* L:z+x* L:z+x* L:z+x* H:z*",
    "ut": "L:z_L_init+x L:z+x L:z+x* L:z+x*",
    "transformer": "stack:x*",
}


@pytest.mark.parametrize("net", ORDERS)
def test_the_order_of_calls(net: str) -> None:
    calls = [
        call.stack.removesuffix("_module") + ":" + "+".join(call.reads) + "*" * call.keeps_gradient
        for call in NETS[net].applications()
    ]
    assert " ".join(calls) == ORDERS[net]


def test_half_layers_halves_every_stack_but_not_an_override() -> None:
    config = tiny_config("hrm", n_layers=6, H_override={"n_layers": 6})
    assert {name: stack.n_layers for name, stack in config.stacks().items()} == {
        "H_module": 6,
        "L_module": 3,
    }


def test_h_override_reaches_the_modules_of_H_alone() -> None:
    model = build(NETS["hrm with another H"])
    parameters = dict(model.named_parameters())
    assert "model.H_module.layers.2.attn.o_proj.weight" in parameters
    assert "model.L_module.layers.1.attn.o_proj.weight" not in parameters
    mlp_sizes = [
        len(parameters[f"model.{s}_module.layers.0.mlp.gate_up_proj.weight"]) for s in "HL"
    ]
    assert mlp_sizes == [2 * 64, 2 * 48]


def test_more_backprop_steps_than_calls_means_all_of_them() -> None:
    config = tiny_config("hrm", bp_max_steps=50)
    assert all(call.keeps_gradient for call in config.applications())


@pytest.mark.parametrize(
    ("net", "changes", "message"),
    [
        ("hrm", {"hidden_size": 100, "num_heads": 3}, r"use a multiple of 6, e.g. hidden_size=102"),
        ("hrm", {"hidden_size": 33, "pos_emb_type": "none"}, r"equal heads; .* hidden_size=34"),
        ("hrm", {"n_layers": 3}, r"n_layers=3 cannot be halved .* n_layers=4"),
        ("hrm", {"H_override": {"layers": 3}}, r"H_override has no setting \['layers'\]"),
        ("hrm", {"H_override": {"hidden_size": 64}}, r"H_override.hidden_size=64 differs"),
        ("hrm", {"H_override": {"num_heads": 3}}, r"does not split into num_heads=3"),
        ("hrm", {"bp_min_steps": 6}, r"bp_min_steps=6 exceeds bp_max_steps=5"),
        ("hrm", {"bp_min_steps": 0}, r"greater than 0"),
        ("hrm", {"H_cycle": 3}, r"H_cycle\n.*Extra inputs are not permitted"),
        ("hrm", {"n_layers": "4"}, r"valid integer"),
        ("hrm", {"norm_type": "middle"}, r"'pre' or 'post'"),
        ("hrm", {"name": "hrn"}, r"'hrm', 'transformer', 'trm'"),
        ("transformer", {"half_layers": True}, r"a transformer has one stack"),
        ("trm", {"H_bp_steps": 3}, r"exceed the 2 and 2 calls"),
        ("rins", {"L_bp_cycles": 8}, r"L_bp_cycles=8 exceeds L_cycles=7"),
        ("ut", {"bp_cycles": 5}, r"bp_cycles=5 exceeds cycles=4"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    net: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(net, **changes)


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        NETS["hrm"].n_layers = 8


def test_the_mlp_is_rounded_up_to_256() -> None:
    sizes = {1024: 2816, 1280: 3584, 1536: 4096, 1792: 4864, 2560: 6912}
    for hidden_size, mlp_size in sizes.items():
        stack = StackConfig(n_layers=1, hidden_size=hidden_size, num_heads=hidden_size // 128)
        assert stack.mlp_size == mlp_size


def test_hrm_defaults_are_the_published_ones() -> None:
    config = HRMConfig(n_layers=2, hidden_size=32, num_heads=2, H_cycles=2, L_cycles=3)
    assert (config.bp_min_steps, config.bp_max_steps, config.bp_warmup_ratio) == (2, 5, 0.0)
