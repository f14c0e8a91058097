"""Which weights are trained: what a pattern names, and what is asked in vain."""

from __future__ import annotations

from pathlib import Path

import pytest
from net_cases import NETS, build
from run_cases import run_config

from models.lora import LoraConfig
from training.trainable import choose_trained, is_named


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("embed_tokens", [True, False, False]),
        ("H_module", [False, True, False]),
        ("layers.0", [False, True, True]),
        ("layers.1", [False, False, False]),
        ("layers.*.mlp", [False, False, True]),
        ("*_module", [False, True, True]),
        ("model", [True, True, True]),
        ("model.embed_tokens.weight", [True, False, False]),
        ("attn.mlp", [False, False, False]),
        ("embed", [False, False, False]),
        ("layers.0.attn.gqkv_proj.weight.more", [False, False, False]),
    ],
)
def test_a_pattern_names_parts_in_a_row(pattern: str, names: list[bool]) -> None:
    parameters = (
        "model.embed_tokens.weight",
        "model.H_module.layers.0.attn.gqkv_proj.weight",
        "model.L_module.layers.0.mlp.down_proj.weight",
    )
    assert [is_named(parameter, pattern) for parameter in parameters] == names


def test_nothing_is_said_where_all_is_trained(tmp_path: Path) -> None:
    model = build(NETS["hrm"])
    assert choose_trained(model, run_config(tmp_path)) == {}
    assert all(param.requires_grad for param in model.parameters())


def test_what_is_trained_is_counted(tmp_path: Path) -> None:
    model = build(NETS["hrm"])
    lines = choose_trained(model, run_config(tmp_path, freeze=["embed_tokens", "lm_head"]))
    total = sum(param.numel() for param in model.parameters())
    rest = total - 2 * 256 * 32
    told = f"{rest:,} of {total:,} parameters; frozen: embed_tokens, lm_head"
    assert lines == {"trains": told}


@pytest.mark.parametrize(
    ("net", "freeze", "is_enough"),
    [
        ("hrm", ["H_module", "L_module", "lm_head"], True),
        ("trm", ["L_module", "lm_head"], True),
        ("ut", ["L_module", "lm_head"], True),
        ("rins", ["*_module", "lm_head", "embed_tokens"], False),
    ],
)
def test_a_gradient_must_reach_what_is_left(
    net: str, freeze: list[str], is_enough: bool, tmp_path: Path
) -> None:
    config = run_config(tmp_path, arch=NETS[net], freeze=freeze)
    if is_enough:
        assert choose_trained(build(NETS[net]), config)
    else:
        with pytest.raises(ValueError, match="leaves no weight that a gradient reaches"):
            choose_trained(build(NETS[net]), config)


def test_the_first_steps_of_a_warm_up_must_reach_the_adapters(tmp_path: Path) -> None:
    """At bp 1 the head alone is trained, and with adapters the head is not."""
    shape = NETS["hrm"].model_dump()
    arch = type(NETS["hrm"])(**{**shape, "bp_min_steps": 1, "bp_warmup_ratio": 0.5})
    config = run_config(tmp_path, arch=arch, lora=LoraConfig(), resume_from="somewhere")
    with pytest.raises(ValueError, match=r"arch\.bp_warmup_ratio=0"):
        choose_trained(build(arch), config)


def test_adapters_of_calls_without_gradient_are_told_of(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, targets=["o_proj"], per_cycle=True)
    config = run_config(tmp_path, lora=lora, resume_from="somewhere")
    told = choose_trained(build(NETS["hrm"]), config)["lora"]
    assert told.endswith(
        "one for each call (6 of L_module, 2 of H_module), of which the last 5 of 8 calls carry "
        "gradient and learn"
    )
