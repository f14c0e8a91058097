"""Settings and names of the export target: ours to theirs and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from net_cases import NETS, VOCAB_SIZE, build, tiny_config
from transformers import HrmTextConfig

from models.transformer import NetConfig
from training.export_format import (
    FramingIds,
    arch_from_export,
    export_config,
    exported_names,
    layers_by_stack,
    place_of_exported,
    why_not_native,
)

IDS = FramingIds(boq=6, eoq=7, eoa=11, pad=None)
NATIVE = [label for label, net in NETS.items() if why_not_native(net) is None]


def config_of(net: NetConfig) -> dict[str, Any]:
    is_native = why_not_native(net) is None
    return export_config(net, is_native=is_native, vocab_size=256, max_seq_len=64, ids=IDS)


def layers_of(net: NetConfig) -> dict[str, int]:
    """As they are in an export."""
    names = (name for name, _ in build(net, VOCAB_SIZE).named_parameters())
    return layers_by_stack(exported_names(net, names, is_native=why_not_native(net) is None))


def calls(net: NetConfig) -> list[tuple[Any, ...]]:
    """The forward pass: each stack by what it computes, not by its name."""
    shapes = ("n_layers", "hidden_size", "num_heads", "mlp_size", "norm_type", "norm_eps")
    rest = ("pos_emb_type", "rope_theta", "attn_type")
    return [
        (each.reads, each.writes, *(getattr(net.stacks()[each.stack], k) for k in shapes + rest))
        for each in net.applications()
    ]


def test_the_class_holds_these_nets() -> None:
    assert NATIVE == ["hrm", "trm", "trm_match_recurrence", "hrm causal"]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (NETS["rins"], "has no net like rins"),
        (NETS["transformer"], "has no net like transformer"),
        (NETS["hrm post-norm"], "is pre-norm, this net is norm_type=post"),
        (NETS["hrm without positions"], "this net pos_emb_type=none"),
        (NETS["hrm with another H"], "one value of n_layers, num_heads, mlp_size, norm_type"),
        (tiny_config("hrm", H_override={"rope_theta": 5.0}), "one value of rope_theta for both"),
    ],
)
def test_what_the_class_cannot_hold_is_said(net: NetConfig, reason: str) -> None:
    assert reason in str(why_not_native(net))


def test_an_override_that_changes_nothing_is_no_obstacle() -> None:
    net = tiny_config("hrm", H_override={"n_layers": 1, "init_type": "megatron", "init_std": 0.5})
    assert why_not_native(net) is None
    assert config_of(net)["embedding_scale"] == 2.0  # that of the H level


@pytest.mark.parametrize("label", NATIVE)
def test_the_config_has_every_field_that_the_class_reads(label: str) -> None:
    fields = set(HrmTextConfig.__annotations__) - {"num_layers_per_stack"}  # it works that out
    config = config_of(NETS[label])
    assert fields - {"model_type", "keys_to_ignore_at_inference"} <= set(config)
    read = HrmTextConfig(**config)
    assert {key: getattr(read, key) for key in config if key != "num_hidden_layers"} == {
        key: value for key, value in config.items() if key != "num_hidden_layers"
    }
    stack = NETS[label].stacks()["L_module"]
    assert read.num_layers_per_stack == config["num_hidden_layers"] == stack.n_layers


@pytest.mark.parametrize("label", NATIVE)
@pytest.mark.parametrize("is_saved", [False, True])  # transformers writes the inflated total
def test_a_native_net_comes_back(label: str, is_saved: bool) -> None:
    net = NETS[label]
    config = config_of(net)
    if is_saved:
        config = HrmTextConfig(**config).to_dict()
        assert config["num_hidden_layers"] != config["num_layers_per_stack"]
    back = arch_from_export(config, layers_of(net))
    assert calls(back) == calls(net)
    assert back.answer_stack.in_std == net.answer_stack.in_std
    assert getattr(back, "name") == "hrm"  # noqa: B009 -- of trm too: two stacks are in the folder
    again = config_of(back)
    assert {**again, "L_bp_cycles": 0} == {**config_of(net), "L_bp_cycles": 0}


@pytest.mark.parametrize("label", sorted(set(NETS) - set(NATIVE)))
def test_another_net_comes_back_as_it_was(label: str) -> None:
    net = NETS[label]
    config = config_of(net)
    assert arch_from_export(config, layers_of(net)) == net
    slots = sum(net.stacks()[each.stack].n_layers for each in net.applications())
    assert config["num_hidden_layers"] == slots
    assert config["eoq_token_id"] == 7 and config["pad_token_id"] is None


@pytest.mark.parametrize(
    ("bp", "L_calls", "back"),
    [(5, [0, 3], 5), (6, [1, 3], 6), (4, [0, 2], 4), (2, [0, 1], 3), (50, [3, 3], 8)],
)
def test_gradient_carrying_calls(bp: int, L_calls: list[int], back: int) -> None:
    """The class always lets gradient through H, so bp=2 becomes 3."""
    net = tiny_config("hrm", bp_max_steps=bp)
    config = config_of(net)
    assert config["L_bp_cycles"] == L_calls
    read = arch_from_export(config, layers_of(net)).model_dump()
    assert read["bp_max_steps"] == back


@pytest.mark.parametrize(
    "changes",
    [
        {"init_type": "megatron", "init_std": 0.3},
        {"init_type": "fixed_normal"},
        {"init_type": "megatron"},
        {"init_type": "fixed_normal", "init_std": 0.07},
    ],
)
def test_the_scale_of_the_embedding_comes_back_exactly(changes: dict[str, Any]) -> None:
    net = tiny_config("hrm", **changes)
    back = arch_from_export(config_of(net), layers_of(net))
    assert back.answer_stack.in_std == net.answer_stack.in_std


def test_a_config_without_optional_fields_means_what_the_class_means() -> None:
    net = NETS["hrm"]
    needed = (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "H_cycles", "L_cycles", "max_position_embeddings", "head_dim"),
    )
    config = {key: value for key, value in config_of(net).items() if key in needed}
    back = arch_from_export(config, layers_of(net))
    class_means = HrmTextConfig(**config)
    assert class_means.embedding_scale == 1.0 / back.answer_stack.in_std == 50.0
    assert back.rope_theta == 10000.0 and back.norm_eps == class_means.rms_norm_eps
    assert back.model_dump()["bp_max_steps"] == 2 + 1 + 2  # L_bp_cycles: [2], padded with 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 2}, r"num_hidden_layers=2, but each stack of the weights has 1 lay"),
        ({"num_hidden_layers": 2}, r"published exporter .* \"num_hidden_layers\": 1"),
        ({"num_hidden_layers": 8}, "num_hidden_layers=8"),
        ({"num_layers_per_stack": 4}, "num_layers_per_stack=4, but"),
        ({"attention_bias": True}, "attention_bias is True, not False"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"head_dim": 32}, r"head_dim \* num_attention_heads is 64, not 32"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, not 2"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is yarn"),
        ({"H_cycles": None}, "lacks H_cycles"),
        ({"H_cycles": 0}, "H_cycles: Input should be greater than 0"),
        ({"model_type": "llama"}, "model_type='llama' is not known here; hrm_text and recurrent"),
        ({"model_type": "recurrent_lm"}, "no architecture that is known here"),
        ({"model_type": "recurrent_lm", "net": {"name": "mamba"}}, "no architecture .* known here"),
    ],
)
def test_what_our_nets_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    net = NETS["hrm"]
    with pytest.raises(ValueError, match=told):
        arch_from_export({**config_of(net), **changes}, layers_of(net))


@pytest.mark.parametrize("layers", [{"H_module": 1, "L_module": 2}, {"L_module": 1}, {}])
def test_stacks_of_other_depths_are_refused(layers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="the weights hold layers of"):
        arch_from_export(config_of(NETS["hrm"]), layers)
    with pytest.raises(ValueError, match="but the weights hold"):
        arch_from_export(config_of(NETS["rins"]), layers)


@pytest.mark.parametrize(
    ("name", "ours", "rows"),
    [
        ("attn.gqkv_proj", "attn.gqkv_proj", (0, 48)),
        ("self_attn.gate_proj", "attn.gqkv_proj", (0, 12)),
        ("self_attn.q_proj", "attn.gqkv_proj", (12, 24)),
        ("self_attn.k_proj", "attn.gqkv_proj", (24, 36)),
        ("self_attn.v_proj", "attn.gqkv_proj", (36, 48)),
        ("attn.v_proj", "attn.gqkv_proj", (36, 48)),
        ("self_attn.o_proj", "attn.o_proj", (0, 48)),
        ("attn.o_proj", "attn.o_proj", (0, 48)),
        ("mlp.gate_up_proj", "mlp.gate_up_proj", (0, 48)),
        ("mlp.gate_proj", "mlp.gate_up_proj", (0, 24)),
        ("mlp.up_proj", "mlp.gate_up_proj", (24, 48)),
        ("mlp.down_proj", "mlp.down_proj", (0, 48)),
    ],
)
def test_split_projections_lie_in_ours(name: str, ours: str, rows: tuple[int, int]) -> None:
    stem = "model.H_module.layers.3"
    place = place_of_exported(f"{stem}.{name}.weight")
    assert place.name == f"{stem}.{ours}.weight"
    assert place.rows(torch.arange(48)).tolist() == list(range(*rows))


def test_other_names_are_the_same() -> None:
    for name in ("model.z_L_init", "lm_head.weight", "model.embed_tokens.weight"):
        assert place_of_exported(name).name == name
