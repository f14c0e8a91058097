"""The execution of a net can be watched: each state, as it is written."""

from __future__ import annotations

import pytest
import torch
from net_cases import NETS, build, random_row
from torch import Tensor


class Recorder:
    """A trace that keeps everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor | None, Tensor]] = []

    def add(self, name: str, before: Tensor | None, after: Tensor) -> None:
        self.seen.append((name, before, after))


@pytest.mark.parametrize("net", NETS)
def test_a_trace_sees_every_state_in_the_order_of_the_calls(net: str) -> None:
    model, row, trace = build(NETS[net]), random_row((5, 2), (3, 4)), Recorder()
    answer = model(row.tokens, row.positions, row.layout, trace=trace)
    calls = list(model.config.applications())
    assert [name for name, _, _ in trace.seen] == [call.writes for call in calls]
    held: dict[str, Tensor] = {}
    for name, before, after in trace.seen:
        assert before is held.get(name)
        held[name] = after
    assert trace.seen[-1][2] is answer


def test_a_trace_changes_nothing() -> None:
    model, row = build(NETS["hrm"]), random_row((5, 2), (3, 4))
    inputs = (row.tokens, row.positions, row.layout, 3)
    gradients = []
    for trace in (None, Recorder()):
        model.zero_grad()
        model(*inputs, trace=trace).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, traced = gradients
    assert plain.keys() == traced.keys()
    assert all(torch.equal(plain[name], traced[name]) for name in plain)
