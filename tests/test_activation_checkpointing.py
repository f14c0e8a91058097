"""Activations that are computed again give the same gradients, bit for bit, from less memory."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import pytest
import torch
from net_cases import NETS
from option_cases import net_with, outcome, packed_batches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models.transformer

Recomputed = Literal["none", "block", "attention"]


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors made inside, while anything refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def peak_bytes(net: str, recomputed: Recomputed) -> int:
    """Of one micro-batch, forward and backward."""
    model = net_with(NETS[net], recomputed=recomputed)
    batches = packed_batches()[:1]
    with LiveBytes() as live:
        outcome(model, batches)
    return live.peak


@pytest.mark.parametrize("recomputed", ["block", "attention"])
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_the_same_bit_for_bit(net: str, recomputed: Recomputed) -> None:
    batches = packed_batches()[:2]
    for backprop_steps in (1, 2, 5) if net.startswith("hrm") else (None,):
        expected = outcome(net_with(NETS[net]), batches, backprop_steps)
        found = outcome(net_with(NETS[net], recomputed=recomputed), batches, backprop_steps)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_less_memory_is_needed_the_more_is_computed_again() -> None:
    for net in ("hrm", "transformer"):
        whole, attention, none = (peak_bytes(net, part) for part in ("block", "attention", "none"))
        assert whole < attention < none
        assert whole < 0.92 * none  # weights, gradients and the head are most of so small a net


@pytest.mark.parametrize("recomputed", ["block", "attention"])
def test_calls_without_gradient_are_not_computed_again(
    recomputed: Recomputed, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    checkpoint = models.transformer.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(models.transformer, "checkpoint", counted)
    model = net_with(NETS["hrm"], recomputed=recomputed)
    (batch, *_) = packed_batches()
    for backprop_steps in (1, 2, 5):
        calls = 0
        outcome(model, [batch], backprop_steps)
        applications = NETS["hrm"].applications(backprop_steps)
        assert calls == sum(call.keeps_gradient for call in applications)  # one layer a stack
    with torch.no_grad():
        calls = 0
        model(batch.tokens, batch.positions, batch.layout)
        assert calls == 0
