"""A net at another depth has other numbers of calls, the same weights, and legal settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from net_cases import NETS, build, random_row, tiny_config

from inference.depth import at_depth, depth_knobs, depth_of, with_depth
from models.transformer import NetConfig

KINDS = ("hrm", "trm", "trm_match_recurrence", "rins", "ut", "transformer")


def num_calls(arch: NetConfig) -> int:
    return len(list(arch.applications()))


@pytest.mark.parametrize(
    ("net", "depth", "calls"),
    [
        ("hrm", {"H_cycles": 4}, 4 * (3 + 1)),
        ("hrm", {"L_cycles": 1}, 2 * (1 + 1)),
        ("hrm", {"H_cycles": 1, "L_cycles": 6}, 1 * (6 + 1)),
        ("trm", {"H_cycles": 3, "L_cycles": 2}, 3 * (2 + 1)),
        ("trm", {"H_cycles": 1}, 1 * (1 + 1)),
        ("trm_match_recurrence", {"L_cycles": 1}, 2 * (1 + 1)),
        ("rins", {"L_cycles": 2}, 2 + 1),
        ("rins", {"L_cycles": 9}, 9 + 1),
        ("ut", {"cycles": 1}, 1),
        ("ut", {"cycles": 8}, 8),
    ],
)
def test_a_net_makes_as_many_calls_as_it_is_told(
    net: str, depth: dict[str, int], calls: int
) -> None:
    arch = at_depth(NETS[net], **depth)
    assert num_calls(arch) == calls
    assert depth_of(arch) == {**depth_of(NETS[net]), **depth}
    unchanged = arch.model_dump(exclude={*depth_of(arch), *gradient_settings(arch)})
    assert unchanged == NETS[net].model_dump(exclude={*depth_of(arch), *gradient_settings(arch)})


def gradient_settings(arch: NetConfig) -> set[str]:
    return {"H_bp_steps", "L_bp_steps", "L_bp_cycles", "bp_cycles"} & set(arch.model_dump())


@pytest.mark.parametrize("net", KINDS)
def test_as_trained_is_the_default(net: str) -> None:
    assert at_depth(NETS[net]) is NETS[net]
    assert at_depth(NETS[net], **depth_of(NETS[net])) == NETS[net]


def test_fewer_calls_carry_gradient_where_fewer_are_left() -> None:
    trm = at_depth(tiny_config("trm", H_bp_steps=2, L_cycles=3, L_bp_steps=5), H_cycles=1)
    assert (trm.model_dump()["H_bp_steps"], trm.model_dump()["L_bp_steps"]) == (1, 3)
    assert at_depth(NETS["rins"], L_cycles=2).model_dump()["L_bp_cycles"] == 2
    assert at_depth(NETS["rins"], L_cycles=9).model_dump()["L_bp_cycles"] == 4
    assert at_depth(NETS["ut"], cycles=1).model_dump()["bp_cycles"] == 1


@pytest.mark.parametrize(
    ("net", "depth", "told"),
    [
        ("transformer", {"H_cycles": 2}, "H_cycles=2: a net of kind transformer.*its depth is fix"),
        ("ut", {"L_cycles": 2}, "a net of kind ut has none; its depth is set by cycles"),
        ("rins", {"H_cycles": 2}, "a net of kind rins has none; its depth is set by L_cycles"),
        ("hrm", {"cycles": 2}, "cycles=2: a net of kind hrm .* set by H_cycles, L_cycles"),
        ("hrm", {"L_cycles": 0}, "L_cycles=0 applies nothing; use 1 or more"),
    ],
)
def test_a_depth_that_the_net_does_not_have_is_refused(
    net: str, depth: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        at_depth(NETS[net], **depth)


@pytest.mark.parametrize("net", [net for net in KINDS if net != "transformer"])
def test_another_depth_shares_the_weights_and_computes_what_such_a_net_does(net: str) -> None:
    model, row = build(NETS[net]), random_row([5, 3], [2, 4])
    knob = depth_knobs(NETS[net])[0]
    deeper = with_depth(model, at_depth(NETS[net], **{knob: 3}))
    for name, tensor in deeper.state_dict().items():
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()
    built = build(at_depth(NETS[net], **{knob: 3}))
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, as_trained, expected = (
            each(row.tokens, row.positions, row.layout) for each in (deeper, model, built)
        )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert not torch.allclose(found, as_trained, atol=1e-3)
